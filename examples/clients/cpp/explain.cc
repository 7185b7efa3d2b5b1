// explain HOST:PORT picture.jpg: prints class and probability; writes picture.jpg.f32 and picture.jpg.png.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

#include "sidelight/v1/attribution.grpc.pb.h"

namespace pb = sidelight::v1;

constexpr int kMaxMessageBytes = 64 << 20;  // by default, clients receive 4 MiB

int main(int, char** arguments) {
  const std::string address = arguments[1], path = arguments[2];
  std::ifstream file(path, std::ios::binary);
  pb::AttributeRequest request;
  request.mutable_images()->mutable_encoded()->add_files(
      std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()));
  request.mutable_target()->mutable_predicted();
  request.mutable_method()->mutable_gradient();
  request.mutable_output()->mutable_rendered();  // a PNG image of the map over the picture

  grpc::ChannelArguments options;
  options.SetMaxReceiveMessageSize(kMaxMessageBytes);
  auto stub = pb::AttributionService::NewStub(
      grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), options));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(1));
  pb::AttributeResponse answer;
  const grpc::Status status = stub->Attribute(&context, request, &answer);
  if (!status.ok()) {  // its code is one of docs/reference/errors.md
    std::fprintf(stderr, "%d %s\n", status.error_code(), status.error_message().c_str());
    return 1;
  }
  const pb::Attribution& result = answer.result();
  for (const pb::ExampleFailure& failure : result.failures()) {
    std::fprintf(stderr, "%s: %d %s\n", path.c_str(), failure.code(), failure.message().c_str());
    return 1;
  }
  const pb::Example& example = result.examples(0);
  std::printf("%s %s %.4f\n", path.c_str(), example.prediction().label().c_str(), example.prediction().probability());
  std::ofstream(path + ".f32", std::ios::binary) << result.maps().data();  // shape() float32, little-endian
  std::ofstream(path + ".png", std::ios::binary) << example.rendered(0);
}
