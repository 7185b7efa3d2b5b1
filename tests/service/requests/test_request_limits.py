"""Limits of a request: its id, its timeout, and the bytes of messages and of requests in flight."""

from collections.abc import Iterator

import grpc
import pytest
import sidelight_server
from google.protobuf.duration_pb2 import Duration
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, model_pb2_grpc
from sidelight_server.engine.request_cost import BYTES_OF_EXAMPLE

from support.messages.checked_server import TIMEOUT_S, Service, ask, floats, pixels
from support.models import small_cnn

Status = grpc.StatusCode
SMALL_LIMIT = 14_000  # bytes: one example of the small CNN fits, two do not


@pytest.fixture(scope="module")
def tight(device: str) -> Iterator[Service]:
    """The small CNN on a server with a low limit on messages; the caller has none."""
    with (
        sidelight_server.serve(
            small_cnn(), input_size=(3, 32, 32), max_message_bytes=SMALL_LIMIT, device=device
        ) as address,
        grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel,
    ):
        yield Service.at(channel, ask(pixels(2, 8, 8, 3)))


def test_reloading_is_not_allowed_unless_the_operator_says_so(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            models.ReloadModel(model_pb2.ReloadModelRequest(name="small"), timeout=TIMEOUT_S)
    assert caught.value.code() is Status.PERMISSION_DENIED
    assert "allow_reload" in caught.value.details()


@pytest.mark.parametrize("id_", ["x" * 129, "é" * 65], ids=["letters", "letters of two bytes"])
def test_a_long_id_is_refused(id_: str, small: Service) -> None:
    why = small.refuse(ask(pixels(1, 32, 32, 3), id=id_), Status.INVALID_ARGUMENT)
    assert why == f"id: {len(id_.encode())} bytes, expected at most 128"


def test_an_id_of_the_greatest_length_comes_back(small: Service) -> None:
    assert small.answer(ask(pixels(1, 32, 32, 3), id="é" * 64)).id == "é" * 64


@pytest.mark.parametrize(
    "timeout",
    [Duration(), Duration(seconds=-1), Duration(nanos=-1), Duration(seconds=1, nanos=-1_500_000_000)],
    ids=["zero", "negative", "a nanosecond too few", "negative in sum"],
)
def test_a_timeout_that_is_not_positive_is_refused(timeout: Duration, small: Service) -> None:
    why = small.refuse(ask(pixels(1, 32, 32, 3), timeout=timeout), Status.INVALID_ARGUMENT)
    assert why.startswith("timeout: ")
    assert "expected a positive time" in why


def test_the_longest_timeout_is_accepted(small: Service) -> None:
    longest = Duration(seconds=2**63 - 1, nanos=999_999_999)
    assert small.answer(ask(pixels(1, 32, 32, 3), timeout=longest)).result.final


def test_an_answer_over_the_message_limit_is_refused_before_it_is_computed(tight: Service) -> None:
    request = ask(pixels(2, 8, 8, 3), channels=pb.CHANNEL_REDUCTION_NONE)
    why = tight.refuse(request, Status.RESOURCE_EXHAUSTED)
    assert f"{2 * 3 * 32 * 32 * 4} bytes" in why
    assert f"max_message_bytes is {SMALL_LIMIT}" in why
    assert "send fewer examples" in why


def test_a_request_over_the_message_limit_is_refused(tight: Service) -> None:
    why = tight.refuse(ask(floats(2, 3, 32, 32)), Status.RESOURCE_EXHAUSTED)
    assert str(SMALL_LIMIT) in why


def test_a_batch_over_all_the_bytes_in_flight_is_refused_for_good(device: str) -> None:
    room = 2 * (2 * (192 + 4 * 32 * 32 + 3 * 32 * 32) + BYTES_OF_EXAMPLE) + 500  # for two, with maps and pixels
    with (
        sidelight_server.serve(small_cnn(), input_size=(3, 32, 32), max_in_flight_bytes=room, device=device) as at,
        grpc.insecure_channel(at) as channel,
    ):
        service = Service.at(channel, ask(pixels(2, 8, 8, 3)))
        why = service.refuse(ask(pixels(4, 8, 8, 3)), Status.RESOURCE_EXHAUSTED)
        assert f"max_in_flight_bytes is {room}" in why
