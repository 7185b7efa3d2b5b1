"""Faults: after any input and any failure of a model, a good request is answered and nothing is leaked."""

import contextlib
import functools
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.interop.open_inference import inference_pb2 as oip
from sidelight_server.interop.open_inference.service import DESCRIPTOR
from torch import Tensor, nn

from support.messages.attribution import DOCUMENTED, ask, attribute, code_of, floats, linear_maps, maps_of
from support.messages.inference import call, stream
from support.messages.strategies import INFER_REQUESTS, REQUESTS, anything
from support.models import Linear
from support.profiles import n_examples
from support.servers.processes import FACTORIES, LOCAL, started
from support.servers.running import TIMEOUT_S, Counts, Running, serving
from support.tolerances import CLOSED_FORM

N_CONNECTIONS = 200
INTERNAL, RESOURCE_EXHAUSTED, FAILED_PRECONDITION = 13, 8, 9
FUZZ = settings(
    max_examples=n_examples(100), suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
# Statuses of gRPC itself: for a unary call with two messages or none, and for a method that does not exist.
OF_GRPC = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED}
RAISES, NOT_A_NUMBER, OTHER_SHAPE, NO_MEMORY, NO_MEMORY_OF_TORCH, EXITS, NO_TENSOR = map(float, range(1001, 1008))


