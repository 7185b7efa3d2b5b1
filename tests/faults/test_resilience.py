"""Streams lose no batch when servers die, shut down, are full, or return with another model.

Where possible the server is a real one in a process of its own; otherwise it follows a script.
"""

import asyncio
import contextlib
import contextvars
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import sidelight
import sidelight_server
from sidelight.v1 import attribution_pb2 as pb

from support import ROOT
from support.servers.processes import process
from support.servers.proxy import proxy
from support.servers.scripted import Ended, Script, answer, failure, mute, nobody, scripted
from support.tolerances import NEIGHBORS

ONE = np.zeros((1, 3, 2, 2), np.float32)
DRAINED = (("sidelight-end", "shutdown"),)

Requests = Iterator[pb.AttributeStreamRequest]
Responses = Iterator[pb.AttributeStreamResponse]


def echo(requests: Requests) -> Responses:
    """Answer everything at once."""
    yield from map(answer, requests)


def stream(address: str | list[str], batches: Iterable[object], **options: object) -> list[sidelight.Attribution]:
    options = {"on_error": "return", "ordered": True, "timeout": 30} | options
    with sidelight.connect(address, connect_timeout=10) as client:
        return list(client.stream(batches, **options))


def assert_all_answered(answers: list[sidelight.Attribution], n: int) -> None:
    assert [each.index for each in answers] == list(range(n))
    assert [each.error for each in answers] == [None] * n


# Ends of one call, of which the stream knows nothing.


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


def test_a_stream_at_its_greatest_age_goes_on_in_another() -> None:
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


def test_servers_that_shut_down_in_order_are_never_suspected_to_have_died() -> None:
    def draining(requests: Requests) -> Responses:
        next(requests)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "shutting down", DRAINED)
        yield

    with scripted(*[draining] * 5, echo) as address:
        assert_all_answered(stream(address, [ONE] * 3), 3)


def test_a_proxy_without_a_server_is_handed_no_batch_and_none_is_suspected_for_it() -> None:
    def dying(requests: Requests) -> Responses:
        next(requests)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")
        yield

    with scripted(dying, *[nobody] * 5, echo) as address:
        assert_all_answered(stream(address, [ONE]), 1)


@pytest.mark.parametrize("status", [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED], ids=str)
def test_an_end_that_no_other_call_will_mend_is_raised(status: grpc.StatusCode) -> None:
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


def test_a_batch_that_a_full_server_put_off_is_sent_again_after_its_delay_and_others_pass_it() -> None:
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


def test_a_delay_past_the_batchs_own_time_is_its_failure() -> None:
    def full(requests: Requests) -> Responses:
        for request in requests:
            yield failure(request, 8, delay_s=60)

    with scripted(full) as address:
        (answered,) = stream(address, [ONE], timeout=5)
    assert type(answered.error) is sidelight.ResourceExhausted
    assert answered.error.retry_delay_s == 60


@pytest.mark.parametrize("code", [3, 4, 5, 9, 13])
def test_a_failure_that_would_come_again_is_not_tried_again(code: int) -> None:
    n_asked = itertools.count()

    def failing(requests: Requests) -> Responses:
        for request in requests:
            next(n_asked)
            yield failure(request, code)

    with scripted(failing) as address:
        (answered,) = stream(address, [ONE])
    assert answered.error.code == code
    assert next(n_asked) == 1


def test_a_batch_that_a_server_refused_on_its_way_out_is_sent_again() -> None:
    def leaving(requests: Requests) -> Responses:
        yield failure(next(requests), 14)
        raise Ended(grpc.StatusCode.UNAVAILABLE, "shutting down", DRAINED)

    with scripted(leaving, echo) as address:
        assert_all_answered(stream(address, [ONE] * 2), 2)


def test_a_batch_has_what_is_left_of_its_time_when_it_is_sent_again() -> None:
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


def test_a_server_that_keeps_silent_past_a_batchs_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
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


# Batches too large for a message.


