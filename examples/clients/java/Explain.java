// Explain HOST:PORT picture.jpg: prints class and probability; writes picture.jpg.f32 and picture.jpg.png.

import com.google.protobuf.ByteString;
import io.grpc.ManagedChannelBuilder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Locale;
import java.util.concurrent.TimeUnit;
import sidelight.v1.*;

public class Explain {
  private static final int MAX_MESSAGE_BYTES = 64 << 20; // by default, clients receive 4 MiB

  public static void main(String[] arguments) throws Exception {
    String address = arguments[0], path = arguments[1];
    var request =
        AttributeRequest.newBuilder()
            .setImages(Images.newBuilder().setEncoded(
                EncodedImages.newBuilder().addFiles(ByteString.copyFrom(Files.readAllBytes(Path.of(path))))))
            .setTarget(Target.newBuilder().setPredicted(PredictedTarget.getDefaultInstance()))
            .setMethod(Method.newBuilder().setGradient(GradientMethod.getDefaultInstance()))
            .setOutput(Output.newBuilder().setRendered(Rendering.getDefaultInstance())) // a PNG image: map over picture
            .build();
    var channel =
        ManagedChannelBuilder.forTarget(address).usePlaintext().maxInboundMessageSize(MAX_MESSAGE_BYTES).build();
    try {
      // Throws io.grpc.StatusRuntimeException; its code is one of docs/reference/errors.md.
      var stub = AttributionServiceGrpc.newBlockingStub(channel).withDeadlineAfter(1, TimeUnit.MINUTES);
      var result = stub.attribute(request).getResult();
      for (var failure : result.getFailuresList()) {
        System.err.println(path + ": " + failure.getCode() + " " + failure.getMessage());
        System.exit(1);
      }
      var example = result.getExamples(0);
      var prediction = example.getPrediction();
      System.out.printf(Locale.ROOT, "%s %s %.4f%n", path, prediction.getLabel(), prediction.getProbability());
      Files.write(Path.of(path + ".f32"), result.getMaps().getData().toByteArray()); // float32, little-endian
      Files.write(Path.of(path + ".png"), example.getRendered(0).toByteArray());
    } finally {
      channel.shutdown();
    }
  }
}
