"""The memory of a message is free once its call has ended: nothing is left to the garbage collector or to gRPC."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.domain import Request

from benchmarks.support.bombs import many_scans
from benchmarks.support.http2_caller import ATTRIBUTE, STREAM, Caller, framed
from support.messages.attribution import DEADLINE_EXCEEDED, INVALID_ARGUMENT, ask, floats
from support.messages.conversation import Conversation
from support.models import Linear
from support.servers.running import TIMEOUT_S, Running, gated, running, serving
from support.waiting import until

LATE_BYTES = 4_800_000


def n_held(server: Running) -> int:
    return server.counts().permits


def n_messages() -> int:
    return sum(type(each) in (pb.AttributeRequest, Request) for each in gc.get_objects())


@contextlib.contextmanager
def check_no_reference_cycles(server: Running) -> Iterator[None]:
    """Check that messages and requests are gone without the garbage collector, which 62 MiB a message outrun."""
    gc.collect()
    gc.disable()
    try:
        before = n_messages()
        yield
        # gRPC keeps the call that came last until another comes.
        until(server, lambda: n_messages() <= before + 2)
    finally:
        gc.enable()


def test_a_refused_call_leaves_no_message_for_the_garbage_collector(tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, device=device, max_in_flight_bytes=100_000) as server:
        wrong = ask(floats(1), model="no such model")
        large = ask(np.zeros((40, 3, 40, 40), np.float32))
        for message in (wrong, large):
            with pytest.raises(grpc.RpcError):
                server.stub.Attribute(message, timeout=TIMEOUT_S)
        with check_no_reference_cycles(server):
            for message in 10 * (wrong, large):
                with pytest.raises(grpc.RpcError):
                    server.stub.Attribute(message, timeout=TIMEOUT_S)


@pytest.mark.parametrize("is_stream", [False, True], ids=["unary", "stream"])
def test_a_cancelled_call_leaves_no_message_for_the_garbage_collector(
    tmp_path: Path, device: str, is_stream: bool
) -> None:
    with gated(tmp_path, device=device) as (_, server):
        cancel_one(server, ask(floats(1), id="one"), is_stream=is_stream)
        with check_no_reference_cycles(server):
            for _ in range(10):
                cancel_one(server, ask(floats(1), id="one"), is_stream=is_stream)


@pytest.mark.parametrize("is_stream", [False, True], ids=["unary", "stream"])
def test_a_call_cancelled_while_its_files_are_decoded_leaves_no_message_for_the_garbage_collector(
    tmp_path: Path, device: str, is_stream: bool
) -> None:
    with serving(taking_files(device), f"unix:{tmp_path}/socket") as server:
        slow = files(many_scans(6000, 3000), many_scans(6000, 3000))
        cancel_one(server, slow, is_stream=is_stream)
        with check_no_reference_cycles(server):
            for _ in range(5):
                cancel_one(server, slow, is_stream=is_stream)


@pytest.mark.parametrize("is_stream", [False, True], ids=["unary", "stream"])
def test_a_batch_that_fails_in_preparation_leaves_no_message_for_the_garbage_collector(
    tmp_path: Path, device: str, is_stream: bool
) -> None:
    with serving(taking_files(device), f"unix:{tmp_path}/socket") as server, Conversation(server.channel) as talk:
        wrong = files(b"", target=pb.Target(index=99))

        def fail_one() -> None:
            if is_stream:
                talk.send(pb.AttributeStreamRequest(attribute=wrong))
                assert talk.receive().failure.code == INVALID_ARGUMENT
            else:
                with pytest.raises(grpc.RpcError, match="99"):
                    server.stub.Attribute(wrong, timeout=TIMEOUT_S)

        fail_one()
        with check_no_reference_cycles(server):
            for _ in range(10):
                fail_one()


def taking_files(device: str) -> Engine:
    return Engine([ModelSpec(Linear(), input_size=(3, 4, 5))], Settings(device=device))


def files(*contents: bytes, **fields: object) -> pb.AttributeRequest:
    images = tensor_pb2.Images(encoded=tensor_pb2.EncodedImages(files=contents))
    return ask(floats(1), id="one", images=images, **fields)


def cancel_one(server: Running, message: pb.AttributeRequest, *, is_stream: bool) -> None:
    """Cancel a call while the server works on it."""
    if is_stream:
        call = server.stub.AttributeStream(iter([pb.AttributeStreamRequest(attribute=message)]))
    else:
        call = server.stub.Attribute.future(message)
    until(server, lambda: n_held(server) == 1)
    call.cancel()
    until(server, lambda: n_held(server) == 0)


class Mallinfo(ctypes.Structure):
    """The result of glibc's mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def in_use_bytes() -> int:
    """Return how many bytes this process has allocated from the C library and not freed."""
    try:
        mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        pytest.skip("another C library than glibc 2.33 or later")
    mallinfo.restype = Mallinfo
    counts = mallinfo()
    return int(counts.uordblks + counts.hblkhd)


@contextlib.contextmanager
def freeing(server: Running) -> Iterator[None]:
    """Check that of the messages of `LATE_BYTES` that are sent meanwhile at most one is still allocated."""
    gc.collect()
    before = in_use_bytes()
    yield
    until(server, lambda: n_held(server) == 0)
    # gRPC keeps the call that came last until another comes.
    server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
    until(server, lambda: in_use_bytes() < before + 2 * LATE_BYTES)


def test_a_message_that_arrives_after_its_stream_was_ended_is_freed(tmp_path: Path, device: str) -> None:
    """The stream still answers the batch before it. Load shedding ends streams at such a time."""
    first = pb.AttributeStreamRequest(attribute=ask(floats(1), id="first")).SerializeToString()
    with gated(tmp_path, device=device) as (gate, server), Caller(f"unix:{tmp_path}/socket") as caller:

        async def end_waiting() -> int:
            return server.server.calls.end_waiting(0.0)

        def send_late() -> None:
            gate.shut()
            call = caller.begin(STREAM)
            caller.send(call, framed(first))
            until(server, lambda: n_held(server) == 1)
            until(server, lambda: server.run(end_waiting()) == 1)
            assert caller.send(call, framed(bytes(LATE_BYTES))) == LATE_BYTES + 5
            gate.open()
            assert caller.result(call).status == 0

        send_late()
        with freeing(server):
            for _ in range(8):
                send_late()


def test_a_unary_message_that_does_not_arrive_in_time_is_freed(tmp_path: Path, device: str) -> None:
    settings = {"device": device, "max_arrival_s": 0.2}
    with running(Linear(), tmp_path, **settings) as server, Caller(f"unix:{tmp_path}/socket") as caller:
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)

        def send_part() -> None:
            call = caller.begin(ATTRIBUTE)
            caller.send(call, framed(bytes(LATE_BYTES - 1), n_bytes=LATE_BYTES))
            assert caller.result(call).status == DEADLINE_EXCEEDED

        send_part()
        with freeing(server):
            for _ in range(8):
                send_part()
