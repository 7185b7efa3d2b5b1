"""A bare gRPC echo, to measure gRPC's own cost in Python: `python -m benchmarks.speed.transport.echo ADDRESS`."""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc

METHOD = "/bare/Echo"
LIMIT_BYTES = 64 * 1024 * 1024
OPTIONS = [("grpc.max_receive_message_length", LIMIT_BYTES), ("grpc.max_send_message_length", LIMIT_BYTES)]
ROOT = Path(__file__).parent.parent.parent.parent


@contextlib.contextmanager
def echo() -> Iterator[str]:
    """Run the echo in a process of its own; yield its address."""
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        address = f"unix:{folder}/socket"
        command = [sys.executable, "-m", "benchmarks.speed.transport.echo", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == "serving\n"
                yield address
            finally:
                process.terminate()


async def _serve(address: str) -> None:
    """Return every message."""

    async def echo(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    bare = grpc.aio.server(options=OPTIONS)
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    bare.add_insecure_port(address)
    await bare.start()
    print("serving", flush=True)
    await bare.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