class Moody(nn.Module):
    """The linear model, which fails on inputs that begin with certain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear()

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        first = x.detach().flatten(1)[:, 0]
        marks = set(first.tolist())
        if RAISES in marks:
            raise RuntimeError("in a bad mood")
        if NO_MEMORY in marks:
            raise MemoryError
        if NO_MEMORY_OF_TORCH in marks:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        if EXITS in marks:
            raise SystemExit(3)
        if NO_TENSOR in marks:
            return None  # type: ignore[return-value]
        if OTHER_SHAPE in marks:
            return out[:, None, None, None]
        return out * torch.where(first == NOT_A_NUMBER, torch.nan, 1.0)[:, None]


def moody(**settings: object) -> contextlib.AbstractContextManager[Running]:
    return serving(
        Engine([ModelSpec(Moody(), name="moody")], Settings(device="cpu", threads=1, **settings)), "127.0.0.1:0"
    )


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with moody() as server:
        assert_answers(server)
        yield server


def assert_answers(server: Running, *, seed: int = 0) -> None:
    """Check the answer to a good request, over the open connection and over a new one."""
    images = floats(2, seed=seed)
    with grpc.insecure_channel(server.server.addresses[0]) as fresh:
        for channel in (server.channel, fresh):
            answer = attribution_pb2_grpc.AttributionServiceStub(channel).Attribute(ask(images), timeout=TIMEOUT_S)
            # float32 against the closed form in float64.
            np.testing.assert_allclose(maps_of(answer), linear_maps(images), **CLOSED_FORM)


@contextlib.contextmanager
def leaving_nothing(server: Running) -> Iterator[None]:
    """Check that a good request is answered afterwards, and that all counts come back to where they were."""
    assert_answers(server)
    before = Counts.of(server)
    yield
    assert_answers(server)
    until_s = time.monotonic() + TIMEOUT_S
    while (after := Counts.of(server)).exceeds(before) and time.monotonic() < until_s:
        time.sleep(0.02)  # nothing signals that the kernel and gRPC have closed a descriptor
    assert not after.exceeds(before), (before, after)


# Messages


def outcome(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


DOCUMENTED_CODES = {code for code in grpc.StatusCode if code.value[0] in DOCUMENTED}


@FUZZ
@given(request=REQUESTS)
def test_any_request_is_answered_or_refused_as_documented(shared: Running, request: pb.AttributeRequest) -> None:
    code = outcome(lambda: shared.stub.Attribute(request, timeout=TIMEOUT_S))
    assert code in DOCUMENTED_CODES | {grpc.StatusCode.OK}


@FUZZ
@given(request=INFER_REQUESTS)
def test_any_inference_is_answered_or_refused_as_documented(shared: Running, request: oip.ModelInferRequest) -> None:
    code = outcome(lambda: call(shared.channel, "ModelInfer", request))
    assert code in DOCUMENTED_CODES | {grpc.StatusCode.OK}


@FUZZ
@given(requests=st.lists(INFER_REQUESTS, min_size=1, max_size=3))
def test_any_inferences_on_a_stream_are_all_answered(shared: Running, requests: list[oip.ModelInferRequest]) -> None:
    answers = list(stream(shared.channel, requests))
    assert [each.infer_response.id for each in answers] == [each.id for each in requests]
    documented = {f"{code.name}: " for code in DOCUMENTED_CODES}
    for error in filter(None, (each.error_message for each in answers)):
        assert error[: error.index(" ") + 1] in documented, error


OF_INFERENCE = sorted(each.name for each in DESCRIPTOR.methods if each.name not in ("ModelInfer", "ModelStreamInfer"))


@pytest.mark.parametrize("name", OF_INFERENCE)
def test_any_message_to_another_inference_method_is_answered_or_refused(shared: Running, name: str) -> None:
    @FUZZ
    @given(request=anything(DESCRIPTOR.methods_by_name[name].input_type))
    def check(request: Message) -> None:
        request = getattr(oip, f"{name}Request").FromString(request.SerializeToString())
        code = outcome(lambda: call(shared.channel, name, request))
        assert code in DOCUMENTED_CODES | {grpc.StatusCode.OK}

    check()


UNARY: dict[str, tuple[object, type[Message]]] = {
    "GetServerInfo": (attribution_pb2_grpc.AttributionServiceStub, pb.GetServerInfoRequest),
    "ListModels": (model_pb2_grpc.ModelServiceStub, model_pb2.ListModelsRequest),
    "GetModel": (model_pb2_grpc.ModelServiceStub, model_pb2.GetModelRequest),
    "ReloadModel": (model_pb2_grpc.ModelServiceStub, model_pb2.ReloadModelRequest),
    "Check": (health_pb2_grpc.HealthStub, health_pb2.HealthCheckRequest),
}


@pytest.mark.parametrize("name", UNARY)
def test_any_message_to_another_method_is_answered_or_refused(shared: Running, name: str) -> None:
    stub, kind = UNARY[name]
    allowed = DOCUMENTED_CODES | {grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED}

    @FUZZ
    @given(request=anything(kind.DESCRIPTOR))
    def check(request: Message) -> None:
        # Made by one's own stub class: health's descriptors have messages of their own.
        request = kind.FromString(request.SerializeToString())
        assert outcome(lambda: getattr(stub(shared.channel), name)(request, timeout=TIMEOUT_S)) in allowed

    check()


METHODS = [
    "/sidelight.v1.AttributionService/Attribute",
    "/sidelight.v1.AttributionService/AttributeStream",
    "/sidelight.v1.AttributionService/GetServerInfo",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/inference.GRPCInferenceService/SystemSharedMemoryRegister",
    "/sidelight.v1.ModelService/GetModel",
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/sidelight.v1.AttributionService/Nothing",
    "/x/" + "y" * 500,
]
GOOD = ask(floats(1), id="good").SerializeToString()
BODIES = st.binary(max_size=200) | st.tuples(
    st.just(GOOD), st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=5)
).map(lambda drawn: functools.reduce(_with_byte, drawn[1], drawn[0]))


def _with_byte(content: bytes, change: tuple[int, int]) -> bytes:
    place, byte = change
    return content[:place] + bytes([byte]) + content[place + 1 :]


@FUZZ
@given(method=st.sampled_from(METHODS), bodies=st.lists(BODIES, min_size=1, max_size=3))
@example(method=METHODS[0], bodies=[b""])
@example(method=METHODS[0], bodies=[b"\x0a\xff\xff\xff\xff\x7f"])  # a field of 32 GiB
@example(method=METHODS[1], bodies=[b"\x0b" * 5000])  # groups in groups
def test_any_bytes_as_a_message_are_answered_or_refused(shared: Running, method: str, bodies: list[bytes]) -> None:
    call = shared.channel.stream_stream(method, request_serializer=None, response_deserializer=None)
    code = outcome(lambda: list(call(iter(bodies), timeout=TIMEOUT_S)))
    assert code in DOCUMENTED_CODES | OF_GRPC | {grpc.StatusCode.OK}
    assert health(shared) == health_pb2.HealthCheckResponse.SERVING


def health(server: Running) -> int:
    return health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status


def test_after_all_these_messages_the_shared_server_answers_and_holds_nothing(shared: Running) -> None:
    assert_answers(shared)
    shared.until_all_permits_are_back()


# Connections


def at(server: Running) -> tuple[str, int]:
    host, _, port = server.server.addresses[0].rpartition(":")
    return host, int(port)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS_FRAME = b"\0\0\0\x04\0\0\0\0\0"


def junk(seed: int) -> bytes:
    return random.Random(seed).randbytes(2000)


TALK: dict[str, bytes] = {
    "nothing": b"",
    "random bytes": junk(1),
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a POST of HTTP/1": b"POST /sidelight.v1.AttributionService/Attribute HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}",
    "the hello of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + junk(2)[:512],
    "half of a preface": PREFACE[:10],
    "a preface, then random frames": PREFACE + SETTINGS_FRAME + junk(3),
    "a frame that says 16 MiB": PREFACE + SETTINGS_FRAME + b"\xff\xff\xff\0\0\0\0\0\x01",
    "headers that never end": PREFACE + SETTINGS_FRAME + b"\0\0\x04\x01\0\0\0\0\x01" + b"\x82\x86\x84\x41",
    "many pings": PREFACE + SETTINGS_FRAME + (b"\0\0\x08\x06\0\0\0\0\0" + b"12345678") * 2000,
    "streams that are reset": PREFACE + SETTINGS_FRAME + b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08" * 1000,
}


@pytest.mark.parametrize("sent", TALK.values(), ids=TALK)
def test_other_protocols_at_the_port_do_not_affect_other_callers(sent: bytes) -> None:
    with moody() as server, leaving_nothing(server), contextlib.ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(socket.create_connection(at(server), timeout=TIMEOUT_S))
            with contextlib.suppress(OSError):  # the server may have hung up meanwhile
                connection.sendall(sent)
        assert_answers(server)


@settings(max_examples=n_examples(30))
@given(sent=st.binary(max_size=500), with_preface=st.booleans())
def test_random_bytes_at_the_port_do_not_affect_other_callers(shared: Running, sent: bytes, with_preface: bool) -> None:
    with socket.create_connection(at(shared), timeout=TIMEOUT_S) as connection, contextlib.suppress(OSError):
        connection.sendall(PREFACE + SETTINGS_FRAME + sent if with_preface else sent)
    assert health(shared) == health_pb2.HealthCheckResponse.SERVING


def test_callers_that_send_single_bytes_delay_no_other_callers() -> None:
    with moody() as server, leaving_nothing(server), contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(at(server), timeout=TIMEOUT_S)) for _ in range(20)]
        for place, byte in enumerate(PREFACE + SETTINGS_FRAME):
            for connection in slow:
                connection.sendall(bytes([byte]))
            if place % 8 == 0:
                assert_answers(server, seed=place)


def test_many_connections_at_once_are_all_answered() -> None:
    images = floats(1)
    with moody() as server, leaving_nothing(server):
        own = [("grpc.use_local_subchannel_pool", 1)]  # or they would share a connection
        channels = [grpc.insecure_channel(server.server.addresses[0], options=own) for _ in range(N_CONNECTIONS)]
        stubs = [attribution_pb2_grpc.AttributionServiceStub(channel) for channel in channels]
        calls = [stub.Attribute.future(ask(images), timeout=3 * TIMEOUT_S) for stub in stubs]
        for call in calls:
            np.testing.assert_allclose(maps_of(call.result()), linear_maps(images), **CLOSED_FORM)
        for channel in channels:
            channel.close()


# Calls


def test_headers_that_are_too_large_are_refused() -> None:
    with moody() as server, leaving_nothing(server):
        for metadata in ([("x-large", "y" * 100_000)], [(f"x-{n}", "y" * 500) for n in range(200)]):
            with pytest.raises(grpc.RpcError) as caught:
                server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S, metadata=metadata)
            assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


def test_a_deadline_that_has_passed_is_kept() -> None:
    with moody() as server, leaving_nothing(server):
        for _ in range(20):
            with pytest.raises(grpc.RpcError) as caught:
                server.stub.Attribute(ask(floats(1)), timeout=-1)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            # gRPC counts milliseconds, within which an answer may come.
            now = outcome(lambda: server.stub.Attribute(ask(floats(1)), timeout=0))
            assert now in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.OK)


JUMPS = """
import itertools, time

