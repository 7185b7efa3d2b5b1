"""Low memory: streams that wait for a message are ended, which frees their partial messages; no batch is lost."""

import asyncio
import contextlib
import itertools
import logging
import queue
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import sidelight
from sidelight_server.app.load_shedding import FALL_CHECKS, FALLS_AHEAD, MESSAGES_LEFT, SHARE_OF_LIMIT, LoadShedding
from sidelight_server.compute import host_memory
from sidelight_server.compute.host_memory import AvailableMemory

from benchmarks.support.cgroup import MemoryGroup
from benchmarks.support.http2_caller import STREAM, Caller, framed
from support.messages.attribution import assert_explains, attribute, floats, linear_maps
from support.messages.conversation import Conversation
from support.models import Linear
from support.servers.processes import process
from support.servers.running import TIMEOUT_S, Running, gated, running
from support.waiting import counts, leaving_nothing, until

MEBIBYTE = 2**20
NONE = AvailableMemory(0, 1 << 30)

V1, V2 = "4:memory:/pod/own\n1:cpu:/pod/own\n0::/\n", "0::/pod/own\n"
MEMINFO = "MemTotal:       4000 kB\nMemFree:         100 kB\nMemAvailable:   3000 kB\nBuffers:    7 kB\n"


# How much memory is left.


def files(folder: Path, memberships: str, contents: dict[str, str]) -> tuple[Path, Path]:
    """Write the files below `proc` and `groups` in which the system reports a process's control groups and memory."""
    for name, content in ({"proc/self/cgroup": memberships} | contents).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "proc", folder / "groups"


