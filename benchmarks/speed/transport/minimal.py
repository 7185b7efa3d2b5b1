"""A minimal server: what gRPC, the codec, one hand-off and torch cost in Python, without anything that a service needs.

It parses each message, hashes its examples, runs up to 32 messages as one batch on a thread of its own, and encodes the
gradients. It checks no field and has no permits, no fairness, no deadlines and no provenance. Its windows are those of
`sidelight-server`. `python -m benchmarks.speed.transport.minimal ADDRESS` serves at an address.
"""

import asyncio
import hashlib
import queue
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future

import grpc
import numpy as np
import torch
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server import Settings
from sidelight_server.app.channel_options import channel_options
from torch import Tensor

from .bare_server import serve

MAX_MESSAGES = 32  # of one batch

Work = tuple[Tensor, "Future[Tensor]"]


class Explainer:
    """A thread that explains whatever waits as one batch, for a model that costs nothing."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Work] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, images: Tensor) -> "Future[Tensor]":
        """Return the gradients of images, [n, C, H, W], when they are computed."""
        future: Future[Tensor] = Future()
        self._waiting.put((images, future))
        return future

    def _run(self) -> None:
        torch.set_num_threads(1)
        while True:
            batch = [self._waiting.get()]
            while len(batch) < MAX_MESSAGES and not self._waiting.empty():
                batch.append(self._waiting.get())
            try:
                gradients = _gradients(torch.cat([images for images, _ in batch]))
            except ValueError as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            parts = gradients.split([len(images) for images, _ in batch])
            for (_, future), part in zip(batch, parts, strict=True):
                future.set_result(part)


def _gradients(images: Tensor) -> Tensor:
    images = images.requires_grad_()
    probabilities = images.flatten(1)[:, :10].softmax(-1)
    (gradients,) = torch.autograd.grad(probabilities.amax(dim=-1).sum(), images)
    if not bool(gradients.isfinite().all()):
        raise ValueError("a gradient is not finite")
    return gradients


async def _answered(explainer: Explainer, message: bytes) -> bytes:
    request = pb.AttributeStreamRequest.FromString(message).attribute
    tensor = request.images.tensor
    images = np.frombuffer(tensor.data, np.float32).reshape(tuple(tensor.shape))
    computing = explainer.submit(torch.from_numpy(images.copy()))
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    gradients = await asyncio.wrap_future(computing)
    maps = tensor_pb2.Tensor(
        dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=gradients.shape, data=gradients.numpy().tobytes()
    )
    result = pb.Attribution(maps=maps, provenance=pb.Provenance(example_digests=digests))
    return pb.AttributeStreamResponse(id=request.id, result=result).SerializeToString()


async def _serve(address: str) -> None:
    explainer = Explainer()

    async def stream(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        writing = asyncio.Lock()

        async def answer(message: bytes) -> None:
            response = await _answered(explainer, message)
            async with writing:  # gRPC takes one message at a time
                await context.write(response)

        async with asyncio.TaskGroup() as answering:
            while (message := await context.read()) is not grpc.aio.EOF:
                answering.create_task(answer(message))

    await serve(address, stream, channel_options(Settings()))


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
