"""The client against a real server: connecting, calls, answers and errors."""

import copy
import dataclasses
import inspect
import itertools
import json
import logging
import math
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from PIL import Image
from sidelight import exceptions
from sidelight.methods.parsing import method_text
from sidelight.v1 import attribution_pb2 as pb
from torch import nn

from support.models import LABELS, N_CLASSES, small_cnn
from support.models.gate import Gate, Gated
from support.tolerances import NEIGHBORS

ABSENT = "unix:/nonexistent/socket"


@pytest.fixture
def gated(gate: Gate, device: str) -> Iterator[str]:
    """The address of a server whose model waits at the gate."""
    spec = sidelight_server.ModelSpec(Gated(gate), input_size=(3, 32, 32))
    with sidelight_server.serve(spec, device=device, max_in_flight=1, drain_s=0) as address:
        yield address
        gate.open()


@pytest.fixture
def waiting() -> Iterator[tuple[threading.Event, list[str]]]:
    """An event that is set when a client logs, and the log messages."""
    came, lines = threading.Event(), []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            came.set()

    handler = Handler()
    logging.getLogger("sidelight").addHandler(handler)
    yield came, lines
    logging.getLogger("sidelight").removeHandler(handler)


def assert_same(maps: np.ndarray, expected: np.ndarray) -> None:
    assert maps.shape == expected.shape
    np.testing.assert_allclose(maps, expected, rtol=0, atol=NEIGHBORS * np.abs(expected).max(initial=0))


def reference(
    module: nn.Module, x: torch.Tensor, classes: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities, [N, K], and the signed gradients of the classes' probabilities, [N, C, H, W]."""
    module, x = copy.deepcopy(module).eval(), x.clone().requires_grad_()
    probabilities = module(x).softmax(dim=1)
    explained = probabilities.argmax(dim=1) if classes is None else torch.tensor(classes)
    (gradients,) = torch.autograd.grad(probabilities.gather(1, explained[:, None]).sum(), x)
    return probabilities.detach(), gradients


def test_connecting_returns_at_once_without_a_server() -> None:
    with sidelight.connect(ABSENT, connect_timeout=3600) as client:
        assert client.address == ABSENT


def test_a_call_waits_for_a_server_that_comes_later_and_says_so_in_the_log(
    spec: sidelight_server.ModelSpec,
    device: str,
    floats: torch.Tensor,
    tmp_path: Path,
    waiting: tuple[threading.Event, list[str]],
) -> None:
    came, lines = waiting
    address = f"unix:{tmp_path}/socket"
    with sidelight.connect(address, connect_timeout=60) as client, ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(client.attribute, floats), pool.submit(lambda: list(client.stream([floats])))]
        assert came.wait(30)
        assert not any(call.done() for call in calls)
        with sidelight_server.serve(spec, device=device, listen=(address,)):
            assert calls[0].result().maps.shape == (5, 32, 32)
            assert calls[1].result()[0].maps.shape == (5, 32, 32)
    assert f"waiting for a server at {address}" in lines


def test_a_client_finds_its_server_again_after_a_restart(
    spec: sidelight_server.ModelSpec, device: str, floats: torch.Tensor, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/socket"
    with sidelight.connect(address, connect_timeout=30) as client:
        for _ in range(3):
            with sidelight_server.serve(spec, device=device, listen=(address,)):
                assert client.attribute(floats).maps.shape == (5, 32, 32)


def test_a_server_on_a_port_is_reached_by_host_and_port(
    spec: sidelight_server.ModelSpec, device: str, floats: torch.Tensor
) -> None:
    with sidelight_server.serve(spec, device=device, listen=("127.0.0.1:0",)) as address:
        assert address.startswith("127.0.0.1:")
        with sidelight.connect(address, connect_timeout=10) as client:
            assert len(client.attribute(floats)) == 5


CALLS: dict[str, Callable[[sidelight.Client], object]] = {
    "attribute": lambda client: client.attribute(np.zeros((3, 32, 32), np.float32)),
    "stream": lambda client: list(client.stream([np.zeros((3, 32, 32), np.float32)])),
    "info": lambda client: client.info(),
    "model": lambda client: client.model(),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@each_call
def test_without_a_server_a_call_ends_at_connect_timeout_and_names_the_address(
    call: Callable[[sidelight.Client], object],
) -> None:
    with sidelight.connect(ABSENT, connect_timeout=0.3) as client, pytest.raises(sidelight.Unavailable) as caught:
        call(client)
    message = "no server answers at unix:/nonexistent/socket after 0.3 s; is sidelight-server running there?"
    assert caught.value.message == message


def test_a_port_where_nobody_listens_is_named() -> None:
    with socket.socket() as taken:  # bound, so nobody else has it, but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            sidelight.connect(address, connect_timeout=0.2) as client,
            pytest.raises(sidelight.Unavailable, match=address),
        ):
            client.info()


@pytest.mark.parametrize("address", ["", 50051, b"unix:/run/x"], ids=repr)
def test_what_is_no_address_is_refused(address: object) -> None:
    with pytest.raises(
        sidelight.InvalidArgument, match=r'address: got .*, expected "host:port", "dns:host:port" or "unix:/path"'
    ):
        sidelight.connect(address)


@each_call
@pytest.mark.parametrize("used", [True, False], ids=["after-a-call", "before-any-call"])
def test_a_closed_client_is_unavailable_and_closing_again_is_nothing(
    address: str, call: Callable[[sidelight.Client], object], used: bool
) -> None:
    client = sidelight.connect(address, connect_timeout=10)
    if used:
        client.info()
    client.close()
    with pytest.raises(sidelight.Unavailable, match="the client is closed"):
        call(client)
    client.close()


def test_closing_ends_a_call_that_waits_for_a_server(waiting: tuple[threading.Event, list[str]]) -> None:
    client = sidelight.connect(ABSENT, connect_timeout=60)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.info)
        assert waiting[0].wait(30)
        client.close()
        with pytest.raises(sidelight.Unavailable, match="the client is closed"):
            call.result(30)


