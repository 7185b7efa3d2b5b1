"""A gRPC server with one method, for comparisons: in a process of its own."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import grpc

METHOD = "/bare/Stream"
LIMIT_BYTES = 64 * 1024 * 1024
OPTIONS = [("grpc.max_receive_message_length", LIMIT_BYTES), ("grpc.max_send_message_length", LIMIT_BYTES)]
Stream = Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext[bytes, bytes]], Awaitable[None]]
ROOT = Path(__file__).parent.parent.parent.parent


@contextlib.contextmanager
def process(module: str) -> Iterator[str]:
    """Run a module of this package, which serves with `serve`, in a process of its own; yield its address."""
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        address = f"unix:{folder}/socket"
        command = [sys.executable, "-m", f"{__package__}.{module}", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
            try:
                assert running.stdout
                assert running.stdout.readline() == "serving\n"
                yield address
            finally:
                running.terminate()


async def serve(address: str, stream: Stream, options: Sequence[tuple[str, int]]) -> None:
    """Serve one method, `METHOD`, and print "serving" once it can be called."""
    server = grpc.aio.server(options=options)
    handlers = {"Stream": grpc.stream_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    server.add_insecure_port(address)
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()