def test_a_batch_over_the_servers_limits_is_sent_in_parts_and_answered_whole() -> None:
    sizes = []

    def small(requests: Requests) -> Responses:
        for request in requests:
            sizes.append(request.attribute.images.tensor.shape[0])
            yield answer(request, value=sizes[-1])

    with scripted(small, max_batch_examples=4) as address:
        answers = stream(address, [np.zeros((10, 3, 2, 2), np.float32)], target=list(range(10)))
    assert sizes == [4, 4, 2]
    (whole,) = answers
    assert whole.maps[:, 0, 0].tolist() == [4.0] * 8 + [2.0] * 2
    assert len(whole.predictions) == len(whole.targets) == 10
    assert whole.provenance.target == "per example: " + ", ".join(map(str, range(10)))


def test_a_batch_that_the_server_finds_too_large_is_halved_until_it_is_taken() -> None:
    def narrow(requests: Requests) -> Responses:
        for request in requests:
            n = request.attribute.images.tensor.shape[0]
            yield failure(request, 8) if n > 2 else answer(request, value=n)

    with scripted(narrow) as address:
        (whole,) = stream(address, [np.zeros((7, 3, 2, 2), np.float32)])
        (single,) = stream(address, [ONE])
    assert whole.maps[:, 0, 0].tolist() == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert single.error is None


@pytest.mark.parametrize("limit", ["client", "server"])
def test_large_batches_stream_in_parts_and_give_the_maps_of_smaller_ones(
    spec: sidelight_server.ModelSpec, device: str, limit: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    pixels[7] = 0
    client_limit, server_limit = (50_000, 2**22) if limit == "client" else (2**22, 50_000)
    with (
        sidelight_server.serve(spec, device=device, max_message_bytes=server_limit) as address,
        sidelight.connect(address, connect_timeout=10, max_message_bytes=client_limit) as client,
    ):
        (whole,) = client.stream([pixels], probabilities=True, channels="none", keep_images=True)
        single = [client.attribute(each, probabilities=True, channels="none") for each in pixels[::13]]
    assert whole.maps.shape == (40, 3, 32, 32)
    assert whole.probabilities.shape == (40, 10)
    for each, i in zip(single, range(0, 40, 13), strict=True):
        np.testing.assert_allclose(whole.maps[i], each.maps[0], rtol=0, atol=NEIGHBORS * np.abs(each.maps).max())
        assert whole.predictions[i].index == each.predictions[0].index
    assert whole.picture(7).getextrema() == ((0, 0),) * 3


def test_an_example_that_fails_is_named_by_its_place_in_the_whole_batch(
    spec: sidelight_server.ModelSpec, device: str
) -> None:
    floats = np.zeros((30, 3, 32, 32), np.float32)
    floats[17, 0, 0, 0] = np.nan
    with (
        sidelight_server.serve(spec, device=device) as address,
        sidelight.connect(address, connect_timeout=10, max_message_bytes=100_000) as client,
    ):
        (whole,) = client.stream([floats], on_error="return")
    assert [each.example for each in whole.failures] == [17]
    assert np.isnan(whole.maps[17]).all()
    assert not np.isnan(np.delete(whole.maps, 17, axis=0)).any()


# Several servers.


def test_a_stream_goes_to_all_servers_and_to_each_batch_one() -> None:
    came = {name: threading.Event() for name in "ab"}
    indices = []

    def counting(name: str) -> Script:
        def script(requests: Requests) -> Responses:
            for request in requests:
                came[name].set()
                assert all(each.wait(30) for each in came.values())
                indices.append(int(request.attribute.id))
                yield answer(request)

        return script

    with scripted(counting("a")) as a, scripted(counting("b")) as b:
        assert_all_answered(stream([a, b], [ONE] * 40), 40)
    assert sorted(indices) == list(range(40))


def test_a_stream_goes_on_where_one_of_two_servers_dies() -> None:
    died = threading.Event()

    def dying(requests: Requests) -> Responses:
        yield answer(next(requests))
        died.set()
        raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")

    with scripted(dying, nobody) as a, scripted(echo) as b:
        assert_all_answered(stream([a, b], [ONE] * 50), 50)
    assert died.is_set()


def test_a_call_goes_to_another_server_where_one_is_absent(address: str) -> None:
    with sidelight.connect([f"unix:{ROOT}/absent", address], connect_timeout=10) as client:
        for _ in range(4):
            assert len(client.attribute(np.zeros((1, 3, 32, 32), np.float32))) == 1
        answers = list(client.stream([np.zeros((1, 3, 32, 32), np.float32)] * 10))
        assert len(answers) == 10


@pytest.mark.parametrize("addresses", [[], ["127.0.0.1:1", "127.0.0.1:1"], ["127.0.0.1:1", "x"], 5], ids=str)
def test_what_is_no_list_of_addresses_is_refused(addresses: object) -> None:
    with pytest.raises(sidelight.InvalidArgument, match="address"):
        sidelight.connect(addresses)


# Networks at their worst.


def tiny(n: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).normal(size=(1, 3, 32, 32)).astype(np.float32) for i in range(n)]