def test_closing_ends_a_running_call(gate: Gate, gated: str, floats: torch.Tensor) -> None:
    client = sidelight.connect(gated, connect_timeout=10)
    gate.shut()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.attribute, floats)
        assert gate.reached.wait(30)
        client.close()
        with pytest.raises(sidelight.exceptions.Cancelled):
            call.result(30)


def test_closing_one_client_leaves_another_of_the_same_server_alone(address: str, floats: torch.Tensor) -> None:
    with sidelight.connect(address, connect_timeout=10) as stays:
        with sidelight.connect(address, connect_timeout=10) as goes:
            goes.attribute(floats)
            stays.attribute(floats)
        assert len(stays.attribute(floats)) == 5


def test_threads_share_a_client_and_get_what_serial_calls_get(client: sidelight.Client, floats: torch.Tensor) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    questions = [
        {"images": floats},
        {"images": floats[:2], "target": [3, "ibis"], "score": "logit"},
        {"images": image, "target": 4},  # the very same PIL image in all threads
        {"images": [image, rng.integers(0, 256, (33, 44, 3), np.uint8)], "channels": "none"},
        {"images": rng.integers(0, 256, (32, 32, 3), np.uint8), "method": sidelight.Gradient(times_input=True)},
    ]
    expected = [client.attribute(**question) for question in questions]

    def calls(thread: int) -> list[tuple[int, sidelight.Attribution]]:
        places = [(thread + call) % len(questions) for call in range(25)]
        return [(place, client.attribute(**questions[place])) for place in places]

    with ThreadPoolExecutor(8) as pool:
        answers = list(itertools.chain.from_iterable(pool.map(calls, range(8))))
    assert len(answers) == 200
    for place, answer in answers:
        assert_same(answer.maps, expected[place].maps)
        assert [each.index for each in answer.targets] == [each.index for each in expected[place].targets]


def test_info_reports_version_limits_methods_and_models(client: sidelight.Client) -> None:
    info = client.info()
    assert info.version == sidelight.__version__
    assert info.limits == sidelight.results.Limits(
        max_message_bytes=64 * 2**20,
        max_image_pixels=50_000_000,
        max_in_flight=256,
        max_in_flight_bytes=2**30,
        max_stream_in_flight=32,
        max_example_rows=10_000,
        max_batch_examples=4096,
        max_stream_age_s=3600.0,
        max_rendered_pixels=2**20,
    )
    assert info.shared_memory is None
    assert set(info.methods) == {field.name for field in pb.Method.DESCRIPTOR.fields}
    (model,) = info.models
    assert (model.name, model.version, model.input_size, model.class_count) == ("small", 1, (3, 32, 32), N_CLASSES)
    assert model.scores == ("probability", "logit", "log_probability", "margin")
    assert model.labels is model.layers is None  # only `model` returns those
    assert not model.reproducible
    (chosen,) = (each for each in model.warmup if each.chosen)
    assert (chosen.configuration, chosen.rows) == ("float32", model.chunk_rows)
    assert all(each.rows_per_second > 0 for each in model.warmup)


@pytest.mark.parametrize("name", [None, "", "small"], ids=repr)
def test_a_model_is_reported_with_its_labels_and_layers(client: sidelight.Client, name: str | None) -> None:
    model = client.model(name)
    assert model.labels == LABELS
    assert model.layers == tuple(map(str, range(7)))  # up to where the features are flattened
    assert dataclasses.replace(model, labels=None, layers=None) == client.info().models[0]


@pytest.mark.parametrize("ask", ["model", "attribute", "stream"])
def test_an_unknown_model_is_not_found_and_the_near_one_named(
    client: sidelight.Client, floats: torch.Tensor, ask: str
) -> None:
    calls = {
        "model": lambda: client.model("smal"),
        "attribute": lambda: client.attribute(floats, model="smal"),
        "stream": lambda: list(client.stream([floats], model="smal")),
    }
    with pytest.raises(sidelight.NotFound, match='model: there is no "smal"; did you mean "small"'):
        calls[ask]()


STATUSES = {
    1: sidelight.exceptions.Cancelled,
    2: sidelight.exceptions.Unknown,
    3: sidelight.InvalidArgument,
    4: sidelight.DeadlineExceeded,
    5: sidelight.NotFound,
    6: sidelight.exceptions.AlreadyExists,
    7: sidelight.exceptions.PermissionDenied,
    8: sidelight.ResourceExhausted,
    9: sidelight.FailedPrecondition,
    10: sidelight.exceptions.Aborted,
    11: sidelight.exceptions.OutOfRange,
    12: sidelight.exceptions.Unimplemented,
    13: sidelight.exceptions.Internal,
    14: sidelight.Unavailable,
    15: sidelight.exceptions.DataLoss,
    16: sidelight.exceptions.Unauthenticated,
}


class Trailer(NamedTuple):
    key: str
    value: str


class FailedCall(grpc.RpcError):
    """A failed call, as gRPC raises it."""

    def __init__(self, status: grpc.StatusCode, details: str = "", trailers: tuple[Trailer, ...] | None = None) -> None:
        self.code = lambda: status
        self.details = lambda: details
        self.trailing_metadata = lambda: trailers


@pytest.mark.parametrize("status", [each for each in grpc.StatusCode if each.value[0]], ids=lambda each: each.name)
def test_every_status_has_an_exception_of_its_own(status: grpc.StatusCode) -> None:
    code = status.value[0]
    kind = STATUSES[code]
    assert kind.__name__ == "".join(word.capitalize() for word in status.name.split("_"))
    assert kind.code == code
    for error in (
        exceptions.from_code(code, "why", retry_delay_s=1.5),
        exceptions.from_rpc(
            FailedCall(status, "why", (Trailer("other", "x"), Trailer("retry-after-ms", "1500"))), max_message_bytes=1
        ),
    ):
        assert type(error) is kind
        assert isinstance(error, sidelight.SidelightError)
        assert (str(error), error.code, error.retry_delay_s) == (error.message, code, 1.5)
        assert error.message.startswith("why")  # UNIMPLEMENTED has a question behind it


