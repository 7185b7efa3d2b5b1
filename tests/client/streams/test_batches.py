"""Batches with a target, served classes and an id of their own, alone and in streams."""

import asyncio
import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
from sidelight import Batch
from sidelight.v1 import attribution_pb2 as pb

from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.servers.running import running
from support.servers.scripted import Ended, answer, failure, scripted
from support.tolerances import NEIGHBORS
from support.waiting import until

Requests = Iterator[pb.AttributeStreamRequest]
Responses = Iterable[pb.AttributeStreamResponse]
ONE = np.zeros((1, 3, 2, 2), np.float32)


def floats(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 32, 32)).astype(np.float32)


def stream(address: str, batches: Iterable[object], **options: Any) -> list[sidelight.Attribution]:
    options = {"ordered": True, "on_error": "return", "timeout": 30} | options
    with sidelight.connect(address, connect_timeout=10) as client:
        return list(client.stream(batches, **options))


def echo(requests: Requests) -> Responses:
    yield from map(answer, requests)


TARGETS = [None, 2, "class 1", [3, 0, 1], sidelight.TopK(2), sidelight.Contrast(0, 1)]


def test_each_batch_of_a_stream_may_have_a_target_of_its_own(client: sidelight.Client) -> None:
    images, labels = floats(3), client.model().labels
    targets = [labels[1] if target == "class 1" else target for target in TARGETS]
    answers = list(client.stream([Batch(images, target=each) for each in targets], target=0, ordered=True))
    for given, found in zip(targets, answers, strict=True):
        expected = client.attribute(images, target=0 if given is None else given)
        assert found.maps.shape == expected.maps.shape
        np.testing.assert_allclose(found.maps, expected.maps, rtol=0, atol=NEIGHBORS * np.abs(expected.maps).max())
        assert found.provenance.target == expected.provenance.target


def test_a_call_takes_a_batch_wherever_it_takes_images(client: sidelight.Client) -> None:
    images = floats(2)
    expected = client.attribute(images, target=[1, 2], served_classes=[1, 1])
    found = client.attribute(Batch(images, target=[1, 2], served_classes=[1, 1], id="mine"), target=0)
    assert found.id == "mine"
    assert found.provenance == expected.provenance
    assert [each.is_mismatch for each in found.predictions] == [each.is_mismatch for each in expected.predictions]
    np.testing.assert_array_equal(found.maps, expected.maps)


def test_a_target_and_served_classes_of_its_own_follow_a_batchs_examples_into_parts(device: str) -> None:
    images = floats(5)
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32))
    with (
        sidelight_server.serve(spec, device=device, max_message_bytes=3 * images[:1].nbytes) as address,
        sidelight.connect(address) as client,
    ):
        alone = [client.attribute(each, target=i % 3) for i, each in enumerate(images)]
        served = [each.predictions[0].index + i % 2 for i, each in enumerate(alone)]
        batch = Batch(images, target=[i % 3 for i in range(5)], served_classes=served, id="long")
        for found in (client.attribute(batch), *client.stream([batch, floats(1), batch], ordered=True, window=1)):
            if len(found) == 5:
                assert found.id == "long"
                assert [each.is_mismatch for each in found.predictions] == [False, True, False, True, False]
                for i, each in enumerate(alone):
                    np.testing.assert_allclose(found.maps[i], each.maps[0], rtol=0, atol=NEIGHBORS * each.maps.max())


def test_an_id_is_sent_comes_back_and_survives_a_retry_and_a_lost_server() -> None:
    asked: list[str] = []

    def dying(requests: Requests) -> Responses:
        asked.append(next(requests).attribute.id)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")
        yield

    def full(requests: Requests) -> Responses:
        for request in requests:
            asked.append(request.attribute.id)
            yield failure(request, 8, delay_s=0.01) if asked.count(request.attribute.id) < 3 else answer(request)

    with scripted(dying, full) as address:
        (answered,) = stream(address, [Batch(ONE, id="ünïque")])
    assert asked == ["ünïque"] * 3
    assert (answered.id, answered.error) == ("ünïque", None)