def test_a_network_that_is_cut_again_and_again_loses_and_doubles_nothing(address: str) -> None:
    with proxy(address) as network, sidelight.connect(network.address, connect_timeout=10) as client:
        places = []
        for each in client.stream(tiny(300), window=16, timeout=60):
            places.append(each.index)
            if len(places) in (20, 100, 101, 250):
                network.cut()
    assert sorted(places) == list(range(300))
    assert network.n_connections >= 4  # two of the cuts may meet one connection


def test_a_network_that_stalls_for_a_while_holds_the_stream_and_no_more(address: str) -> None:
    with proxy(address) as network, sidelight.connect(network.address, connect_timeout=10) as client:
        answers = client.stream(tiny(100), window=8, timeout=60)
        next(answers)
        network.stall()
        waiting = threading.Timer(1.0, network.flow)
        waiting.start()
        assert len(list(answers)) == 99
        assert network.n_connections == 1
        waiting.join()


def test_batches_of_a_stalled_network_go_to_another_server_once_it_is_cut(address: str) -> None:
    with proxy(address) as network, sidelight.connect([network.address, address], connect_timeout=10) as client:
        places = []
        for each in client.stream(tiny(300), window=32, timeout=60):
            places.append(each.index)
            if len(places) == 30:
                network.stall()
            if len(places) == 200:  # the other worker went on alone
                network.cut()
                network.flow()
    assert sorted(places) == list(range(300))


def test_a_network_that_delays_everything_costs_time_alone(address: str) -> None:
    with proxy(address) as network, sidelight.connect(network.address, connect_timeout=10) as client:
        network.delay_s = 0.02
        assert_all_answered(list(client.stream(tiny(60), ordered=True)), 60)


# Real servers that are really killed.


@contextlib.contextmanager
def rising_again(model: str, address: str) -> Iterator[list[int]]:
    """Run a server that is started again whenever it dies; yield the list of its process ids."""
    ids: list[int] = []
    ended = threading.Event()

    def keep() -> None:
        while not ended.is_set():
            with process(model, address) as server:
                ids.append(server.pid)
                started.set()
                while server.poll() is None and not ended.wait(0.02):
                    pass

    started = threading.Event()
    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        assert started.wait(60)
        yield ids
    finally:
        ended.set()
        keeper.join()


def batches_of(n: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).normal(size=(1 + i % 3, 3, 16, 16)).astype(np.float32) for i in range(n)]


def test_a_server_that_is_killed_under_a_stream_loses_and_doubles_nothing(tmp_path: Path) -> None:
    batches, address = batches_of(300), f"unix:{tmp_path}/socket"
    with rising_again("small", address) as ids, sidelight.connect(address, connect_timeout=60) as client:
        undisturbed = list(client.stream(batches, ordered=True))
        places = []
        for each in client.stream(batches, window=8, timeout=60):
            places.append(each.index)
            if len(places) in (50, 200):
                os.kill(ids[-1], signal.SIGKILL)
            expected = undisturbed[each.index].maps
            np.testing.assert_allclose(each.maps, expected, rtol=0, atol=NEIGHBORS * expected.max())
    assert sorted(places) == list(range(300))
    assert len(ids) == 3


