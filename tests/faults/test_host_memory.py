"""If host memory runs out, only the request that needs it fails, with RESOURCE_EXHAUSTED, and no thread ends.

The cases run one after another in a process of their own, whose address space is limited during each.
"""

import subprocess
import sys
import textwrap

import pytest

from support import TESTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's address space")

BEGIN = """
import asyncio, contextlib, ctypes, gc, resource, sys
ctypes.CDLL("libc.so.6").mallopt(-3, 65536)  # every large block is mapped, and unmapped: none is kept for the next
import numpy as np, torch
from sidelight.v1 import attribution_pb2 as pb, tensor_pb2
from sidelight_server import Engine, ModelSpec, Request, Settings
from sidelight_server.errors import InvalidArgument, ResourceExhausted, SidelightError
from sidelight_server.rpc.request_handler import RequestHandler
from sidelight_server.wire.codec import Received, decode_request
from sidelight_server.telemetry.call_record import CallRecord

@contextlib.contextmanager
def scarce(more_bytes):
    if engine.devices[0].is_responsive:
        engine.devices[0].worker.call(lambda: None).result(30)  # it has let go of its last chunk
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 10)

    def forward(self, x):
        return self.inner(x.mean(dim=(2, 3)))

def new_engine():
    return Engine([ModelSpec(Mean(), name="mean")], Settings(device="cpu", threads=1))

SIZE = (3, 1024, 1024)  # 12 MiB of float32, and 4 MiB of a map
small = Request(np.ones((2, 3, 8, 8), np.float32))
large = Request(np.ones((6, *SIZE), np.float32))
"""

CASES = {
    "neither a chunk nor the maps of the failures": """
        with engine:
            assert not asyncio.run(engine.attribute(large)).failures  # which starts all threads
            with scarce(3 << 20):
                try:
                    asyncio.run(engine.attribute(large))
                except MemoryError:  # of the answer: its maps
                    pass
                else:
                    raise AssertionError("there was memory enough")
            assert engine.devices[0].is_responsive
            assert not asyncio.run(engine.attribute(small)).failures
            assert not asyncio.run(engine.attribute(large)).failures
        """,
    "a chunk, but not the answer": """
        with engine:
            assert not asyncio.run(engine.attribute(small)).failures
            images = np.ones((40, *SIZE), np.float32)
            model = engine.model("")
            model.chunk_rows = 1
            with scarce(60 << 20):
                try:
                    asyncio.run(engine.attribute(Request(images)))
                except MemoryError:
                    pass
                else:
                    raise AssertionError("there was memory enough")
            assert engine.devices[0].is_responsive
            assert not asyncio.run(engine.attribute(small)).failures
        """,
    "the batch, as its caller sees it": """
        message = pb.AttributeRequest()
        message.id = "a"
        message.method.gradient.SetInParent()
        message.target.predicted.SetInParent()
        message.images.tensor.shape[:] = large.images.shape
        message.images.tensor.dtype = tensor_pb2.DATA_TYPE_FLOAT32
        raw = message.SerializeToString()

        async def explained():
            handler = RequestHandler(engine)
            inquiry = await handler.validate(
                message, n_bytes=len(raw), data=memoryview(large.images).cast("B"),
                call_record=CallRecord("Attribute", 0.0),
            )
            await handler.explain(inquiry)
            with scarce(3 << 20):
                try:
                    await handler.explain(inquiry)
                except ResourceExhausted as error:
                    assert "no memory for the batch" in error.message
                else:
                    raise AssertionError("there was memory enough")
            await handler.explain(inquiry)

        with engine:
            asyncio.run(explained())
        """,
    "the message": """
        message = pb.AttributeRequest()
        message.images.encoded.files.append(bytes(64 << 20))
        raw = message.SerializeToString()
        del message
        with scarce(8 << 20):
            refused = decode_request(raw)
        assert type(refused.error) is ResourceExhausted, refused
        assert "no memory" in refused.error.message
        assert isinstance(decode_request(raw), Received)
        assert type(decode_request(bytes(3)).error) is InvalidArgument
        """,
}


def test_a_lack_of_host_memory_is_reported_and_the_device_continues() -> None:
    begun = (f"print({name!r})\nengine = new_engine()\n" + textwrap.dedent(case) for name, case in CASES.items())
    ran = subprocess.run(
        [sys.executable, "-c", BEGIN + "".join(begun)],
        capture_output=True, text=True, timeout=100, cwd=TESTS, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.splitlines() == list(CASES)
    assert "device_thread_ended" not in ran.stderr
