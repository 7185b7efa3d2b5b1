"""MLServer, KServe's runtime for Python, with Captum, by gRPC. Run in `.venv-mlserver`: torch, numpy, captum, mlserver.

Pixels and maps are strings of bytes: of any other tensor, MLServer makes a Python object of each element.
"""

import argparse
import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from mlserver.utils import install_uvloop_event_loop

from .driver import Answer, Image, drive_calls
from .http_body import body_of, pixels_of, read_bytes
from .rival import arguments, free_port
from .saliency import Captum, load

MODEL_NAME = "resnet18"
MAX_BATCH_TIME_S = 0.02  # how long the first request of a batch waits for others


class Explain(MLModel):
    """A runtime: MLServer puts requests together, and gives each worker a copy."""

    async def load(self) -> bool:
        extra = self.settings.parameters.extra
        self.captum = Captum(load(Path(extra["folder"]), threads=extra["threads"]))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        answer = self.captum.explain(np.stack([pixels_of(each) for each in payload.inputs[0].data.root]))
        bodies = [body_of(map_, int(class_), float(p)) for map_, class_, p in zip(*answer, strict=True)]
        output = ResponseOutput(name="answer", datatype="BYTES", shape=[len(bodies), 1], data=bodies)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def serve(folder: Path, *, port: int, threads: int, workers: int, batch: int) -> None:
    """Serve until killed."""
    settings = Settings(
        host="127.0.0.1",
        grpc_port=port,
        http_port=free_port(),
        metrics_endpoint=None,
        parallel_workers=workers,
        debug=False,
    )
    model = ModelSettings(
        name=MODEL_NAME,
        implementation=f"{__spec__.name}.{Explain.__name__}",
        max_batch_size=batch,
        max_batch_time=MAX_BATCH_TIME_S,
        parameters=ModelParameters(extra={"folder": str(folder), "threads": threads}),
    )
    await MLServer(settings).start([model])


def drive_grpc(args: argparse.Namespace) -> None:
    """Run the driver with MLServer's own stubs."""

    @contextlib.contextmanager
    def connect() -> Iterator[Callable[[Image], Answer]]:
        with grpc.insecure_channel(f"127.0.0.1:{args.port}") as channel:
            stub = GRPCInferenceServiceStub(channel)

            def ask(image: Image) -> Answer:
                contents = pb.InferTensorContents(bytes_contents=[image.tobytes()])
                pixels = pb.ModelInferRequest.InferInputTensor(
                    name="pixels", datatype="BYTES", shape=[1, 1], contents=contents
                )
                answer = stub.ModelInfer(pb.ModelInferRequest(model_name=MODEL_NAME, inputs=[pixels]))
                return read_bytes(answer.outputs[0].contents.bytes_contents[0])

            yield ask

    drive_calls(args.folder, connect)


def main() -> None:
    args = arguments(__doc__)
    if args.role == "drive":
        return drive_grpc(args)
    install_uvloop_event_loop()
    asyncio.run(serve(args.folder, port=args.port, threads=args.threads, workers=args.workers, batch=args.batch))


if __name__ == "__main__":
    main()