def test_a_status_without_words_or_delay_is_reported_by_its_name() -> None:
    error = exceptions.from_rpc(FailedCall(grpc.StatusCode.DATA_LOSS), max_message_bytes=1)
    assert (str(error), error.retry_delay_s) == ("DATA_LOSS", None)


def test_a_code_that_nobody_knows_is_unknown() -> None:
    assert type(exceptions.from_code(99, "why")) is sidelight.exceptions.Unknown


def test_the_tree_of_errors_is_the_one_that_the_module_shows() -> None:
    errors = [each for _, each in inspect.getmembers(exceptions, inspect.isclass) if issubclass(each, Exception)]
    errors = [each for each in errors if not each.__name__.startswith("_")]
    assert {each.__name__ for each in errors} == {each.__name__ for each in STATUSES.values()} | {
        "SidelightError",
        "MessageTooLarge",
        "ModelChanged",
        "PartialFailure",
        "ServerDied",
        "UnreadableFile",
    }
    assert all(each.__name__ in exceptions.__doc__ for each in errors)
    assert sidelight.exceptions.MessageTooLarge.__base__ is sidelight.ResourceExhausted


def test_a_full_server_says_when_to_ask_again(gate: Gate, gated: str, floats: torch.Tensor) -> None:
    gate.shut()
    with sidelight.connect(gated, connect_timeout=10, retry=False) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.attribute, floats)
        assert gate.reached.wait(30)
        with pytest.raises(sidelight.ResourceExhausted, match="max_in_flight 1") as caught:
            client.attribute(floats)
        gate.open()
        assert len(first.result()) == 5
    assert type(caught.value) is sidelight.ResourceExhausted
    assert caught.value.retry_delay_s == 0.25


def test_a_call_that_a_full_server_refused_is_made_again_within_its_time(
    gate: Gate, gated: str, floats: torch.Tensor
) -> None:
    gate.shut()
    with sidelight.connect(gated, connect_timeout=10) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.attribute, floats)
        assert gate.reached.wait(30)
        with pytest.raises(sidelight.ResourceExhausted):
            client.attribute(floats, timeout=0.6)  # two delays, and no third
        second = pool.submit(client.attribute, floats, timeout=60)
        threading.Timer(0.3, gate.open).start()
        assert len(first.result()) == len(second.result()) == 5


def test_a_batch_over_the_clients_limit_goes_in_parts_and_an_example_over_it_is_refused(
    client: sidelight.Client, address: str, floats: torch.Tensor
) -> None:
    whole = client.attribute(floats)
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=50_000) as narrow:
        answer = narrow.attribute(floats, target=[0, 1, 2, 3, 4])
        assert_same(answer.maps, client.attribute(floats, target=[0, 1, 2, 3, 4]).maps)
        assert_same(narrow.attribute(floats).maps, whole.maps)
        with pytest.raises(sidelight.InvalidArgument, match="target: 4 classes for 5 examples"):
            narrow.attribute(floats, target=[0, 1, 2, 3])
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=10_000) as narrow:
        with pytest.raises(sidelight.exceptions.MessageTooLarge) as caught:
            narrow.attribute(floats[:1])
        assert "the request takes 12" in caught.value.message
        assert "max_message_bytes of this client's connect() is 10000" in caught.value.message


def test_a_batch_over_the_servers_limit_goes_in_parts_and_an_example_over_it_is_refused(
    spec: sidelight_server.ModelSpec, client: sidelight.Client, device: str, floats: torch.Tensor
) -> None:
    for limit in (50_000, 10_000):
        with (
            sidelight_server.serve(spec, device=device, max_message_bytes=limit) as address,
            sidelight.connect(address, connect_timeout=10) as narrow,
        ):
            if limit == 50_000:
                assert_same(narrow.attribute(floats).maps, client.attribute(floats).maps)
                continue
            with pytest.raises(sidelight.exceptions.MessageTooLarge) as caught:
                narrow.attribute(floats[:1])
    assert "max_message_bytes of the server is 10000" in caught.value.message
    assert "--max-message-bytes" in caught.value.message


def test_an_answer_over_the_clients_limit_comes_in_parts(address: str, tmp_path: Path) -> None:
    path = tmp_path / "white.png"  # a small file: five of them make a small request, and 20 kB of maps
    Image.new("RGB", (32, 32), "white").save(path)
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=10_000) as client:
        assert client.attribute([path] * 5).maps.shape == (5, 32, 32)


def test_an_answer_in_parts_is_replayed(address: str, floats: torch.Tensor, tmp_path: Path) -> None:
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=50_000) as narrow:
        narrow.attribute(floats, target=[4, 3, 2, 1, 0]).save(tmp_path / "whole")
        assert sidelight.replay(narrow, tmp_path / "whole", floats).kept


def test_an_answer_is_as_large_as_its_maps_are_many_and_wide(address: str, tmp_path: Path) -> None:
    path = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(path)
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=10_000) as client:
        with pytest.raises(sidelight.exceptions.MessageTooLarge, match="the answer's maps take 12288 bytes"):
            client.attribute(path, target=sidelight.TopK(3))
        assert client.attribute(path, target=sidelight.TopK(3), map_dtype="float16").maps.shape == (1, 3, 32, 32)
        assert len(client.attribute([path] * 5, map_dtype="uint8")) == 5


