"""A Python function served by Triton over gRPC: the input gradient, in one forward and one backward pass.

Run in `.venv-triton`: torch, numpy below 2, nvidia-pytriton and with it tritonclient.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .driver import Answer, Image, drive_calls
from .rival import arguments, free_port

MODEL_NAME = "saliency"
SIZE = 224


def serve(folder: Path, *, port: int, threads: int, workers: int, batch: int, delay_us: int) -> None:
    """Serve until killed."""
    from pytriton.decorators import batch as batched
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    from .saliency import InputOnly, Pixels, load

    def instance() -> Callable[..., dict[str, np.ndarray]]:
        rival = InputOnly(load(folder, threads=threads))

        @batched
        def infer(pixels: Pixels) -> dict[str, np.ndarray]:
            answer = rival.explain(pixels)
            return {
                "map": answer.maps,
                "predicted": answer.predicted[:, None],
                "probability": answer.probabilities[:, None],
            }

        return infer

    settings = TritonConfig(
        grpc_address="127.0.0.1",
        grpc_port=port,
        http_address="127.0.0.1",
        http_port=free_port(),
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=settings, workspace=str(folder / f"triton-{port}")) as triton:
        triton.bind(
            model_name=MODEL_NAME,
            infer_func=[instance() for _ in range(workers)],
            inputs=[Tensor(name="pixels", dtype=np.uint8, shape=(SIZE, SIZE, 3))],
            outputs=[
                Tensor(name="map", dtype=np.float32, shape=(SIZE, SIZE)),
                Tensor(name="predicted", dtype=np.int32, shape=(1,)),
                Tensor(name="probability", dtype=np.float32, shape=(1,)),
            ],
            config=ModelConfig(max_batch_size=batch, batcher=DynamicBatcher(max_queue_delay_microseconds=delay_us)),
        )
        triton.serve()


def drive_grpc(args: argparse.Namespace) -> None:
    """Run the driver with Triton's own client."""
    from tritonclient.grpc import InferenceServerClient, InferInput

    @contextlib.contextmanager
    def connect() -> Iterator[Callable[[Image], Answer]]:
        with contextlib.closing(InferenceServerClient(f"127.0.0.1:{args.port}")) as client:

            def ask(image: Image) -> Answer:
                pixels = InferInput("pixels", [1, *image.shape], "UINT8")
                pixels.set_data_from_numpy(image[None])
                answer = client.infer(MODEL_NAME, [pixels])
                return Answer(answer.as_numpy("map")[0], int(answer.as_numpy("predicted")[0, 0]))

            yield ask

    drive_calls(args.folder, connect)


def main() -> None:
    args = arguments(__doc__)
    if args.role == "drive":
        return drive_grpc(args)
    serve(
        args.folder,
        port=args.port,
        threads=args.threads,
        workers=args.workers,
        batch=args.batch,
        delay_us=args.delay_us,
    )


if __name__ == "__main__":
    main()
