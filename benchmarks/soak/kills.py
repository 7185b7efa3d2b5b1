"""Kills: servers killed under a stream, and callers killed in the middle of one. `python -m benchmarks.soak.kills`."""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import sidelight
import torch
from sidelight_server import Engine, Settings
from sidelight_server.app.server import Server

from ..support.measure import Line, report, server
from ..support.nets import SMALL, small_cnn

N_SERVER_KILLS, N_BATCHES = 20, 2000
N_CALLER_KILLS = 100
SHARE = 4e-6  # of a map's maximum: the promise for an example with other neighbors
SETTLE_S = 30.0

CALLER = f"""
import itertools, numpy, sidelight, sys
pixels = numpy.zeros((4, {SMALL}, {SMALL}, 3), numpy.uint8)
with sidelight.connect(sys.argv[1], shared_memory=sys.argv[2] == "shared") as client:
    for answer in client.stream(itertools.repeat(pixels)):
        print("answered", flush=True)
"""


def run(n_server_kills: int = N_SERVER_KILLS, n_caller_kills: int = N_CALLER_KILLS) -> list[Line]:
    """Kill servers under one stream, then callers of one server."""
    logging.getLogger("sidelight").setLevel(logging.ERROR)  # the client logs a warning after each kill
    return [_servers(n_server_kills), asyncio.run(_callers(n_caller_kills))]


def batches(n: int) -> Iterator[np.ndarray]:
    """Yield batches of one to four pictures, the same ones each time."""
    for i in range(n):
        yield np.random.default_rng(i).integers(0, 256, (1 + i % 4, SMALL, SMALL, 3), np.uint8)


@contextlib.contextmanager
def rising(model: str, address: str, *flags: str) -> Iterator[list[int]]:
    """Run a server that is restarted whenever it dies; yield the list of its process ids."""
    ids: list[int] = []
    ended, started = threading.Event(), threading.Event()

    def keep() -> None:
        while not ended.is_set():
            with server(model, *flags, address=address) as (_, pid):
                ids.append(pid)
                started.set()
                process = psutil.Process(pid)
                while not ended.is_set():
                    with contextlib.suppress(psutil.TimeoutExpired):
                        process.wait(0.1)
                        break

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        if not started.wait(120):
            raise RuntimeError("the server did not start")
        yield ids
    finally:
        ended.set()
        keeper.join()


def _servers(n_kills: int) -> Line:
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        address = f"unix:{folder}/socket"
        with (
            rising("python:benchmarks.support.nets:small_cnn", address) as ids,
            sidelight.connect(address, connect_timeout=120) as client,
        ):
            expected = {answer.index: answer.maps for answer in client.stream(batches(N_BATCHES))}
            rng, done = random.Random(0), threading.Event()

            def kill() -> None:
                for n in range(1, n_kills + 1):
                    if done.wait(0.2 + rng.random()):
                        return
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(ids[-1], signal.SIGKILL)
                    while len(ids) <= n and not done.wait(0.05):
                        pass

            killer = threading.Thread(target=kill)
            killer.start()
            began, places, wrong = time.perf_counter(), [], 0
            for answer in client.stream(_slowly(n_kills), timeout=600):
                places.append(answer.index)
                maps = expected[answer.index]
                wrong += not np.allclose(answer.maps, maps, rtol=0, atol=SHARE * maps.max())
            took_s = time.perf_counter() - began
            done.set()
            killer.join()
            n_deaths = len(ids) - 1
    once = sorted(places) == list(range(N_BATCHES))
    return Line(
        what=f"batches lost, doubled or changed of {N_BATCHES}, the server killed {n_deaths} times under their stream",
        figure=len(set(range(N_BATCHES)) ^ set(places)) + len(places) - len(set(places)) + wrong,
        unit="",
        goal=f"0, after {n_kills} kills",
        met=once and not wrong and n_deaths >= n_kills,
        detail=f"{took_s:.0f} s, the starts of {n_deaths} servers counted",
    )


def _slowly(n_kills: int) -> Iterator[np.ndarray]:
    """Yield batches until the kills are done."""
    for batch in batches(N_BATCHES):
        time.sleep(0.8 * n_kills / N_BATCHES)
        yield batch


async def _callers(n_kills: int) -> Line:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sidelight-", dir="/dev/shm") as shared:
        engine = Engine([small_cnn()], Settings(device="cpu", threads=1, shared_memory=Path(shared)))
        running = Server(engine, listen=(f"unix:{shared}/socket",))
        await running.start()
        try:
            counts: list[tuple[int, int, int, int]] = []
            for n in range(n_kills + 3):
                await asyncio.to_thread(_kill_a_caller, f"unix:{shared}/socket", "shared" if n % 2 else "inline")
                if n >= 2:  # fills caches and pools
                    n_files = counts[0][2] if counts else None
                    counts.append(await _settled(running, Path(shared), n_files))
        finally:
            await running.stop(drain_s=0)
    first, last = counts[0], counts[-1]
    return Line(
        what=f"permits, requests, descriptors and regions left by {n_kills} callers killed in the middle of a stream",
        figure=sum(map(abs, np.subtract(last, first))),
        unit="",
        goal="0",
        met=first == last and last[0] == last[1] == last[3] == 0,
        detail="permits {}, requests {}, descriptors {}, files {}".format(*last),
    )


def _kill_a_caller(address: str, way: str) -> None:
    with subprocess.Popen([sys.executable, "-c", CALLER, address, way], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout
        assert caller.stdout.readline() == "answered\n"
        caller.kill()


async def _settled(running: Server, folder: Path, n_files: int | None) -> tuple[int, int, int, int]:
    """Return the counts once the server is idle, or after `SETTLE_S` at the latest."""
    until_s = time.monotonic() + SETTLE_S
    while True:
        counts = (
            running.counts().permits,
            running.counts().requests,
            len(os.listdir("/proc/self/fd")),
            len(os.listdir(folder)) - 1,  # the socket
        )
        is_idle = not (counts[0] or counts[1] or counts[3])
        if (is_idle and counts[2] == (n_files or counts[2])) or time.monotonic() > until_s:
            return counts
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=N_SERVER_KILLS)
    parser.add_argument("--callers", type=int, default=N_CALLER_KILLS)
    chosen = parser.parse_args()
    sys.exit(report(run(chosen.servers, chosen.callers)))