def v1(folder: str, limit: int, usage: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"groups/memory{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"groups/memory{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"groups/memory{folder}/memory.stat": f"cache 5\ninactive_file 3\ntotal_inactive_file {inactive}\n",
    }


def v2(folder: str, limit: object, usage: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"groups{folder}/memory.max": f"{limit}\n",
        f"groups{folder}/memory.current": f"{usage}\n",
        f"groups{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\nslab 2\n",
    }


UNLIMITED_V1 = (1 << 63) - 4096
CASES = {
    "nothing tells": (V2, {}, None),
    "the machine": (V2, {"proc/meminfo": MEMINFO}, AvailableMemory(3000 * 1024, 4000 * 1024)),
    "a machine that does not tell what is available": (V2, {"proc/meminfo": "MemTotal:    4000 kB\n"}, None),
    "version 2": (V2, v2("/pod/own", 1000, 900, 50), AvailableMemory(150, 1000)),
    "version 2 without a limit": (V2, v2("/pod/own", "max", 900), None),
    "version 2 in a pod that has less": (
        V2,
        v2("/pod/own", 1000, 900) | v2("/pod", 950, 920),
        AvailableMemory(30, 950),
    ),
    "version 2 in a container that sees its group as the root": (V2, v2("", 1000, 600), AvailableMemory(400, 1000)),
    "version 1": (V1, v1("/pod/own", 1000, 900, 50), AvailableMemory(150, 1000)),
    "version 1 without a limit": (V1, v1("/pod/own", UNLIMITED_V1, 900), None),
    "version 1 in a pod that has less": (
        V1,
        v1("/pod/own", UNLIMITED_V1, 9) | v1("/pod", 950, 920),
        AvailableMemory(30, 950),
    ),
    "version 1 in a container that sees its group as the root": (V1, v1("", 1000, 600), AvailableMemory(400, 1000)),
    "a machine that has less than the group": (
        V2,
        v2("/pod/own", 1 << 30, 0) | {"proc/meminfo": MEMINFO},
        AvailableMemory(3000 * 1024, 4000 * 1024),
    ),
    "no groups at all": ("", {"proc/meminfo": MEMINFO}, AvailableMemory(3000 * 1024, 4000 * 1024)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_available_memory_is_the_least_of_every_group_and_the_machine(
    case: tuple[str, dict[str, str], AvailableMemory | None], tmp_path: Path
) -> None:
    memberships, contents, expected = case
    assert host_memory.available_memory(*files(tmp_path, memberships, contents)) == expected


def test_a_system_without_these_files_reports_nothing(tmp_path: Path) -> None:
    assert host_memory.available_memory(tmp_path / "none", tmp_path / "neither") is None


def test_growing_memory_use_is_detected(tmp_path: Path) -> None:
    places = files(tmp_path, V2, v2("/pod/own", 1000, 100))
    assert host_memory.available_memory(*places) == AvailableMemory(900, 1000)
    (tmp_path / "groups/pod/own/memory.current").write_text("990\n")
    assert host_memory.available_memory(*places) == AvailableMemory(10, 1000)


def test_the_available_memory_of_this_machine_is_within_its_total() -> None:
    found = host_memory.available_memory()
    if found is None:
        pytest.skip("this system does not tell")
    assert found.left <= found.limit <= psutil.virtual_memory().total


# When streams are ended.


@pytest.mark.parametrize(
    ("room", "is_short"),
    [
        (None, False),
        (AvailableMemory(MESSAGES_LEFT * 1000, 1 << 40), False),
        (AvailableMemory(MESSAGES_LEFT * 1000 - 1, 1 << 40), True),
        (AvailableMemory(int(SHARE_OF_LIMIT * 8000), 8000), False),
        (AvailableMemory(int(SHARE_OF_LIMIT * 8000) - 1, 8000), True),
    ],
)
def test_streams_are_ended_only_while_memory_is_short(room: AvailableMemory | None, *, is_short: bool) -> None:
    asked: list[float] = []

    def end_waiting(waited_s: float) -> int:
        asked.append(waited_s)
        return 0

    assert (
        asyncio.run(LoadShedding(end_waiting, max_message_bytes=1000, available=lambda: room).check()) is not is_short
    )
    assert bool(asked) is is_short


@pytest.mark.parametrize("n_looks", [1, 2])
def test_what_freed_memory_gives_is_taken_first(n_looks: int) -> None:
    """Enough memory is free once the C library has returned its free pages, or once streams have ended."""
    short = AvailableMemory(MESSAGES_LEFT * 1000 - 1, 1 << 40)
    rooms, ended = itertools.chain([short] * n_looks, itertools.repeat(AvailableMemory(1 << 30, 1 << 30))), []
    shedding = LoadShedding(lambda _: ended.append(1) or 3, max_message_bytes=1000, available=lambda: next(rooms))
    assert asyncio.run(shedding.check())
    assert len(ended) == n_looks - 1


@pytest.mark.serial
def test_streams_are_ended_before_memory_that_falls_fast_is_short() -> None:
    least, step = MESSAGES_LEFT * 1000, 300
    rooms = (AvailableMemory(left, 1 << 40) for left in itertools.count(3 * least, -step))
    last = [next(rooms)]

    def room() -> AvailableMemory:
        last.append(next(rooms))
        return last[-1]

    async def ended_at() -> int:
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def end_waiting(_: float) -> int:
            if not ended.done():
                ended.set_result(last[-1].left)
            return 1

        running = asyncio.create_task(LoadShedding(end_waiting, max_message_bytes=1000, available=room).run())
        try:
            return await asyncio.wait_for(ended, TIMEOUT_S)
        finally:
            running.cancel()

    left = asyncio.run(ended_at())
    assert least + (FALLS_AHEAD - 1) * (FALL_CHECKS - 1) * step < left < least + (FALLS_AHEAD + 1) * FALL_CHECKS * step


def shed(server: Running, *, n: int) -> None:
    """Report little memory until `n` more streams have been ended."""
    service = server.server.calls
    shedding = LoadShedding(service.end_waiting, max_message_bytes=1000, available=lambda: NONE)
    wanted = service.n_shed + n

    def reached() -> bool:
        server.run(shedding.check())
        return service.n_shed >= wanted

    until(server, reached)


def test_unfinished_messages_are_freed_and_streams_end_with_ok(
    tmp_path: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(Linear(), tmp_path, device=device) as server, leaving_nothing(server):
        quiet = counts(server)
        with Caller(server.server.addresses[0]) as caller, Conversation(server.channel) as good:
            good.send(attribute("first", floats(2)))
            assert_explains(good.receive(), floats(2))
            calls = [caller.begin(STREAM) for _ in range(5)]
            for call in calls:
                assert caller.send(call, framed(bytes(MEBIBYTE), n_bytes=8 * MEBIBYTE)) > MEBIBYTE
            with caplog.at_level(logging.WARNING, "sidelight"):
                shed(server, n=6)
            results = [caller.result(call) for call in calls]
            assert {(each.status, each.trailers["sidelight-end"]) for each in results} == {(0, "age")}
            assert good.end() == ([], grpc.StatusCode.OK, "age")
            until(server, lambda: not server.counts().streams > quiet.server.streams)
        lines = [str(record.msg) for record in caplog.records if "event=streams_shed" in str(record.msg)]
        assert lines
        assert sum(int(line.partition("streams=")[2].split()[0]) for line in lines) == 6


def test_what_was_read_is_answered_before_a_stream_ends(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(2)))
        assert gate.reached.wait(TIMEOUT_S)
        shed(server, n=1)
        stream.send(attribute("late", floats(3)))
        gate.open()
        answers, code, cause = stream.end()
        assert (code, cause) == (grpc.StatusCode.OK, "age")
        assert [each.id for each in answers] == ["running"]
        assert_explains(answers[0], floats(2))
        server.until_all_permits_are_back()


def test_a_stream_that_is_not_read_is_left_alone(tmp_path: Path, device: str) -> None:
    """It holds no more than 64 KiB of a message; its caller is held back by flow control."""
    with (
        gated(tmp_path, device=device, max_stream_in_flight=1) as (gate, server),
        Conversation(server.channel) as stream,
    ):
        stream.send(*(attribute(str(i), floats(1, seed=i)) for i in range(4)))
        assert gate.reached.wait(TIMEOUT_S)
        service = server.server.calls
        until(server, lambda: all(not each.waited_s for each in service._streams))
        assert server.run(_end_waiting(server)) == 0
        gate.open()
        assert [stream.receive().id for _ in range(4)] == list("0123")
        assert stream.finish() == []


async def _end_waiting(server: Running) -> int:
    return server.server.calls.end_waiting(0.0)


# Callers whose streams are ended open others once they have something to send.


def assert_all(answers: list[sidelight.Attribution], n: int) -> None:
    assert [each.index for each in answers] == list(range(n))
    for each in answers:
        # float32 against the closed form in float64.
        expected = linear_maps(floats(1 + each.index % 3, seed=each.index))
        np.testing.assert_allclose(each.maps, expected, rtol=1e-4, atol=1e-8)


def test_a_client_whose_idle_stream_is_ended_opens_another(tmp_path: Path, device: str) -> None:
    answered: queue.SimpleQueue[int] = queue.SimpleQueue()

    with running(Linear(), tmp_path, device=device) as server, leaving_nothing(server):

        def batches() -> Iterator[np.ndarray]:
            for number in range(4):
                yield floats(1 + number % 3, seed=number)
                assert answered.get(timeout=TIMEOUT_S) == number
                shed(server, n=1)

        answers = []
        with sidelight.connect(server.server.addresses[0]) as client:
            for answer in client.stream(batches(), ordered=True):
                answers.append(answer)
                answered.put(answer.index)
        assert_all(answers, 4)


def test_an_asynchronous_client_whose_idle_stream_is_ended_opens_another(tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, device=device) as server, leaving_nothing(server):

        async def ask() -> list[sidelight.Attribution]:
            answered: asyncio.Queue[int] = asyncio.Queue()

            async def batches() -> AsyncIterator[np.ndarray]:
                for number in range(4):
                    yield floats(1 + number % 3, seed=number)
                    assert await answered.get() == number
                    await asyncio.to_thread(shed, server, n=1)

            answers = []
            async with sidelight.aio.connect(server.server.addresses[0]) as client:
                async for answer in client.stream(batches(), ordered=True):
                    answers.append(answer)
                    answered.put_nowait(answer.index)
            return answers

        assert_all(asyncio.run(asyncio.wait_for(ask(), TIMEOUT_S)), 4)


def test_a_client_whose_streams_are_ended_all_the_time_gets_every_answer_once(tmp_path: Path, device: str) -> None:
    n = 60
    with running(Linear(), tmp_path, device=device) as server, leaving_nothing(server):

        def batches() -> Iterator[np.ndarray]:
            for number in range(n):
                if number % 5 == 4:
                    server.run(_end_waiting(server))
                yield floats(1 + number % 3, seed=number)

        with sidelight.connect(server.server.addresses[0]) as client:
            assert_all(list(client.stream(batches(), ordered=True, window=4)), n)


# A process that would be killed.


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with contextlib.closing(MemoryGroup(700 * MEBIBYTE)) as group:
        if group.path is None:
            pytest.skip("no control group can be made")
        yield group


@pytest.mark.slow
def test_unfinished_messages_that_hold_more_than_the_limit_end_no_process(group: MemoryGroup, tmp_path: Path) -> None:
    """Fourteen messages of 62 MiB without their last byte, 868 MiB of 700, and a good stream at the same time."""
    n, size, to = 14, 62 * MEBIBYTE, f"unix:{tmp_path}/socket"
    calls: list[tuple[Caller, int]] = []

    def batches() -> Iterator[np.ndarray]:
        for number in range(n):
            caller = stack.enter_context(Caller(to))
            calls.append((caller, caller.begin(STREAM)))
            caller.send(calls[-1][1], framed(bytes(size - 1), n_bytes=size))
            yield np.full((1, 3, 16, 16), number, np.float32)

    with process("small", to) as served, sidelight.connect(to) as client, contextlib.ExitStack() as stack:
        group.take(served.pid)
        assert [answer.index for answer in client.stream(batches(), ordered=True)] == list(range(n))
        ended = [caller.result(call) for caller, call in calls[:3]]
        assert {(each.status, each.trailers["sidelight-end"]) for each in ended} == {(0, "age")}
        assert served.poll() is None
        assert 4 * size < group.peak() < 700 * MEBIBYTE
