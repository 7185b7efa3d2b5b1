"""Invalid requests of the Open Inference Protocol, and its streams."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.interop.open_inference import inference_pb2 as oip

from support.messages.attribution import floats
from support.messages.inference import infer_request, stream, tensor, wanted
from support.messages.inference_requests import PIXELS, files_request, good, infer, packed
from support.models import Linear
from support.servers.running import TIMEOUT_S, Running, serving

Status = grpc.StatusCode


# Invalid requests


def with_input(request: oip.ModelInferRequest, **fields: object) -> oip.ModelInferRequest:
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(request.inputs[0], name)[:]
            getattr(request.inputs[0], name).extend(value)
        else:
            setattr(request.inputs[0], name, value)
    return request


BAD: dict[str, tuple[Callable[[], oip.ModelInferRequest], Status, str]] = {
    "model": (lambda: good(model_name="linaer"), Status.NOT_FOUND, 'did you mean "linear"'),
    "version": (lambda: good(model_version="7"), Status.NOT_FOUND, 'model_version: "7" is not served; version 1 is'),
    "output": (lambda: good(outputs=["map"]), Status.NOT_FOUND, 'outputs: there is no "map"; did you mean "maps"'),
    "output twice": (lambda: good(outputs=["maps", "maps"]), Status.INVALID_ARGUMENT, "requested twice"),
    "classification": (
        lambda: good(outputs=[wanted("probabilities", classification=3)]),
        Status.INVALID_ARGUMENT,
        "outputs.probabilities.parameters.classification",
    ),
    "no input": (lambda: good(inputs=[]), Status.INVALID_ARGUMENT, "inputs: got none, expected one input"),
    "input name": (lambda: with_input(good(), name="image"), Status.INVALID_ARGUMENT, "expected one input"),
    "two inputs": (lambda: good(inputs=[tensor(floats(1))] * 2), Status.INVALID_ARGUMENT, "expected one input"),
    "datatype": (lambda: with_input(good(), datatype="INT64"), Status.INVALID_ARGUMENT, "inputs.images.datatype: got"),
    "shape": (lambda: with_input(good(), shape=[4]), Status.INVALID_ARGUMENT, r"images\.shape: \[4\]"),
    "negative shape": (lambda: with_input(good(), shape=[-1, 3, 4, 5]), Status.INVALID_ARGUMENT, "no negative"),
    "byte count": (lambda: good(raw_input_contents=[b"1234"]), Status.INVALID_ARGUMENT, "needs 240 bytes, data has 4"),
    "no bytes": (lambda: good(raw_input_contents=[]), Status.INVALID_ARGUMENT, "data has 0"),
    "two raw": (lambda: good(raw_input_contents=[b"", b""]), Status.INVALID_ARGUMENT, "raw_input_contents: 2 entries"),
    "typed and raw": (
        lambda: good(inputs=[_with_contents(tensor(floats(1)))]),
        Status.INVALID_ARGUMENT,
        "contents: set beside",
    ),
    "a number above 255": (
        lambda: _typed_pixels(b"\xac\x02"),
        Status.INVALID_ARGUMENT,
        "uint_contents: 300, expected 0 to 255",
    ),
    "a number cut short": (lambda: _typed_pixels(b"\xff"), Status.INVALID_ARGUMENT, "truncated"),
    "parameter": (
        lambda: good(parameters={"sidelight_methods": "x"}),
        Status.INVALID_ARGUMENT,
        'did you mean "sidelight_method"',
    ),
    "method": (
        lambda: good(parameters={"sidelight_method": "gradent"}),
        Status.INVALID_ARGUMENT,
        r"parameters\.sidelight_method: got 'gradent'.*did you mean 'gradient'",
    ),
    "method of another type": (
        lambda: good(parameters={"sidelight_method": 3}),
        Status.INVALID_ARGUMENT,
        "sidelight_method: got int64_param",
    ),
    "score": (
        lambda: good(parameters={"sidelight_score": "p"}),
        Status.INVALID_ARGUMENT,
        r"parameters\.sidelight_score",
    ),
    "timeout": (lambda: good(parameters={"timeout": -1}), Status.INVALID_ARGUMENT, "timeout: .*expected a positive"),
    "target": (
        lambda: good(parameters={"sidelight_target": "9" * 30}),
        Status.INVALID_ARGUMENT,
        "parameters.sidelight_target",
    ),
    "class": (lambda: good(parameters={"sidelight_target": 10}), Status.INVALID_ARGUMENT, "10"),
    "id": (lambda: good(id="x" * 200), Status.INVALID_ARGUMENT, "id: 200 bytes"),
    "region": (
        lambda: good(inputs=[tensor(floats(1), shared_memory_region="a")], raw_input_contents=[]),
        Status.NOT_FOUND,
        'region "a" is not registered',
    ),
    "region of an output": (
        lambda: good(outputs=[wanted("score", shared_memory_region="a")]),
        Status.NOT_FOUND,
        'region "a"',
    ),
    "files that are too few": (
        lambda: files_request(2, raw_input_contents=[packed(b"a")]),
        Status.INVALID_ARGUMENT,
        "hold 1 elements",
    ),
    "files that are too many": (
        lambda: files_request(1, raw_input_contents=[packed(b"a", b"b")]),
        Status.INVALID_ARGUMENT,
        "expected the 5",
    ),
    "a file that is cut short": (
        lambda: files_request(1, raw_input_contents=[b"\x09\0\0\0a"]),
        Status.INVALID_ARGUMENT,
        "but 1 are left",
    ),
    "many files": (lambda: files_request(10**9), Status.INVALID_ARGUMENT, "at most 4096"),
}


def _with_contents(image: oip.ModelInferRequest.InferInputTensor) -> oip.ModelInferRequest.InferInputTensor:
    image.contents.fp32_contents.append(b"")
    return image


def _typed_pixels(numbers: bytes) -> oip.ModelInferRequest:
    request = infer_request(PIXELS[:1, :1, :1], model_name="small", raw_input_contents=[])
    request.inputs[0].contents.uint_contents.append(numbers)
    return request


@pytest.mark.parametrize(("make", "code", "pattern"), BAD.values(), ids=BAD)
def test_an_invalid_request_is_refused_with_what_is_wrong(
    make: Callable[[], oip.ModelInferRequest], code: Status, pattern: str, server: Running
) -> None:
    with pytest.raises(grpc.RpcError, match=pattern) as caught:
        infer(server, make())
    assert caught.value.code() is code


@pytest.mark.parametrize(("make", "code", "pattern"), BAD.values(), ids=BAD)
def test_on_a_stream_an_error_is_text_and_the_stream_goes_on(
    make: Callable[[], oip.ModelInferRequest], code: Status, pattern: str, server: Running
) -> None:
    request = make()
    request.id = request.id or "bad"
    wrong, right = stream(server.channel, [request, good(id="good")])
    assert wrong.error_message.startswith(f"{code.name}: ")
    assert wrong.infer_response.id == request.id
    assert (right.error_message, right.infer_response.id) == ("", "good")


# Streams


def test_answers_keep_the_order_of_their_requests(server: Running) -> None:
    long = {"sidelight_method": "integrated_gradients(steps=200)"}
    requests = [good(id=str(n), parameters=long if n % 3 == 0 else {}, outputs=["predicted"]) for n in range(9)]
    requests.insert(4, good(id="bad", parameters={"sidelight_score": "none"}))
    answers = list(stream(server.channel, requests))
    assert [each.infer_response.id for each in answers] == [each.id for each in requests]


def test_requests_of_a_stream_need_no_ids(server: Running) -> None:
    answers = list(stream(server.channel, [good(), good(id="x"), good(id="x")]))
    assert [each.infer_response.id for each in answers] == ["", "x", "x"]
    assert not any(each.error_message for each in answers)


def test_a_message_that_cannot_be_decoded_does_not_end_a_stream(server: Running) -> None:
    method = server.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        response_deserializer=oip.ModelStreamInferResponse.FromString,
    )
    wrong, right = method(iter([b"\xff\xff", good().SerializeToString()]), timeout=TIMEOUT_S)
    assert wrong.error_message.startswith("INVALID_ARGUMENT: message: 2 bytes")
    assert not right.error_message


def test_a_stream_at_its_maximum_age_reports_it(tmp_path: Path) -> None:
    engine = Engine([ModelSpec(Linear(), name="linear")], Settings(device="cpu", threads=1, max_stream_age_s=0.2))
    with serving(engine, f"unix:{tmp_path}/socket") as server:
        with pytest.raises(grpc.RpcError, match="start another") as caught:
            list(stream(server.channel, itertools.chain([good()], _wait_forever())))
        assert caught.value.code() is Status.UNAVAILABLE


def _wait_forever() -> Iterator[oip.ModelInferRequest]:
    threading.Event().wait(TIMEOUT_S)
    yield from ()
