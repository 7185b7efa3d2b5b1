"""Many messages on streams, one in ten cancelled and one in twenty invalid: the server's memory does not grow.

`python -m benchmarks.soak.messages --messages 100000`.
"""

import argparse
import asyncio
import collections
import sys

import grpc
import numpy as np
import psutil
import sidelight
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc

from ..support.held import growth, settled
from ..support.measure import Line, report, server
from ..support.nets import SMALL
from ..support.requests import request

N_MESSAGES, N_STREAMS, WINDOW = 100_000, 4, 16
WARM_UP_SHARE = 5  # the first fifth of them


def run(n_messages: int = N_MESSAGES) -> list[Line]:
    """Send the messages over four streams; compare the server after the first fifth with the server at the end."""
    with server("python:benchmarks.support.nets:trimmed_cnn", "--threads", "1") as (address, pid):
        process = psutil.Process(pid)
        asyncio.run(_send(address, n_messages // WARM_UP_SHARE))
        before = settled(process)
        counts = asyncio.run(_send(address, n_messages))
        after = settled(process, before)
    summary = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    during = f"over {n_messages:,} messages, 10 % of them cancelled, 5 % bad"
    return [growth(during, before, after, detail=summary)]


async def _send(address: str, n_messages: int) -> collections.Counter[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        counts = await asyncio.gather(*(_stream(stub, n_messages // N_STREAMS) for _ in range(N_STREAMS)))
    return sum(counts, collections.Counter())


async def _stream(stub: attribution_pb2_grpc.AttributionServiceStub, n_messages: int) -> collections.Counter[str]:
    images = np.random.default_rng(0).integers(0, 256, (4, SMALL, SMALL, 3), np.uint8)
    asked = [request(images[: 1 + n], sidelight.Gradient()) for n in range(4)]
    bad = request(images, sidelight.Gradient())
    bad.images.tensor.shape[0] = 5
    counts: collections.Counter[str] = collections.Counter()
    call, room = stub.AttributeStream(), asyncio.Semaphore(WINDOW)

    async def send() -> None:
        for n in range(n_messages):
            await room.acquire()
            message = bad if n % 20 == 0 else asked[n % 4]
            message.id = str(n)
            await call.write(pb.AttributeStreamRequest(attribute=message))
            if n % 10 == 5:
                await call.write(pb.AttributeStreamRequest(cancel=pb.CancelRequest(id=str(n))))
        await call.done_writing()

    sending = asyncio.create_task(send())
    async for response in call:
        room.release()
        is_failure = response.WhichOneof("outcome") == "failure"
        counts[grpc_name(response.failure.code) if is_failure else "answered"] += 1
    await sending
    assert sum(counts.values()) == n_messages
    assert counts["invalid argument"] == len(range(0, n_messages, 20))
    return counts


def grpc_name(code: int) -> str:
    """Return a status as text."""
    return next(each.value[1] for each in grpc.StatusCode if each.value[0] == code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=N_MESSAGES)
    sys.exit(report(run(parser.parse_args().messages)))