def jumping():
    before, jumps = time.time, itertools.cycle([1e6, -1e6, 0.0])
    time.time = lambda: before() + next(jumps)
    return spec()
"""


def test_a_wall_clock_that_is_set_all_the_time_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES + JUMPS)
    flags = ["--stuck-s", "2", "--max-stream-age-s", "60"]
    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    model = ["--model", "python:factories:jumping", "--device", "cpu"]
    with started(tmp_path, *model, *LOCAL, *flags) as (process, (address,)):
        with grpc.insecure_channel(address) as channel:
            stub = attribution_pb2_grpc.AttributionServiceStub(channel)
            for _ in range(20):
                (answer,) = stub.AttributeStream(iter([attribute("a", pixels)]), timeout=TIMEOUT_S)
                assert answer.WhichOneof("outcome") == "result"
            status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            assert status.status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


# Models


FAULTS = {
    "raises": (RAISES, INTERNAL),
    "gives what is no number": (NOT_A_NUMBER, INTERNAL),
    "gives another shape": (OTHER_SHAPE, FAILED_PRECONDITION),
    "gives no tensor": (NO_TENSOR, FAILED_PRECONDITION),
    "has no memory": (NO_MEMORY, RESOURCE_EXHAUSTED),
    "has no memory, as torch says it": (NO_MEMORY_OF_TORCH, RESOURCE_EXHAUSTED),
    "exits": (EXITS, INTERNAL),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mark", "code"), FAULTS.values(), ids=FAULTS)
def test_a_model_that_fails_on_an_example_fails_that_alone(mark: float, code: int) -> None:
    images = floats(5)
    images[2, 0, 0, 0] = mark
    good = [0, 1, 3, 4]
    with moody() as server, leaving_nothing(server):
        for _ in range(3):
            answer = server.stub.Attribute(ask(images), timeout=TIMEOUT_S)
            assert [(each.example, each.code) for each in answer.result.failures] == [(2, code)]
            np.testing.assert_allclose(maps_of(answer)[good], linear_maps(images[good]), **CLOSED_FORM)
            assert np.isnan(maps_of(answer)[2]).all()
        (answer,) = server.stub.AttributeStream(iter([attribute("a", images[2:3])]), timeout=TIMEOUT_S)
        if answer.WhichOneof("outcome") == "failure":
            assert code_of(answer) == code
        else:
            assert [each.code for each in answer.result.failures] == [code]