def test_a_batch_that_kills_its_server_is_given_up_and_the_rest_goes_on(tmp_path: Path) -> None:
    batches, address = batches_of(40), f"unix:{tmp_path}/socket"
    batches[20][:] = 666.0
    with rising_again("poisoned", address) as ids:
        with sidelight.connect(address, connect_timeout=60) as client:
            answers = list(client.stream(batches, ordered=True, on_error="return"))
        n_deaths = len(ids) - 1
    assert [each.index for each in answers] == list(range(40))
    assert [each.index for each in answers if each.error is not None] == [20]
    assert type(answers[20].error) is sidelight.exceptions.ServerDied
    assert n_deaths <= 3


# Clients that go away.


def test_a_client_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    script = (
        "import itertools, numpy, sidelight, sys\n"
        "with sidelight.connect(sys.argv[1]) as client:\n"
        "    for answer in client.stream(itertools.repeat(numpy.zeros((1, 3, 16, 16), 'float32'))):\n"
        "        print('answered', flush=True)\n"
    )
    address = f"unix:{tmp_path}/socket"
    with process("small", address, "--max-in-flight", "1") as server:
        observed = psutil.Process(server.pid)
        with sidelight.connect(address, connect_timeout=10) as client:
            client.attribute(batches_of(1)[0])
        n_descriptors = None
        for _ in range(3):
            with subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE, text=True) as caller:
                assert caller.stdout.readline() == "answered\n"
                caller.kill()
            with sidelight.connect(address, connect_timeout=10) as client:
                client.attribute(batches_of(1)[0], timeout=30)  # refused to the end, were the one permit not back
            n_descriptors = n_descriptors or observed.num_fds()
        until_s = time.monotonic() + 30
        while observed.num_fds() > n_descriptors and time.monotonic() < until_s:  # a connection ends a moment later
            time.sleep(0.05)
        assert observed.num_fds() <= n_descriptors


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


def test_a_target_for_each_example_fits_a_shorter_last_batch() -> None:
    asked: list[list[int]] = []

    def noting(requests: Requests) -> Responses:
        for request in requests:
            asked.append([each.index for each in request.attribute.target.per_example.classes])
            yield answer(request)

    with scripted(noting) as address, sidelight.connect(address) as client:
        list(client.stream([np.concatenate([ONE] * 3), np.concatenate([ONE] * 2)], target=[5, 6, 7]))
    assert sorted(asked) == [[5, 6], [5, 6, 7]]