def test_an_id_survives_a_split_of_a_batch_that_its_server_finds_too_large() -> None:
    asked: list[str] = []

    def small(requests: Requests) -> Responses:
        for request in requests:
            asked.append(request.attribute.id)
            yield answer(request) if request.attribute.images.tensor.shape[0] < 2 else failure(request, 8)

    with scripted(small) as address:
        (answered,) = stream(address, [Batch(np.concatenate([ONE] * 3), id="a")])
    assert (answered.id, len(answered), answered.error) == ("a", 3, None)
    assert asked[0] == "a"
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("on_error", ["return", "raise"])
def test_two_unanswered_batches_with_one_id_are_refused_before_anything_is_sent(on_error: str) -> None:
    asked: list[str] = []

    def late(requests: Requests) -> Responses:
        first, last = next(requests), next(requests)
        asked.extend([first.attribute.id, last.attribute.id])
        yield answer(first)
        yield answer(last)
        yield from map(answer, requests)

    batches = [Batch(ONE, id="same"), Batch(ONE, id="same"), Batch(ONE, id="other")]
    with scripted(late) as address:
        if on_error == "raise":
            with pytest.raises(sidelight.InvalidArgument, match='id: "same" is used by a batch'):
                stream(address, batches, on_error="raise", ordered=False)
            return
        answers = stream(address, batches, window=3)
    assert asked == ["same", "other"]
    assert [each.id for each in answers] == ["same", "same", "other"]
    assert [type(each.error) for each in answers] == [type(None), sidelight.InvalidArgument, type(None)]


def test_an_id_may_be_used_again_once_its_batch_is_answered(client: sidelight.Client) -> None:
    is_answered = threading.Event()

    def batches() -> Iterator[Batch]:
        yield Batch(floats(1), id="again")
        assert is_answered.wait(30)
        yield Batch(floats(1), id="again")

    answers = client.stream(batches())
    assert next(answers).id == "again"
    is_answered.set()
    assert [(each.id, each.index) for each in answers] == [("again", 1)]


def test_ids_that_look_like_generated_ones_or_like_parts_are_answered_all_the_same() -> None:
    def slow(requests: Requests) -> Responses:
        held: list[pb.AttributeStreamRequest] = []
        for request in requests:
            held.append(request)
            assert len({each.attribute.id for each in held}) == len(held)
            if len(held) == 2:
                yield from map(answer, held)
                held.clear()
        yield from map(answer, held)

    three = np.concatenate([ONE] * 3)
    batches = [
        Batch(three, id="a"), Batch(ONE, id="a:0-2"), Batch(ONE, id="a:2-3"), Batch(ONE, id="5"), ONE, ONE, ONE,
    ]  # fmt: skip
    with scripted(slow, echo, max_batch_examples=2) as address:
        answers = stream(address, batches, window=20)
    assert [each.error for each in answers] == [None] * 7
    assert [each.id for each in answers[:4]] == ["a", "a:0-2", "a:2-3", "5"]
    assert len(answers[0]) == 3


def test_a_batch_without_an_id_is_given_one(client: sidelight.Client) -> None:
    assert [each.id for each in client.stream([floats(1)] * 3, ordered=True)] == ["0", "1", "2"]
    ids = [client.attribute(floats(1)).id for _ in range(3)]
    assert all(ids)
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    "id_", ["", 7, "x" * 101, "é" * 51, "\ud800"], ids=["empty", "int", "long", "wide", "surrogate"]
)
def test_an_invalid_id_is_refused(client: sidelight.Client, id_: Any) -> None:
    with pytest.raises(sidelight.InvalidArgument, match=r"^id: got "):
        client.attribute(Batch(floats(1), id=id_))
    refused, good = client.stream([Batch(floats(1), id=id_), floats(1)], ordered=True, on_error="return")
    assert isinstance(refused.error, sidelight.InvalidArgument)
    assert good.error is None


