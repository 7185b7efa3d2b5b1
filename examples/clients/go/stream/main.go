// stream HOST:PORT a.jpg b.jpg …: explains each picture on one stream, and prints answers as they come.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"

	"google.golang.org/grpc"

	pb "sidelight/v1"
)

const maxMessageBytes = 64 << 20 // by default, clients receive 4 MiB

func main() {
	address, paths := os.Args[1], os.Args[2:]
	connection, err := grpc.Dial(address, grpc.WithInsecure(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)))
	check(err)
	defer connection.Close()
	stream, err := pb.NewAttributionServiceClient(connection).AttributeStream(context.Background())
	check(err)

	go send(stream, paths)
	nAnswered, failed := 0, false
	for {
		answer, err := stream.Recv()
		if err == io.EOF { // the server may end the stream itself; what it has not answered belongs on a new one
			break
		}
		check(err)
		nAnswered++
		failed = report(answer) || failed
	}
	if failed || nAnswered < len(paths) {
		log.Fatalf("%d of %d pictures were answered", nAnswered, len(paths))
	}
}

// send blocks while the server is full.
func send(stream pb.AttributionService_AttributeStreamClient, paths []string) {
	for _, path := range paths {
		picture, err := os.ReadFile(path)
		check(err)
		attribute := &pb.AttributeRequest{
			Id:     path,
			Images: &pb.Images{Source: &pb.Images_Encoded{Encoded: &pb.EncodedImages{Files: [][]byte{picture}}}},
			Target: &pb.Target{Target: &pb.Target_Predicted{Predicted: &pb.PredictedTarget{}}},
			Method: &pb.Method{Method: &pb.Method_Gradient{Gradient: &pb.GradientMethod{}}},
		}
		request := &pb.AttributeStreamRequest{Request: &pb.AttributeStreamRequest_Attribute{Attribute: attribute}}
		if stream.Send(request) != nil { // the stream has ended, and Recv says why
			return
		}
	}
	check(stream.CloseSend())
}

// report prints one answer and returns whether it is a failure, of the batch or of its one example.
func report(answer *pb.AttributeStreamResponse) bool {
	id, result := answer.GetId(), answer.GetResult()
	if failure := answer.GetFailure(); failure != nil {
		log.Printf("%s: %d %s", id, failure.GetCode(), failure.GetMessage())
		return true
	}
	for _, failure := range result.GetFailures() {
		log.Printf("%s: %d %s", id, failure.GetCode(), failure.GetMessage())
		return true
	}
	prediction := result.GetExamples()[0].GetPrediction()
	fmt.Printf("%s %s %.4f\n", id, prediction.GetLabel(), prediction.GetProbability())
	check(os.WriteFile(id+".f32", result.GetMaps().GetData(), 0o644))
	return false
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