@pytest.mark.parametrize("way", ["attribute", "stream", "aio"])
def test_a_call_waits_for_a_server_no_longer_than_its_timeout(way: str, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/nobody"

    async def asynchronous() -> None:
        async with sidelight.aio.connect(address, connect_timeout=600) as client:
            await client.attribute(ONE, timeout=0.3)

    with sidelight.connect(address, connect_timeout=600) as client:
        calls = {
            "attribute": lambda: client.attribute(ONE, timeout=0.3),
            "stream": lambda: list(client.stream([ONE], timeout=0.3)),
            "aio": lambda: asyncio.run(asynchronous()),
        }
        with pytest.raises(sidelight.Unavailable, match=r"no server answers at .* after 0\.3 s"):
            calls[way]()


def test_a_streams_call_is_made_in_the_callers_context_and_brings_its_metadata() -> None:
    """Tracing finds the caller's span in the context."""
    span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")
    seen: list[tuple[str, object]] = []
    seen_in: list[str] = []  # the span while a batch is read

    def living(requests: Requests) -> Responses:
        yield from map(answer, requests)

    with scripted(living) as address, sidelight.connect(address) as client:
        (connection,) = client._core.pool.connections
        opened = connection.open_stream

        def opening(*arguments: object, **options: object) -> object:
            seen.append((span.get(), options["metadata"]))
            return opened(*arguments, **options)

        connection.open_stream = opening
        span.set("the caller's")
        batches = (seen_in.append(span.get()) or ONE for _ in range(2))
        assert len(list(client.stream(batches, metadata=[("traceparent", "00-1-2-01")]))) == 2
    assert seen_in == ["the caller's"] * 2
    assert seen == [("the caller's", (("traceparent", "00-1-2-01"),))]


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


# Calls that are cut or refused, and what is tried again.

FULL = (("retry-after-ms", "50"),)


@pytest.mark.parametrize("way", ["attribute", "aio"])
def test_a_call_that_its_caller_did_not_cancel_is_made_again(way: str) -> None:
    n_calls = itertools.count(1)

    def cancelling(requests: Requests) -> Responses:
        next(n_calls)
        raise Ended(grpc.StatusCode.CANCELLED, "too many resets")
        yield

    async def asynchronous(address: str, **options: Any) -> sidelight.Attribution:
        async with sidelight.aio.connect(address, connect_timeout=10, **options) as client:
            return await client.attribute(ONE)

    def synchronous(address: str, **options: Any) -> sidelight.Attribution:
        with sidelight.connect(address, connect_timeout=10, **options) as client:
            return client.attribute(ONE)

    def ask(address: str, **options: Any) -> sidelight.Attribution:
        return asyncio.run(asynchronous(address, **options)) if way == "aio" else synchronous(address, **options)

    with scripted(*[cancelling] * 4, echo) as address:
        assert len(ask(address)) == 1
        assert next(n_calls) == 5
    with scripted(cancelling) as address, pytest.raises(sidelight.exceptions.Cancelled, match="too many resets"):
        ask(address, retry=False)


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


def test_without_retry_what_a_server_at_its_greatest_age_has_not_read_is_still_sent() -> None:
    def aged(requests: Requests) -> Responses:
        yield answer(next(requests))
        next(requests)
        raise Ended(grpc.StatusCode.OK, trailers=(("sidelight-end", "age"),))

    with scripted(aged, echo) as address, sidelight.connect(address, retry=False) as client:
        assert_all_answered(list(client.stream([ONE] * 4, on_error="return", ordered=True)), 4)


@pytest.mark.parametrize("retry", [True, False])
def test_a_full_server_is_reported_as_full_within_the_calls_timeout(retry: bool) -> None:
    """A batch that is too large for one message is sent on a stream, which the server does not accept."""

    def full(requests: Requests) -> Responses:
        raise Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, "as many streams as may be", FULL)
        yield

    large = np.zeros((8, 3, 32, 32), np.float32)
    with (
        scripted(full, max_message_bytes=50_000, refused=True) as address,
        sidelight.connect(address, connect_timeout=600, retry=retry) as client,
        pytest.raises(sidelight.ResourceExhausted, match="as many streams as may be"),
    ):
        client.attribute(large, timeout=0.5 if retry else 600)


def test_a_call_that_the_client_cut_is_not_reported_as_cancelled_by_the_application(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sidelight._streaming.scheduling.resend_queue.GRACE_S", 0.1)

    def silent(requests: Requests) -> Responses:
        list(requests)
        yield from ()

    with scripted(silent, mute) as address, sidelight.connect(address, connect_timeout=0.5) as client:
        answers = client.stream(itertools.repeat(ONE), on_error="return", timeout=0.3)
        assert type(next(answers).error) is sidelight.DeadlineExceeded
        with pytest.raises(sidelight.Unavailable) as caught:
            list(answers)
    assert "did not answer within" in caught.value.message
    assert "Locally cancelled" not in caught.value.message


@pytest.mark.serial
def test_what_is_asked_before_a_call_takes_none_of_more_than_its_time(address: str) -> None:
    with proxy(address) as network, sidelight.connect(network.address, connect_timeout=10) as client:
        client.info()
        network.stall()
        began_s = time.monotonic()
        with pytest.raises(sidelight.DeadlineExceeded):
            client.attribute(ONE, model="which is asked for", timeout=0.3)
        assert time.monotonic() - began_s < 5  # the question alone may take 10 s
        network.flow()


def test_a_batch_whose_parts_two_models_answered_fails() -> None:
    def changing(requests: Requests) -> Responses:
        for i, request in enumerate(requests):
            yield answer(request, digest=f"model {i}")

    two = np.concatenate([ONE] * 2)
    with scripted(changing, max_batch_examples=1) as address:
        (failed,) = stream(address, [two], allow_model_change=True)
    assert type(failed.error) is sidelight.exceptions.ModelChanged


def test_a_list_of_classes_that_is_longer_than_the_first_batch_is_refused() -> None:
    with scripted(echo) as address:
        first, *_ = stream(address, [ONE, ONE], target=[5, 6, 7])
    assert isinstance(first.error, sidelight.InvalidArgument)
    assert "3 classes for 1 examples" in first.error.message
