"""Streams whose servers end, are full or cancel: which batches are sent again. The servers follow a script."""

import itertools
import queue
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
import sidelight

from support.servers.scripted import Ended, answer, failure, nobody, scripted
from support.servers.streams import ONE, Requests, Responses, assert_all_answered, echo, stream

DRAINED = (("sidelight-end", "shutdown"),)


# One call of a stream ends; the caller of the stream does not notice.


def test_what_a_server_had_not_answered_when_it_ended_is_sent_again_and_yielded_once() -> None:
    def dying(requests: Requests) -> Responses:
        first, second = next(requests), next(requests)
        yield answer(second)
        assert first.attribute.id == "0"
        raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")

    asked = []

    def living(requests: Requests) -> Responses:
        for request in requests:
            asked.append(request.attribute.id)
            yield answer(request)
            yield answer(request)  # no server should

    with scripted(dying, living) as address:
        assert_all_answered(stream(address, [ONE] * 20), 20)
    assert asked == ["0", *map(str, range(2, 20))]


def test_a_stream_at_its_maximum_age_continues_in_another_call() -> None:
    ids: list[list[str]] = []

    def aged(requests: Requests) -> Responses:
        mine = list(itertools.islice(requests, 3))
        ids.append([each.attribute.id for each in mine])
        yield from map(answer, mine[:2])
        raise Ended(grpc.StatusCode.OK, trailers=(("sidelight-end", "age"),))

    with scripted(*[aged] * 4, echo) as address:
        assert_all_answered(stream(address, [ONE] * 20, window=3), 20)
    assert [each[0] for each in ids] == ["0", "2", "4", "6"]


@pytest.mark.serial
def test_an_idle_stream_that_is_ended_in_order_again_and_again_finds_its_server_at_once() -> None:
    calls = queue.SimpleQueue[None]()

    def ended(requests: Requests) -> Responses:
        calls.put(None)
        raise Ended(grpc.StatusCode.OK, trailers=(("sidelight-end", "age"),))
        yield

    def batches() -> Iterator[np.ndarray]:
        yield ONE
        for _ in range(8):
            calls.get(timeout=30)
        yield ONE

    def first(requests: Requests) -> Responses:
        yield answer(next(requests))

    with scripted(first, *[ended] * 8, echo) as address, sidelight.connect(address, connect_timeout=0.8) as client:
        assert_all_answered(list(client.stream(batches(), ordered=True)), 2)


def test_no_batch_is_blamed_for_servers_that_shut_down_in_order() -> None:
    def draining(requests: Requests) -> Responses:
        next(requests)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "shutting down", DRAINED)
        yield

    with scripted(*[draining] * 5, echo) as address:
        assert_all_answered(stream(address, [ONE] * 3), 3)


def test_a_proxy_without_a_server_gets_no_batch_and_no_batch_is_blamed() -> None:
    def dying(requests: Requests) -> Responses:
        next(requests)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")
        yield

    with scripted(dying, *[nobody] * 5, echo) as address:
        assert_all_answered(stream(address, [ONE]), 1)


@pytest.mark.parametrize("status", [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED], ids=str)
def test_an_end_that_a_retry_cannot_repair_is_raised(status: grpc.StatusCode) -> None:
    def refusing(requests: Requests) -> Responses:
        raise Ended(status, "not for you")
        yield

    with scripted(refusing, echo) as address, pytest.raises(sidelight.SidelightError, match="not for you") as caught:
        stream(address, [ONE])
    assert caught.value.code == status.value[0]


def test_a_batch_that_is_alone_when_two_servers_die_is_given_up_and_the_others_go_on() -> None:
    n_deaths = itertools.count()

    def poisoned(requests: Requests) -> Responses:
        for request in requests:
            if request.attribute.images.tensor.shape[0] == 2:
                next(n_deaths)
                raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")
            yield answer(request)

    batches = [ONE] * 10
    batches[4] = np.concatenate([ONE, ONE])
    with scripted(poisoned) as address:
        answers = stream(address, batches)
    assert [each.index for each in answers] == list(range(10))
    kinds = [type(each.error) for each in answers]
    assert kinds == [type(None)] * 4 + [sidelight.exceptions.ServerDied] + [type(None)] * 5
    assert str(answers[4].error).startswith("batch 4: ")
    assert next(n_deaths) <= 3  # at most one of them beside other batches


# Failures of one batch, and which of them are tried again.


def test_a_batch_that_a_full_server_rejects_is_sent_again_after_its_delay_and_others_pass_it() -> None:
    ids = []

    def full(requests: Requests) -> Responses:
        for request in requests:
            ids.append(request.attribute.id)
            is_first = ids.count("0") == 1 and ids[-1] == "0"
            yield failure(request, 8, delay_s=1.0) if is_first else answer(request)

    with scripted(full) as address:
        assert_all_answered(stream(address, [ONE] * 3), 3)
    assert ids[0] == ids[-1] == "0"
    assert sorted(ids) == ["0", "0", "1", "2"]


def test_a_retry_delay_past_a_batchs_timeout_fails_the_batch() -> None:
    def full(requests: Requests) -> Responses:
        for request in requests:
            yield failure(request, 8, delay_s=60)

    with scripted(full) as address:
        (answered,) = stream(address, [ONE], timeout=5)
    assert type(answered.error) is sidelight.ResourceExhausted
    assert answered.error.retry_delay_s == 60


