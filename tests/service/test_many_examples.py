"""Batches of many examples: no work per example runs on the event loop, and each example counts in the permit."""

import asyncio
import gc
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.engine.request_cost import BYTES_OF_EXAMPLE
from sidelight_server.wire.requests import MAX_EXAMPLES

from support.models import Linear
from support.servers.running import Running, serving
from support.tolerances import NEIGHBORS

FEW, MANY = 300, 700  # both are above MANY_EXAMPLES
SHAPE = (3, 4, 5)
TIMEOUT_S = 60.0


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4)).save(buffer, "png")
    return buffer.getvalue()


def batch(kind: str, n: int) -> pb.AttributeRequest:
    """Return a request of n examples, with a target and a served class for each."""
    classes = [pb.ClassChoice(index=place % 10) for place in range(n)]
    request = pb.AttributeRequest(
        id="many",
        target=pb.Target(per_example=pb.PerExampleTarget(classes=classes)),
        method=pb.Method(gradient=pb.GradientMethod()),
        served_classes=pb.ServedPredictions(classes=classes),
    )
    if kind in ("files", "no files"):
        request.images.encoded.files.extend([png() if kind == "files" else b"no file"] * n)
        return request
    is_pixels = kind == "pixels"
    array = np.ones((n, 4, 5, 3), np.uint8) if is_pixels else np.ones((n, *SHAPE), np.float32)
    request.images.tensor.CopyFrom(
        tensor_pb2.Tensor(
            dtype=tensor_pb2.DATA_TYPE_UINT8 if is_pixels else tensor_pb2.DATA_TYPE_FLOAT32,
            shape=array.shape,
            data=array.tobytes(),
        )
    )
    return request


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    spec = ModelSpec(Linear(shape=SHAPE), input_size=SHAPE)
    engine = Engine([spec], Settings(device="cpu", threads=1, max_chunk_rows=1024))
    with serving(engine, f"unix:{tmp_path_factory.mktemp('many')}/socket") as running:
        yield running


def calls_on_the_loop(server: Running, request: pb.AttributeRequest, *, by_stream: bool) -> int:
    """Return the largest number of functions that one callback of the event loop calls while a request is answered."""
    n_calls = most = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal n_calls, most
        n_calls += event in ("call", "c_call")
        most = max(most, n_calls)
        if frame.f_code is asyncio.Handle._run.__code__:
            n_calls = 0

    async def profile(function: object) -> None:
        sys.setprofile(function)

    gc.collect()
    gc.disable()  # the loop also runs callbacks that other tests left
    server.run(profile(count))
    try:
        if by_stream:
            messages = iter([pb.AttributeStreamRequest(attribute=request)])
            (answer,) = server.stub.AttributeStream(messages, timeout=TIMEOUT_S)
        else:
            answer = server.stub.Attribute(request, timeout=TIMEOUT_S)
    finally:
        server.run(profile(None))
        gc.enable()
    assert len(answer.result.examples) == len(request.served_classes.classes)
    return most


@pytest.mark.parametrize("by_stream", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("kind", ["files", "no files", "pixels", "floats"])
def test_what_the_event_loop_does_in_one_go_does_not_grow_with_a_batchs_examples(
    kind: str, by_stream: bool, server: Running
) -> None:
    calls_on_the_loop(server, batch(kind, FEW), by_stream=by_stream)  # what is done the first time only
    few, many = (calls_on_the_loop(server, batch(kind, n), by_stream=by_stream) for n in (FEW, MANY))
    assert many < few + 256


def test_a_batch_of_more_examples_is_refused_and_reported(server: Running) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        server.stub.Attribute(batch("floats", MAX_EXAMPLES + 1), timeout=TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"expected at most {MAX_EXAMPLES}" in refused.value.details()


def test_each_example_is_charged_beside_its_bytes(tmp_path: Path) -> None:
    """Few bytes, but many examples: the permit counts the memory that each example takes."""
    room = 300 * BYTES_OF_EXAMPLE
    engine = Engine(
        [ModelSpec(Linear(shape=SHAPE), input_size=SHAPE)],
        Settings(device="cpu", threads=1, max_in_flight_bytes=room),
    )
    with serving(engine, f"unix:{tmp_path}/socket") as server:
        assert len(batch("floats", 300).SerializeToString()) < room / 10
        with pytest.raises(grpc.RpcError) as refused:
            server.stub.Attribute(batch("floats", 300), timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_in_flight_bytes" in refused.value.details()
        assert not server.stub.Attribute(batch("floats", 200), timeout=TIMEOUT_S).result.failures
        server.until_all_permits_are_back()


def test_the_client_sends_more_examples_than_a_batch_may_have_in_parts() -> None:
    images = np.random.default_rng(0).normal(size=(MAX_EXAMPLES + 904, *SHAPE)).astype(np.float32)
    spec = ModelSpec(Linear(shape=SHAPE), input_size=SHAPE)
    with (
        sidelight_server.serve(spec, device="cpu", max_chunk_rows=1024) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        assert client.info().limits.max_batch_examples == MAX_EXAMPLES
        whole = client.attribute(images, target=3)
        (streamed,) = client.stream([images], target=3)
        last = client.attribute(images[-1:], target=3)
    assert len(whole) == len(streamed) == len(images)
    assert whole.maps.shape == streamed.maps.shape == (len(images), *SHAPE[1:])
    for answer in (whole, streamed):
        np.testing.assert_allclose(answer.maps[-1:], last.maps, rtol=0, atol=NEIGHBORS * np.abs(last.maps).max())
        assert not np.isnan(answer.maps).any()
        assert len(answer.provenance.example_digests) == len(images)


STARTED = """
import gc
from sidelight_server import ConfigurationError, __main__; from sidelight_server.app import process

before = len(gc.get_objects())

def load(settings):
    assert len(gc.get_objects()) < before / 10
    raise ConfigurationError("it is looked through no more")

process.load = load
assert __main__.main() == 2
"""


def test_a_server_of_its_own_process_does_not_look_through_torch_for_garbage() -> None:
    """A full collection, which many examples bring about, stops every thread of the process."""
    command = [sys.executable, "-c", STARTED, "--model", "hf:none"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "it is looked through no more" in ran.stderr
