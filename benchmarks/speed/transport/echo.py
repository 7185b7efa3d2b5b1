"""A bare gRPC echo, to measure gRPC's own cost in Python: `python -m benchmarks.speed.transport.echo ADDRESS`."""

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc

from .bare_server import OPTIONS, serve


async def _echo(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    while (message := await context.read()) is not grpc.aio.EOF:
        await context.write(message)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], _echo, OPTIONS))