@pytest.mark.parametrize("code", [3, 4, 5, 9, 13])
def test_a_failure_that_a_retry_would_repeat_is_not_retried(code: int) -> None:
    n_asked = itertools.count()

    def failing(requests: Requests) -> Responses:
        for request in requests:
            next(n_asked)
            yield failure(request, code)

    with scripted(failing) as address:
        (answered,) = stream(address, [ONE])
    assert answered.error.code == code
    assert next(n_asked) == 1


def test_a_batch_refused_by_a_server_that_shuts_down_is_sent_again() -> None:
    def leaving(requests: Requests) -> Responses:
        yield failure(next(requests), 14)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "shutting down", DRAINED)

    with scripted(leaving, echo) as address:
        assert_all_answered(stream(address, [ONE] * 2), 2)


def test_a_batch_that_is_sent_again_has_the_rest_of_its_timeout() -> None:
    times: list[float] = []

    def slow(requests: Requests) -> Responses:
        times.append(next(requests).attribute.timeout.ToNanoseconds() / 1e9)
        threading.Event().wait(0.2)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "shutting down", DRAINED)
        yield

    def last(requests: Requests) -> Responses:
        for request in requests:
            times.append(request.attribute.timeout.ToNanoseconds() / 1e9)
            yield answer(request)

    with scripted(slow, last) as address:
        assert_all_answered(stream(address, [ONE], timeout=30), 1)
    assert 29 < times[0] <= 30
    assert times[1] <= times[0] - 0.2


def test_a_stream_leaves_a_server_that_is_silent_past_a_batchs_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidelight._streaming.scheduling.resend_queue.GRACE_S", 0.1)

    def silent(requests: Requests) -> Responses:
        list(requests)
        yield from ()

    def batches() -> Iterator[np.ndarray]:
        yield ONE
        assert is_given_up.wait(30)
        yield ONE

    is_given_up = threading.Event()
    answers = []
    with scripted(silent, echo) as address, sidelight.connect(address, connect_timeout=10) as client:
        for each in client.stream(batches(), on_error="return", timeout=0.3):
            answers.append(each)
            is_given_up.set()
    assert [type(each.error) for each in answers] == [sidelight.DeadlineExceeded, type(None)]


# Other models.


@pytest.mark.parametrize("allowed", [False, True])
def test_another_model_than_the_first_ends_the_stream_unless_that_is_allowed(allowed: bool) -> None:
    def changing(requests: Requests) -> Responses:
        yield answer(next(requests), digest="a" * 64)
        yield answer(next(requests), digest="b" * 64)
        yield from map(answer, requests)

    with scripted(changing) as address:
        if allowed:
            assert_all_answered(stream(address, [ONE] * 2, allow_model_change=True), 2)
        else:
            with pytest.raises(sidelight.exceptions.ModelChanged, match="allow_model_change"):
                stream(address, [ONE] * 2)


def test_without_retry_a_stream_sends_nothing_again() -> None:
    def dying(requests: Requests) -> Responses:
        yield answer(next(requests))
        next(requests)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "gone")

    def living(requests: Requests) -> Responses:
        yield from map(answer, requests)

    def refusing(requests: Requests) -> Responses:
        for request in requests:
            yield failure(request, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], delay_s=0.01)

    for script in (dying, refusing):
        with scripted(script, living) as address, sidelight.connect(address, retry=False) as client:
            answers = client.stream([ONE] * 4, on_error="return", window=1)
            errors = [each.error for each in answers]
        assert any(isinstance(each, sidelight.Unavailable | sidelight.ResourceExhausted) for each in errors)
        assert len(errors) == 4


def test_a_model_that_is_not_loaded_yet_gets_as_many_batches_as_a_loaded_one() -> None:
    """The server's info is fetched again; until then the model counts as an ordinary one."""
    n_waiting: list[int] = []

    def patient(requests: Requests) -> Responses:
        held = list(itertools.islice(requests, 10))  # with a window of two batches, an eleventh would be waited for
        n_waiting.append(len(held))
        yield from map(answer, held)
        yield from map(answer, requests)

    with scripted(patient, chunk_rows=0) as address:
        assert_all_answered(stream(address, [ONE] * 10), 10)
    assert n_waiting == [10]


def test_a_server_that_cancels_streams_is_not_taken_for_one_that_died() -> None:
    def cancelling(requests: Requests) -> Responses:
        next(requests)
        raise Ended(grpc.StatusCode.CANCELLED, "too many resets")
        yield

    with scripted(*[cancelling] * 4, echo) as address:
        assert_all_answered(stream(address, [ONE]), 1)


@pytest.mark.parametrize("status", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN], ids=str)
def test_a_reset_call_is_recognized_by_its_status_whatever_its_message(status: grpc.StatusCode) -> None:
    def reset(requests: Requests) -> Responses:
        next(requests)
        raise Ended(status, "a message that no client knows")
        yield

    with scripted(reset, echo) as address:
        assert_all_answered(stream(address, [ONE] * 3), 3)


def test_without_retry_batches_that_a_server_at_its_maximum_age_has_not_read_are_still_sent() -> None:
    def aged(requests: Requests) -> Responses:
        yield answer(next(requests))
        next(requests)
        raise Ended(grpc.StatusCode.OK, trailers=(("sidelight-end", "age"),))

    with scripted(aged, echo) as address, sidelight.connect(address, retry=False) as client:
        assert_all_answered(list(client.stream([ONE] * 4, on_error="return", ordered=True)), 4)
