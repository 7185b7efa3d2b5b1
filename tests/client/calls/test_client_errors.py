"""Errors of calls: an exception for each status, failed examples, and failing models."""

import inspect
import math
import pickle
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from sidelight import exceptions
from torch import nn

from support.models import N_CLASSES
from support.tolerances import assert_same

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
        assert error.message.startswith("why")  # UNIMPLEMENTED has more advice after it


def test_a_status_without_a_message_or_a_delay_is_reported_by_its_name() -> None:
    error = exceptions.from_rpc(FailedCall(grpc.StatusCode.DATA_LOSS), max_message_bytes=1)
    assert (str(error), error.retry_delay_s) == ("DATA_LOSS", None)


def test_an_undefined_status_code_is_unknown() -> None:
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


def test_a_request_that_the_server_found_too_large_names_the_servers_flag() -> None:
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    error = exceptions.from_rpc(
        FailedCall(status, "SERVER: Received message larger than max (9 vs. 5)"), max_message_bytes=1
    )
    assert type(error) is sidelight.exceptions.MessageTooLarge
    assert "--max-message-bytes of sidelight-server" in error.message
    assert "(9 vs. 5)" in error.message


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


def test_failures_are_returned_where_on_error_is_return(client: sidelight.Client) -> None:
    answer = client.attribute([b"", b"x"], on_error="return", probabilities=True)
    assert [each.example for each in answer.failures] == [0, 1]
    assert all(each.code == sidelight.InvalidArgument.code and each.message for each in answer.failures)
    assert np.isnan(answer.maps).all()
    assert answer.maps.shape == (2, 32, 32)
    assert answer.probabilities.shape == (2, N_CLASSES)


def test_a_batch_that_failed_whole_always_raises(client: sidelight.Client, floats: torch.Tensor) -> None:
    with pytest.raises(sidelight.NotFound):
        client.attribute(floats, target="elc", on_error="return")


def test_a_failing_model_is_internal_and_its_message_stays_on_the_server(
    device: str, floats: torch.Tensor, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if (x != 0).any():
                raise RuntimeError("a secret path")
            return x.flatten(1)[:, :3] - 1  # logits: no probability is negative

    listen = (f"unix:{tmp_path}/for-others",)  # on a socket of its own, serve() reports what a model raised
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
