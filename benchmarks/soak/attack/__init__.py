"""Attacks by hostile callers on a server with default settings. `python -m benchmarks.soak.attack`.

Each attack runs alone, then all run together, in processes of their own, while one well-behaved streaming and one unary
caller run. The server may use 2 GiB of memory: a cgroup ends it above that, where one can be created. Finally each
attack runs while the server is stopped.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping

import numpy as np
import psutil
import sidelight

from ...support.cgroup import MemoryGroup
from ...support.held import growth, settled
from ...support.measure import Line
from .attacks import ATTACKS, BY_NAME, Attack, pixels
from .good import Good, p99
from .server import Served, attacked, served

SECONDS = 60.0  # of all attacks together
ALONE_S = 12.0  # of each attack alone: some 70 calls of each good caller
MEMORY_LIMIT = 2 * 2**30
DRAIN_S = 3.0
END_GOAL_S = DRAIN_S + 2
CHUNKS_GOAL = 4  # how many chunks longer a good call may wait than without the attack
REST_S = 30.0
WARM_UP_ALONE_S, WARM_UP_S = 2.0, 30.0  # then caches are full and pools have all their threads
AFTER_CALL_S = 5.0
QUIET_S = 10.0
# Threads of asyncio's pool: whether the warm-up starts all of them is chance.
POOLED = min(32, len(os.sched_getaffinity(0)) + 4)


def run(seconds: float = SECONDS) -> Iterator[Line]:
    """Run everything. Takes about `seconds` and nine minutes."""
    with contextlib.closing(MemoryGroup(MEMORY_LIMIT)) as group:
        yield from _attacks(seconds, group)
    for name, attack in ATTACKS.items():
        yield _end(name, attack)


def run_alone(names: list[str], seconds: float) -> Iterator[Line]:
    """Run some attacks, each alone, and nothing else."""
    with contextlib.closing(MemoryGroup(MEMORY_LIMIT)) as group, served() as running:
        group.take(running.pid)
        quiet, chunk_s = _quiet(running)
        for name in names:
            yield _latency(name, _beside({name: BY_NAME[name]}, running, seconds), quiet, chunk_s)
        yield _peak(group, psutil.Process(running.pid))


def _attacks(seconds: float, group: MemoryGroup) -> Iterator[Line]:
    with served() as running:
        group.take(running.pid)
        process = psutil.Process(running.pid)
        quiet, chunk_s = _quiet(running)
        yield _latency("no attack", quiet, quiet, chunk_s)
        for name, attack in ATTACKS.items():
            with attacked(running.address, {name: attack}):
                time.sleep(WARM_UP_ALONE_S)
        with attacked(running.address, ATTACKS):
            time.sleep(WARM_UP_S)
        _rest(running)
        before = settled(process)
        for name, attack in ATTACKS.items():
            good = _beside({name: attack}, running, ALONE_S)
            yield _latency(name, good, quiet, chunk_s)
        good = _beside(ATTACKS, running, seconds)
        yield _latency("all of them together", good, quiet, chunk_s, is_stated=True)
        _rest(running)
        after = settled(process, before)
        yield growth("over all attacks", before, after, more_threads=POOLED)
        yield _held(running)
        yield _peak(group, process)


def _quiet(running: Served) -> tuple[Good, float]:
    """Return good callers without an attack, and the duration of a chunk in seconds."""
    with sidelight.connect(running.good_address) as client:
        entry = next(each for each in client.info().models[0].warmup if each.chosen)
    return _beside({}, running, QUIET_S), entry.rows / entry.rows_per_second


def _rest(running: Served) -> None:
    """Wait until the server has noticed that callers were killed, and has returned what it freed.

    One call is made, because gRPC keeps the last message of an attack, up to 62 MiB, until the next call.
    """
    time.sleep(REST_S)
    with sidelight.connect(running.good_address) as client:
        client.attribute(pixels(1))
    time.sleep(AFTER_CALL_S)


def _beside(attacks: Mapping[str, Attack], running: Served, seconds: float) -> Good:
    """Run good callers beside attacks."""
    good = Good(running.good_address)
    with attacked(running.address, attacks), good.running():
        time.sleep(seconds)
    return good


def _held(running: Served) -> Line:
    """Check that the server holds nothing for requests and streams."""
    held = running.held()
    return Line(
        what="permits, bytes, rows and streams that the server still holds",
        figure=sum(held.values()),
        unit="",
        goal="0",
        met=not any(held.values()),
        detail=", ".join(f"{name} {value:g}" for name, value in held.items()),
    )


def _peak(group: MemoryGroup, process: psutil.Process) -> Line:
    return Line(
        what="peak memory of the server and its processes",
        figure=group.peak() / 2**20,
        unit="MiB",
        goal=f"≤ {MEMORY_LIMIT >> 20}, and never ended for it",
        met=process.is_running() and group.peak() <= MEMORY_LIMIT,
        detail="the limit of a cgroup" if group.path else "not limited: no cgroup could be created",
    )


def _latency(name: str, good: Good, quiet: Good, chunk_s: float, *, is_stated: bool = False) -> Line:
    """Return the line of good callers beside an attack. `is_stated`: the time has no goal."""
    unary_s, stream_s = p99(good.unary_s), p99(good.stream_s)
    lost = good.counts["lost"] + good.counts["wrong"]
    goal_s = p99(quiet.unary_s) + CHUNKS_GOAL * chunk_s
    return Line(
        what=f"p99 of a good unary call beside {name}",
        figure=1e3 * unary_s,
        unit="ms",
        goal="0 lost, 0 wrong" if is_stated else f"≤ {1e3 * goal_s:.0f}, 0 lost, 0 wrong",
        met=not lost and bool(good.counts["served"]) and (is_stated or unary_s <= goal_s),
        detail=f"{good.counts['served']} served, {good.counts['lost']} lost, {good.counts['wrong']} wrong; "
        f"p99 on a stream {1e3 * stream_s:.0f} ms, medians {1e3 * np.median(good.unary_s or [0]):.0f} and "
        f"{1e3 * np.median(good.stream_s or [0]):.0f} ms",
    )


def _end(name: str, attack: Attack) -> Line:
    """Stop a server in the middle of an attack, and measure how long it takes to exit."""
    with served("--drain-s", str(DRAIN_S)) as running:
        process = psutil.Process(running.pid)
        with attacked(running.address, {name: attack}, is_last=True):
            time.sleep(3)
            children = process.children(recursive=True)
            began = time.perf_counter()
            process.terminate()
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(60)
            took_s = time.perf_counter() - began
        gone, alive = psutil.wait_procs(children, timeout=2)
    return Line(
        what=f"from SIGTERM to the end in the middle of {name}",
        figure=took_s,
        unit="s",
        goal=f"≤ {END_GOAL_S:g}",
        met=took_s <= END_GOAL_S and not alive,
        detail=f"{len(gone)} processes of its own ended with it, {len(alive)} did not",
    )