def test_an_answer_over_the_servers_limit_names_side_limit_and_setting(
    spec: sidelight_server.ModelSpec, device: str, tmp_path: Path
) -> None:
    path = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(path)
    with (
        sidelight_server.serve(spec, device=device, max_message_bytes=10_000) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        with pytest.raises(sidelight.ResourceExhausted, match="the server's max_message_bytes is 10000") as caught:
            client.attribute([path] * 5)
        assert len(client.attribute(path)) == 1
    assert caught.value.message.startswith("the answer takes 20480 bytes")


def test_a_request_that_the_server_found_too_large_names_the_servers_flag() -> None:
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    error = exceptions.from_rpc(
        FailedCall(status, "SERVER: Received message larger than max (9 vs. 5)"), max_message_bytes=1
    )
    assert type(error) is sidelight.exceptions.MessageTooLarge
    assert "--max-message-bytes of sidelight-server" in error.message
    assert "(9 vs. 5)" in error.message


def test_a_call_whose_time_is_over_ends(gate: Gate, gated: str, floats: torch.Tensor) -> None:
    with sidelight.connect(gated, connect_timeout=10) as client:
        client.info()
        gate.shut()
        with pytest.raises(sidelight.DeadlineExceeded):
            client.attribute(floats, timeout=0.2)
        gate.open()


@pytest.mark.parametrize("timeout", [math.inf, 1e12, 1e9, 3600, 1e6 + 0.123456789], ids=repr)
def test_a_call_may_take_for_ever(client: sidelight.Client, floats: torch.Tensor, timeout: float) -> None:
    assert len(client.attribute(floats, timeout=timeout)) == 5
    assert len(list(client.stream([floats], timeout=timeout))) == 1


@pytest.mark.parametrize("timeout", [0, -1, math.nan, -math.inf], ids=repr)
@pytest.mark.parametrize("way", ["attribute", "stream"])
def test_a_time_that_is_not_positive_is_refused(
    client: sidelight.Client, floats: torch.Tensor, timeout: float, way: str
) -> None:
    with pytest.raises(sidelight.InvalidArgument, match=r"timeout: got .* s, expected a positive time"):
        client.attribute(floats, timeout=timeout) if way == "attribute" else list(
            client.stream([floats], timeout=timeout)
        )


TYPOS = {
    "score": (
        {"score": "probabilty"},
        "score: got 'probabilty', expected one of probability, logit, log_probability, margin",
    ),
    "channels": (
        {"channels": "max"},
        "channels: got 'max', expected one of max_abs, sum, mean_abs, l2, none",
    ),
    "map_dtype": ({"map_dtype": "bfloat16"}, "map_dtype: got 'bfloat16', expected one of float32, float16, uint8"),
    "method-option": ({"method": sidelight.SmoothGrad(samples=1.5)}, "method.samples: got 1.5, expected a whole"),
    "on_error": ({"on_error": "ignore"}, "on_error: got 'ignore', expected one of raise, return"),
    "method-name": ({"method": "gradient"}, "method: got 'gradient', expected a method, such as sidelight.Gradient()"),
    "method-class": ({"method": sidelight.Gradient}, "expected a method, such as sidelight.Gradient()"),
    "target-type": ({"target": 1.5}, "target: got float, expected None, a class index, a label or a list of them"),
    "target-dict": ({"target": {}}, "target: got dict, expected None"),
    "target-element": ({"target": [1, None, 2, 3, 4]}, "target: got None in the list, expected class indices or"),
    "target-float-array": ({"target": np.ones(5)}, "in the list, expected class indices or labels"),
    "target-two-dimensions": ({"target": np.ones((5, 1), int)}, "in the list, expected class indices or labels"),
    "target-beyond-64-bits": ({"target": 2**63}, "target: got 9223372036854775808, expected a 64-bit number"),
}


@pytest.mark.parametrize(("options", "message"), TYPOS.values(), ids=TYPOS.keys())
@pytest.mark.parametrize("way", ["attribute", "stream"])
def test_a_wrong_option_is_refused_and_the_right_ones_named(
    client: sidelight.Client, floats: torch.Tensor, options: dict[str, object], message: str, way: str
) -> None:
    with pytest.raises(sidelight.InvalidArgument) as caught:
        client.attribute(floats, **options) if way == "attribute" else list(client.stream([floats], **options))
    assert message in caught.value.message


REFUSED_TARGETS = {
    "negative": (-1, sidelight.InvalidArgument, 'target: class index -1, model "small" has 0 to 9'),
    "too-large": (10, sidelight.InvalidArgument, 'target: class index 10, model "small" has 0 to 9'),
    "one-too-large": ([1, 2, 3, 4, 10], sidelight.InvalidArgument, "target: class index 10"),
    "too-few": ([1, 2], sidelight.InvalidArgument, "target: 2 classes for 5 examples, expected one for each"),
    "none-at-all": ([], sidelight.InvalidArgument, "target: 0 classes for 5 examples"),
    "unknown-label": ("elc", sidelight.NotFound, 'target: model "small" has no label "elc"; did you mean "elk"?'),
    "one-unknown-label": (["ant", "bee", 1, 2, "gnuu"], sidelight.NotFound, 'no label "gnuu"; did you mean "gnu"?'),
    "ambiguous-label": ("cat", sidelight.InvalidArgument, 'label "cat" names the classes 2, 3; give one of these'),
}


@pytest.mark.parametrize(("target", "kind", "message"), REFUSED_TARGETS.values(), ids=REFUSED_TARGETS.keys())
def test_a_target_that_the_model_has_not_is_refused_by_saying_what_it_has(
    client: sidelight.Client, floats: torch.Tensor, target: object, kind: type[sidelight.SidelightError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        client.attribute(floats, target=target)
    assert message in caught.value.message


TARGETS: dict[str, tuple[object, list[int]]] = {
    "index": (7, [7] * 5),
    "numpy-index": (np.int64(7), [7] * 5),
    "unsigned-numpy-index": (np.uint8(7), [7] * 5),
    "array-without-dimension": (np.array(7), [7] * 5),
    "label": ("gnu", [7] * 5),
    "numpy-label": (np.str_("gnu"), [7] * 5),
    "list-of-indices": ([0, 9, 2, 3, 3], [0, 9, 2, 3, 3]),
    "tuple": ((0, 9, 2, 3, 3), [0, 9, 2, 3, 3]),
    "list-of-labels": (["ant", "ibis", "bee", "elk", "elk"], [0, 9, 1, 5, 5]),
    "list-of-both": (["ant", 9, np.int32(2), np.str_("elk"), 3], [0, 9, 2, 5, 3]),
    "array": (np.array([0, 9, 2, 3, 3]), [0, 9, 2, 3, 3]),
    "array-of-bytes": (np.array([0, 9, 2, 3, 3], np.uint8), [0, 9, 2, 3, 3]),
    "array-of-labels": (np.array(["ant", "ibis", "bee", "elk", "elk"]), [0, 9, 1, 5, 5]),
    "range": (range(5), [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize(("target", "classes"), TARGETS.values(), ids=TARGETS.keys())
def test_a_target_in_any_form_is_explained(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor, target: object, classes: list[int]
) -> None:
    probabilities, gradients = reference(module, floats, classes)
    answer = client.attribute(floats, target=target, channels="none", method=sidelight.Gradient(signed=True))
    assert [each.index for each in answer.targets] == classes
    assert [each.label for each in answer.targets] == [LABELS[each] for each in classes]
    np.testing.assert_allclose([each.score for each in answer.targets], probabilities[range(5), classes], rtol=1e-5)
    assert_same(answer.maps, gradients.numpy())


def test_without_a_target_the_predicted_class_is_explained(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor
) -> None:
    probabilities, gradients = reference(module, floats)
    predicted = probabilities.argmax(dim=1).tolist()
    answer = client.attribute(floats)
    assert answer.predictions == tuple(
        sidelight.results.Prediction(index, LABELS[index], pytest.approx(float(row[index]), rel=1e-5))
        for index, row in zip(predicted, probabilities, strict=True)
    )
    assert [(each.index, each.label) for each in answer.targets] == [(i, LABELS[i]) for i in predicted]
    assert [each.score for each in answer.targets] == [each.probability for each in answer.predictions]
    assert not any(each.saturated for each in answer.targets)
    assert_same(answer.maps, gradients.abs().amax(dim=1).numpy())


def test_a_target_changes_what_is_explained_and_not_what_is_predicted(
    client: sidelight.Client, floats: torch.Tensor
) -> None:
    assert client.attribute(floats, target=0).predictions == client.attribute(floats).predictions


def test_a_sure_prediction_is_reported_to_be_saturated(device: str, module: nn.Module, floats: torch.Tensor) -> None:
    sure = nn.Sequential(copy.deepcopy(module), nn.Linear(N_CLASSES, N_CLASSES, bias=False))
    with torch.no_grad():
        sure[1].weight.copy_(1e6 * torch.eye(N_CLASSES))
    with sidelight_server.serve(sure, device=device) as address, sidelight.connect(address) as client:
        explained = client.attribute(floats).targets
        assert all(each.saturated and 'score="logit"' in each.advice for each in explained)
        as_advised = client.attribute(floats, score="logit").targets
        assert not any(each.saturated or each.advice for each in as_advised)


def test_the_probabilities_of_all_classes_come_where_they_are_asked_for(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor
) -> None:
    assert client.attribute(floats).probabilities is None
    answer = client.attribute(floats, probabilities=True)
    assert answer.probabilities.dtype == np.float32
    np.testing.assert_allclose(answer.probabilities, reference(module, floats)[0], rtol=1e-5)
    np.testing.assert_array_equal(answer.probabilities.argmax(axis=1), [each.index for each in answer.predictions])
    (streamed,) = client.stream([floats], probabilities=True)
    np.testing.assert_allclose(streamed.probabilities, answer.probabilities, rtol=1e-5)


@pytest.mark.parametrize("score", ["probability", "logit", "log_probability", "margin"])
def test_a_score_is_the_number_that_is_reported(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor, score: str
) -> None:
    logits = copy.deepcopy(module).eval()(floats).detach()
    others = logits.index_fill(1, torch.tensor(3), -math.inf).amax(1, keepdim=True)
    values = {
        "probability": logits.softmax(1),
        "logit": logits,
        "log_probability": logits.log_softmax(1),
        "margin": logits - others,
    }[score]
    answer = client.attribute(floats, target=3, score=score)
    np.testing.assert_allclose([each.score for each in answer.targets], values[:, 3], rtol=1e-5, atol=1e-6)
    assert answer.provenance.score == score


def test_a_score_that_the_model_cannot_give_is_a_failed_precondition(device: str, floats: torch.Tensor) -> None:
    module = nn.Sequential(small_cnn(), nn.Softmax(dim=1))
    spec = sidelight_server.ModelSpec(module, output_kind="probabilities")
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        with pytest.raises(sidelight.FailedPrecondition, match="it has probability, log_probability"):
            client.attribute(floats, score="logit")
        assert len(client.attribute(floats)) == 5


def test_a_model_without_labels_says_so_by_empty_labels(device: str, module: nn.Module, floats: torch.Tensor) -> None:
    with sidelight_server.serve(module, device=device) as address, sidelight.connect(address) as client:
        assert client.info().models[0].input_size is None
        answer = client.attribute(floats)
        assert [each.label for each in answer.predictions] == [each.label for each in answer.targets] == [""] * 5
        with pytest.raises(sidelight.FailedPrecondition, match="no input size"):
            client.attribute(np.zeros((32, 32, 3), np.uint8))


METHODS: dict[str, sidelight.methods.Method] = {
    "gradient": sidelight.Gradient(squared=True),
    "smoothgrad": sidelight.SmoothGrad(samples=4, statistic="variance"),
    "smoothgrad-over-a-path": sidelight.SmoothGrad(samples=2, base=sidelight.IntegratedGradients(steps=3)),
    "smoothgrad-to-a-tolerance": sidelight.SmoothGrad(tolerance=0.4),
    "integrated-gradients": sidelight.IntegratedGradients(steps=4, rule="midpoint", baseline="black"),
    "integrated-gradients-to-a-tolerance": sidelight.IntegratedGradients(tolerance=0.2, baseline="blurred"),
    "integrated-gradients-from-an-array": sidelight.IntegratedGradients(steps=4, baseline=torch.ones(5, 3, 32, 32)),
    "expected-gradients": sidelight.ExpectedGradients(samples=4, baselines=np.ones((2, 3, 32, 32)), noise_level=0.1),
    "grad-cam": sidelight.GradCAM(layer="4", keep_negative=True),
    "layer-gradient-times-activation": sidelight.LayerGradientXActivation(),
    "occlusion": sidelight.Occlusion(window=(8, 16), stride=8, baseline="mean_color"),
    "rise": sidelight.RISE(masks=5, seed=3),
    "guided-backpropagation": sidelight.GuidedBackpropagation(),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_is_called_and_reported_in_the_provenance_as_it_was_asked(
    client: sidelight.Client, floats: torch.Tensor, method: sidelight.methods.Method
) -> None:
    answer = client.attribute(floats, method=method)
    assert answer.maps.shape == (5, 32, 32)
    assert np.isfinite(answer.maps).all()
    assert np.abs(answer.maps).max() > 0
    asked = method_text(method.message()).replace("layer=''", "layer=6")  # the one that was chosen
    assert answer.provenance.method == asked
    has_many_rows = "rows" in asked or any(name in asked for name in ("expected", "occlusion", "rise"))
    assert [each is not None for each in answer.convergence] == [has_many_rows] * 5
    assert bool(answer.provenance.baseline_digest) == ("tensor" in asked)


def test_a_map_that_was_refined_says_how_good_it_is(client: sidelight.Client, floats: torch.Tensor) -> None:
    answer = client.attribute(floats, method=sidelight.IntegratedGradients(tolerance=0.1, max_rows=200))
    assert all(each.error <= 0.1 and 3 <= each.rows <= 200 for each in answer.convergence)
    exact = client.attribute(floats, method=sidelight.IntegratedGradients(steps=300, rule="midpoint"))
    assert all(each.relative_completeness_error < 0.1 for each in exact.convergence)
    assert [each.rows for each in exact.convergence] == [302] * 5


def test_the_k_most_probable_classes_have_a_map_each(client: sidelight.Client, floats: torch.Tensor) -> None:
    answer = client.attribute(floats, target=sidelight.TopK(3), probabilities=True)
    assert answer.maps.shape == (5, 3, 32, 32)
    order = np.argsort(-answer.probabilities, axis=1)[:, :3]
    assert [[each.index for each in one] for one in answer.targets] == order.tolist()
    for k in range(3):
        alone = client.attribute(floats, target=order[:, k])
        assert_same(answer.maps[:, k], alone.maps)
        np.testing.assert_array_equal(answer.heatmap(2, k=k), answer.maps[2, k])
        assert answer.overlay(2, k=k).size == (32, 32)
    channels = client.attribute(floats, target=sidelight.TopK(2), channels="none")
    assert channels.maps.shape == (5, 2, 3, 32, 32)
    assert_same(channels.heatmap(1, k=1), answer.maps[1, 1])


def test_a_contrast_explains_the_difference_of_two_scores(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor
) -> None:
    answer = client.attribute(floats, target=sidelight.Contrast("gnu", 1), channels="none")
    (first, positive), (second, negative) = (reference(module, floats, [each] * 5) for each in (7, 1))
    assert_same(answer.maps, (positive - negative).numpy())
    assert [(each.index, each.label, each.against) for each in answer.targets] == [(7, "gnu", 1)] * 5
    expected = first[:, 7] - second[:, 1]
    np.testing.assert_allclose([each.score for each in answer.targets], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("map_dtype", "step"), [("float16", 2**-11), ("uint8", 1 / 255 / 2)])
@pytest.mark.parametrize("way", ["attribute", "stream"])
def test_maps_may_travel_in_a_shorter_type(
    client: sidelight.Client, floats: torch.Tensor, map_dtype: str, step: float, way: str
) -> None:
    # Scores of this size have maps within the range of float16.
    whole = client.attribute(floats, score="logit").maps
    if way == "attribute":
        answer = client.attribute(floats, score="logit", map_dtype=map_dtype)
    else:
        (answer,) = client.stream([floats], score="logit", map_dtype=map_dtype)
    assert (answer.maps.dtype, answer.map_dtype) == (np.float32, map_dtype)
    np.testing.assert_allclose(answer.maps, whole, rtol=0, atol=1.01 * step * whole.max())
    assert len(np.unique(answer.maps)) < len(np.unique(whole))


@pytest.mark.parametrize(("map_dtype", "step"), [("float16", 2**-11), ("uint8", 1 / 255 / 2)])
def test_a_weak_example_keeps_its_map_beside_a_strong_one(
    client: sidelight.Client, floats: torch.Tensor, map_dtype: str, step: float
) -> None:
    method = sidelight.Gradient(times_input=True)
    unequal = floats[:2] * torch.tensor([1e3, 1e-3])[:, None, None, None]
    whole = client.attribute(unequal, score="logit", method=method).maps
    assert whole[1].max() < 1e-4 * whole[0].max()
    shorter = client.attribute(unequal, score="logit", method=method, map_dtype=map_dtype).maps
    for exact, map_ in zip(whole, shorter, strict=True):
        np.testing.assert_allclose(map_, exact, rtol=0, atol=1.01 * step * exact.max())


def test_a_failed_example_of_bytes_is_nan_too(client: sidelight.Client, floats: torch.Tensor) -> None:
    broken = floats.clone()
    broken[1] = math.nan
    answer = client.attribute(broken, map_dtype="uint8", on_error="return")
    assert [bool(np.isnan(each).all()) for each in answer.maps] == [False, True, False, False, False]


@pytest.mark.parametrize("ordered", [False, True], ids=["as-ready", "ordered"])
def test_a_stream_yields_maps_as_they_improve(client: sidelight.Client, floats: torch.Tensor, ordered: bool) -> None:
    method = sidelight.SmoothGrad(samples=100)
    batches = [floats, floats[:1], floats[:2]]
    answers = list(client.stream(batches, method=method, partial=True, ordered=ordered))
    assert sorted(answer.index for answer in answers if answer.final) == [0, 1, 2]
    assert not all(answer.final for answer in answers)
    for index, batch in enumerate(batches):
        *improving, last = (answer for answer in answers if answer.index == index)
        assert last.final
        assert not any(answer.final for answer in improving)
        assert_same(last.maps, client.attribute(batch, method=method).maps)
        rows = [each.convergence[0].rows for each in improving if each.convergence[0]]
        assert rows == sorted(rows)
    if ordered:
        assert [answer.index for answer in answers] == sorted(answer.index for answer in answers)


def test_what_the_server_knows_to_be_out_of_range_it_says_by_field_got_and_expected(
    client: sidelight.Client, floats: torch.Tensor
) -> None:
    for method, fragments in {
        sidelight.IntegratedGradients(steps=0): ("steps", "0"),
        sidelight.SmoothGrad(noise_level=-0.1): ("noise_level", "-0.1"),
        sidelight.SmoothGrad(tolerance=1.5): ("tolerance", "1.5"),
        sidelight.IntegratedGradients(baseline=np.ones((3, 31, 32))): ("baseline", "[3, 31, 32]", "[3, 32, 32]"),
        sidelight.IntegratedGradients(tolerance=0.1, rule="midpoint"): ("rule", "midpoint", "trapezoid"),
        sidelight.Occlusion(window=0): ("window", "0"),
        sidelight.RISE(keep_probability=1.0): ("keep_probability", "1"),
    }.items():
        with pytest.raises(sidelight.InvalidArgument, match="expected") as caught:
            client.attribute(floats, method=method)
        assert all(each in caught.value.message for each in fragments), caught.value.message
    with pytest.raises(sidelight.NotFound, match="layer"):
        client.attribute(floats, method=sidelight.GradCAM(layer="10"))


def test_the_geometry_reports_how_a_picture_was_resized_and_cropped(client: sidelight.Client) -> None:
    answer = client.attribute([np.zeros((40, 50, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)])
    assert answer.geometry[0] == sidelight.results.Geometry(
        original_height=40,
        original_width=50,
        scaled_height=32,
        scaled_width=40,
        crop_top=0,
        crop_left=4,
        crop_height=32,
        crop_width=32,
    )
    assert answer.geometry[1] == sidelight.results.Geometry(64, 64, 32, 32, 0, 0, 32, 32)


def test_the_provenance_says_all_that_is_needed_to_compute_it_again(
    client: sidelight.Client, floats: torch.Tensor, device: str
) -> None:
    method = sidelight.Gradient(signed=True, times_input=True)
    answer = client.attribute(floats, target=["ant", 1, 2, 3, 4], method=method, score="logit", channels="l2")
    facts, model = answer.provenance, client.model()
    assert (facts.model, facts.model_version, facts.model_digest) == ("small", 1, model.digest)
    assert facts.method == "gradient(signed=True, times_input=True, squared=False)"
    assert facts.target == 'per example: "ant", 1, 2, 3, 4'
    assert (facts.score, facts.channels, facts.precision) == ("logit", "l2", "float32")
    assert facts.device.startswith(device)
    assert facts.threads >= 1
    assert facts.chunk_rows == model.chunk_rows
    assert (facts.reproducible, facts.baseline_digest) == (False, "")
    assert facts.software == {
        "sidelight": sidelight.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }
    assert (answer.transport, answer.final, answer.index, answer.error) == ("inline", True, 0, None)
    assert answer.convergence == (None,) * 5


@pytest.mark.parametrize(("target", "text"), [(None, "predicted"), (7, "index 7"), ("gnu", 'label "gnu"')])
def test_the_provenance_says_the_target_as_it_was_asked(
    client: sidelight.Client, floats: torch.Tensor, target: object, text: str
) -> None:
    facts = client.attribute(floats, target=target).provenance
    assert (facts.target, facts.score, facts.channels) == (text, "probability", "max_abs")
    assert facts.method == "gradient(signed=False, times_input=False, squared=False)"


def test_the_parts_of_the_time_are_within_the_whole(client: sidelight.Client, floats: torch.Tensor) -> None:
    timing = client.attribute(floats).timing
    parts = (timing.prepare_s, timing.queue_s, timing.compute_s)
    assert all(part >= 0 for part in parts)
    assert timing.compute_s > 0
    assert sum(parts) <= timing.total_s + 1e-6  # each is rounded to a nanosecond


def test_a_partial_failure_carries_the_answer_with_the_other_maps(
    client: sidelight.Client, floats: torch.Tensor
) -> None:
    broken = floats.clone()
    broken[1, 0, 0, 0] = broken[3, 1, 2, 3] = math.nan
    with pytest.raises(sidelight.PartialFailure) as caught:
        client.attribute(broken, probabilities=True)
    assert str(caught.value) == (
        "2 of 5 examples failed; example 1: images: 1 NaN and 0 infinite elements, expected finite ones (and 1 more)"
    )
    answer = caught.value.answer
    assert [each.example for each in answer.failures] == [1, 3]
    for entries in (answer.predictions, answer.targets):
        assert [each is None for each in entries] == [False, True, False, True, False]
    assert np.isnan(answer.maps[[1, 3]]).all()
    assert np.isnan(answer.probabilities[[1, 3]]).all()
    whole = client.attribute(floats)
    assert_same(answer.maps[::2], whole.maps[::2])
    assert [each.index for each in answer.predictions[::2]] == [each.index for each in whole.predictions[::2]]
    assert answer.provenance.model == "small"


def test_failures_are_handed_on_where_that_is_asked_for(client: sidelight.Client) -> None:
    answer = client.attribute([b"", b"x"], on_error="return", probabilities=True)
    assert [each.example for each in answer.failures] == [0, 1]
    assert all(each.code == sidelight.InvalidArgument.code and each.message for each in answer.failures)
    assert np.isnan(answer.maps).all()
    assert answer.maps.shape == (2, 32, 32)
    assert answer.probabilities.shape == (2, N_CLASSES)


def test_a_batch_that_failed_whole_raises_whatever_is_asked_for(client: sidelight.Client, floats: torch.Tensor) -> None:
    with pytest.raises(sidelight.NotFound):
        client.attribute(floats, target="elc", on_error="return")


def test_a_failing_model_is_internal_and_its_secrets_stay_with_the_server(
    device: str, floats: torch.Tensor, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if (x != 0).any():
                raise RuntimeError("a secret path")
            return x.flatten(1)[:, :3] - 1  # logits: no probability is negative

    listen = (f"unix:{tmp_path}/for-others",)  # on a socket of its own, serve() tells what a model raised
    with (
        sidelight_server.serve(Failing(), device=device, listen=listen) as address,
        sidelight.connect(address) as client,
    ):
        client.attribute(0 * floats[:1], score="logit")  # so that the shape is known to be one that the model takes
        answer = client.attribute(floats[:2], on_error="return")
    assert [(each.code, "secret" in each.message) for each in answer.failures] == [
        (exceptions.Internal.code, False)
    ] * 2
    assert "a secret path" in caplog.text


@pytest.mark.parametrize("channels", ["max_abs", "none", "l2", "sum", "mean_abs"])
def test_a_map_is_drawn_over_the_picture_whatever_its_channels(client: sidelight.Client, channels: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    answer = client.attribute(picture, channels=channels)
    assert answer.maps.shape == ((1, 3, 32, 32) if channels == "none" else (1, 32, 32))
    drawn = np.abs(answer.maps[0]).max(axis=0) if channels == "none" else answer.maps[0]
    np.testing.assert_array_equal(answer.heatmap(0), drawn)
    overlay = answer.overlay(0)
    assert (overlay.mode, overlay.size) == ("RGB", (32, 32))
    assert overlay.tobytes() != answer.picture(0).tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_map_is_drawn_over_floats(client: sidelight.Client, floats: torch.Tensor, dtype: torch.dtype) -> None:
    answer = client.attribute(floats.to(dtype), method=sidelight.Gradient(signed=True), channels="sum")
    for i in range(5):
        assert answer.overlay(i).size == answer.picture(i).size == (32, 32)


def test_an_answer_is_saved_with_maps_facts_and_overlays(client: sidelight.Client, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, size, np.uint8) for size in ((40, 50, 3), (32, 32, 3), (90, 33, 3))]
    answer = client.attribute(pictures, target=["elk", 1, "ibis"])
    folder = tmp_path / "made" / "for it"
    answer.save(folder)
    assert sorted(each.name for each in folder.iterdir()) == [
        "000.png",
        "001.png",
        "002.png",
        "answer.json",
        "maps.npy",
    ]
    np.testing.assert_array_equal(np.load(folder / "maps.npy"), answer.maps)
    for i in range(3):
        with Image.open(folder / f"{i:03}.png") as overlay:
            assert overlay.tobytes() == answer.overlay(i).tobytes()
    facts = json.loads((folder / "answer.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [each["target"]["label"] for each in facts["examples"]] == ["elk", "bee", "ibis"]
    assert [each["prediction"]["index"] for each in facts["examples"]] == [each.index for each in answer.predictions]
    assert facts["examples"][0]["geometry"] == dataclasses.asdict(answer.geometry[0])
    provenance = dataclasses.asdict(answer.provenance)
    lists = {name: list(fact) for name, fact in provenance.items() if isinstance(fact, tuple)}
    assert facts["provenance"] == provenance | lists
    assert facts["timing"] == dataclasses.asdict(answer.timing)
    assert facts["failures"] == []


def test_an_answer_with_failures_is_saved_without_their_overlays(
    client: sidelight.Client, floats: torch.Tensor, tmp_path: Path
) -> None:
    broken = floats.clone()
    broken[1, 0, 0, 0] = math.inf
    client.attribute(broken, on_error="return").save(str(tmp_path))
    assert sorted(each.name for each in tmp_path.glob("*.png")) == ["000.png", "002.png", "003.png", "004.png"]
    facts = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert set(facts["examples"][1].values()) == {None}
    assert facts["example_count"] == 5
    (failure,) = facts["failures"]
    assert (failure["example"], failure["code"]) == (1, 3)


def test_answers_and_errors_cross_processes(client: sidelight.Client, floats: torch.Tensor) -> None:
    broken = floats.clone()
    broken[1] = math.nan
    with pytest.raises(sidelight.PartialFailure) as caught:
        client.attribute(broken)
    failure = pickle.loads(pickle.dumps(caught.value))
    assert (type(failure), str(failure)) == (sidelight.PartialFailure, str(caught.value))
    np.testing.assert_array_equal(failure.answer.maps, caught.value.answer.maps)
    assert failure.answer.overlay(0).tobytes() == caught.value.answer.overlay(0).tobytes()
    error = pickle.loads(pickle.dumps(sidelight.ResourceExhausted("full", retry_delay_s=0.25)))
    assert (type(error), str(error), error.retry_delay_s) == (sidelight.ResourceExhausted, "full", 0.25)


def test_the_public_list_is_whole_and_true() -> None:
    assert len(set(sidelight.__all__)) == len(sidelight.__all__)
    public = {name for name in vars(sidelight) if not name.startswith("_")}
    # Three are imported by their own names, once somebody has.
    assert public - set(sidelight.__all__) - {"page", "pyhealth", "testing"} == {"v1", "visualization"}
    assert set(sidelight.__all__) <= public
    assert len(sidelight.__all__) <= 35  # what a newcomer reads; the rest is a level down
    errors = {name for name, each in vars(exceptions).items() if inspect.isclass(each) and issubclass(each, Exception)}
    assert {name for name in errors if not name.startswith("_")} == set(exceptions.__all__)


@pytest.mark.parametrize("module", [sidelight, sidelight.exceptions, sidelight.methods, sidelight.results])
def test_all_that_is_public_says_what_it_is(module: ModuleType) -> None:
    assert module.__doc__
    assert all(getattr(module, name).__doc__ for name in module.__all__)


def test_a_name_of_the_top_level_is_the_one_of_its_module() -> None:
    for module in (sidelight.exceptions, sidelight.methods, sidelight.results):
        for name in set(module.__all__) & set(sidelight.__all__):
            assert getattr(module, name) is getattr(sidelight, name)


def test_importing_the_client_brings_neither_server_nor_torch_nor_a_command_line() -> None:
    code = "import sys, sidelight; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    packages = {name.partition(".")[0] for name in modules}
    assert "sidelight" in packages
    assert not packages & {"torch", "sidelight_server", "typer", "click", "rich", "pydantic", "matplotlib", "skimage"}
    assert not [name for name in modules if name.startswith("PIL.") and name.endswith("Plugin")]
    assert not {"sidelight._cli.app", "sidelight._cli.tables", "sidelight._cli.demo"} & set(modules)
    assert not done.stderr
