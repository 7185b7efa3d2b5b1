// explain HOST:PORT picture.jpg: prints class and probability; writes picture.jpg.f32 and picture.jpg.png.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"

	pb "sidelight/v1"
)

const maxMessageBytes = 64 << 20 // by default, clients receive 4 MiB

func main() {
	address, path := os.Args[1], os.Args[2]
	picture, err := os.ReadFile(path)
	check(err)
	// From grpc-go 1.63: grpc.NewClient, with insecure.NewCredentials() in place of grpc.WithInsecure().
	connection, err := grpc.Dial(address, grpc.WithInsecure(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)))
	check(err)
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	answer, err := pb.NewAttributionServiceClient(connection).Attribute(ctx, &pb.AttributeRequest{
		Images: &pb.Images{Source: &pb.Images_Encoded{Encoded: &pb.EncodedImages{Files: [][]byte{picture}}}},
		Target: &pb.Target{Target: &pb.Target_Predicted{Predicted: &pb.PredictedTarget{}}},
		Method: &pb.Method{Method: &pb.Method_Gradient{Gradient: &pb.GradientMethod{}}},
		Output: &pb.Output{Rendered: &pb.Rendering{}}, // a PNG image of the map over the picture
	})
	check(err) // status.Code(err) is one of docs/reference/errors.md
	result := answer.GetResult()
	for _, failure := range result.GetFailures() {
		log.Fatalf("%s: %d %s", path, failure.GetCode(), failure.GetMessage())
	}
	example := result.GetExamples()[0]
	fmt.Printf("%s %s %.4f\n", path, example.GetPrediction().GetLabel(), example.GetPrediction().GetProbability())
	check(os.WriteFile(path+".f32", result.GetMaps().GetData(), 0o644)) // GetShape() float32, little-endian
	check(os.WriteFile(path+".png", example.GetRendered()[0], 0o644))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