def test_the_longest_id_leaves_room_for_its_parts(client: sidelight.Client) -> None:
    with scripted(echo, max_batch_examples=1) as address:
        (answered,) = stream(address, [Batch(np.concatenate([ONE] * 12), id="é" * 50)])
    assert (answered.id, len(answered)) == ("é" * 50, 12)
    assert client.attribute(Batch(floats(1), id="é" * 50)).id == "é" * 50


@pytest.mark.parametrize("target", [[1], 1.5, "no such label", 10**30], ids=str)
def test_a_wrong_target_of_its_own_fails_its_batch_alone(client: sidelight.Client, target: Any) -> None:
    batches = [floats(2), Batch(floats(2), target=target, id="wrong"), floats(2)]
    good, wrong, last = client.stream(batches, ordered=True, on_error="return")
    assert (good.error, last.error, wrong.id) == (None, None, "wrong")
    assert isinstance(wrong.error or wrong.failures, sidelight.SidelightError)


def test_a_targets_list_is_measured_at_the_first_batch_without_a_target_of_its_own(client: sidelight.Client) -> None:
    batches = [Batch(floats(3), target=2), floats(2), floats(1)]
    answers = list(client.stream(batches, target=[1, 2], ordered=True))
    assert [[each.index for each in answer.targets] for answer in answers] == [[2, 2, 2], [1, 2], [1]]


def test_async_code_takes_the_same_batches(address: str, client: sidelight.Client) -> None:
    batches = [Batch(floats(2), target=i, id=f"batch {i}") for i in range(3)]

    async def ask() -> list[sidelight.Attribution]:
        async with sidelight.aio.connect(address) as asked:
            one = await asked.attribute(batches[1])
            return [one, *[each async for each in asked.stream(batches, ordered=True)]]

    one, *many = asyncio.run(asyncio.wait_for(ask(), 30))
    assert [one.id, *(each.id for each in many)] == ["batch 1", "batch 0", "batch 1", "batch 2"]
    for found, expected in zip(many, client.stream(batches, ordered=True), strict=True):
        assert found.provenance.target == expected.provenance.target
        np.testing.assert_allclose(found.maps, expected.maps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_closing_a_stream_frees_the_servers_slots(gate: Gate, tmp_path: Path, kind: str, device: str) -> None:
    """The server's permits are counted: taken while the batches are unanswered, and all back after `close()`."""
    endless = (floats(1, i) for i in itertools.count())
    with running(Gated(gate), tmp_path, device=device, max_chunk_rows=1) as server:
        address = server.server.addresses[0]
        first = floats(1)

        def taken() -> int:
            return server.counts().permits

        def synchronous() -> None:
            with sidelight.connect(address) as client:
                answers = client.stream(itertools.chain([first], endless), window=6)
                next(answers)
                gate.shut()
                until(server, lambda: taken() >= 4)
                answers.close()
                until(server, lambda: taken() <= 1)  # the row at the device runs to its end
                gate.open()
                until(server, lambda: taken() == 0)
                assert list(answers) == []

        async def asynchronous() -> None:
            async with sidelight.aio.connect(address) as client:
                answers = client.stream(itertools.chain([first], endless), window=6)
                await anext(answers)
                gate.shut()
                await asyncio.to_thread(until, server, lambda: taken() >= 4)
                await answers.aclose()
                await asyncio.to_thread(until, server, lambda: taken() <= 1)
                gate.open()
                await asyncio.to_thread(until, server, lambda: taken() == 0)
                assert [each async for each in answers] == []

        synchronous() if kind == "sync" else asyncio.run(asyncio.wait_for(asynchronous(), 60))
        server.until_all_permits_are_back()
