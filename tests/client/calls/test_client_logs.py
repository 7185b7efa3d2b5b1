"""The client's log: one line for each retry, reconnect and split, and none without them."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import sidelight
from sidelight.v1 import attribution_pb2 as pb

from support.servers.scripted import Ended, answer, failure, scripted

Requests = Iterator[pb.AttributeStreamRequest]
Responses = Iterable[pb.AttributeStreamResponse]
ONE = np.zeros((1, 3, 2, 2), np.float32)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sidelight")
    return caplog


def lines(log: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(each.levelname, each.getMessage()) for each in log.records if each.name == "sidelight"]


def echo(requests: Requests) -> Responses:
    yield from map(answer, requests)


def explain(address: str, images: object = ONE, **options: Any) -> None:
    with sidelight.connect(address, connect_timeout=10) as client:
        client.attribute(images, **options)


def stream(address: str, batches: Iterable[object]) -> None:
    with sidelight.connect(address, connect_timeout=10) as client:
        list(client.stream(batches))


def test_successful_requests_are_not_logged(log: pytest.LogCaptureFixture) -> None:
    with scripted(echo) as address:
        explain(address)
        stream(address, [ONE] * 5)
    assert lines(log) == []


def test_a_retried_call_is_logged_in_one_line_each_time(log: pytest.LogCaptureFixture) -> None:
    def full(requests: Requests) -> Responses:
        raise Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("retry-after-ms", "20"),))
        yield

    with scripted(full, full, echo) as address:
        explain(address)
    assert lines(log) == [("INFO", "calling again in 0.02 s: ResourceExhausted: full")] * 2


def test_a_batch_that_is_sent_again_is_logged_in_one_line(log: pytest.LogCaptureFixture) -> None:
    def full(requests: Requests) -> Responses:
        yield failure(next(requests), 8, delay_s=0.02)
        yield from map(answer, requests)

    with scripted(full) as address:
        stream(address, [sidelight.Batch(ONE, id="mine")])
    assert lines(log) == [("INFO", "batch mine: sent again in 0.02 s: as the script says")]


def test_a_reconnect_is_logged_in_one_line_as_a_warning_after_a_cut(log: pytest.LogCaptureFixture) -> None:
    def aged(requests: Requests) -> Responses:
        yield answer(next(requests))
        raise Ended(grpc.StatusCode.OK, trailers=(("sidelight-end", "age"),))

    def cut(requests: Requests) -> Responses:
        next(requests)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")
        yield

    with scripted(aged, cut, echo) as address:
        stream(address, [ONE] * 5)
    (first, text), (second, more) = lines(log)
    assert (first, text) == ("INFO", f"{address}: the stream's call ended, reconnecting: the server ended the stream")
    assert (second, more) == ("WARNING", f"{address}: the stream's call ended, reconnecting: cut")


def test_a_split_batch_is_logged_in_one_line(log: pytest.LogCaptureFixture) -> None:
    def small(requests: Requests) -> Responses:
        for request in requests:
            yield answer(request) if request.attribute.images.tensor.shape[0] < 2 else failure(request, 8)

    with scripted(echo, max_batch_examples=2) as address:
        explain(address, np.concatenate([ONE] * 5))
    ((level, text),) = lines(log)
    assert level == "INFO"
    assert text.endswith(": sent in 3 parts, over the limits of one message")
    log.clear()
    with scripted(small) as address:
        stream(address, [np.concatenate([ONE] * 2)])
    assert lines(log) == [("INFO", "batch 0: split in two: as the script says")]
