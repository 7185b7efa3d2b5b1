"""The end of a server under load: a drain, a kill, a hang."""

import itertools
import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import psutil
import sidelight

from ...support.measure import Line, server
from .model import MODEL, images

NOTICE_GOAL_S = {signal.SIGKILL: 5.0, signal.SIGSTOP: 45.0}
DRAIN_S = 5.0


def drain() -> Line:
    """Stop a server that has unanswered batches, and measure the time until it exits."""
    with server(MODEL, "--drain-s", str(DRAIN_S)) as (address, pid):
        process = psutil.Process(pid)
        n_answered = 0
        with sidelight.connect(address) as client:
            stream = client.stream(itertools.repeat(images(8)), method=sidelight.SmoothGrad(samples=25), timeout=60)
            for _ in itertools.islice(stream, 10):
                n_answered += 1
            began = time.perf_counter()
            process.terminate()
            code = process.wait(60)
            took_s = time.perf_counter() - began
    return Line(
        what="drain of a server under a stream, from SIGTERM to exit",
        figure=took_s,
        unit="s",
        goal=f"≤ {DRAIN_S:g}",
        met=took_s <= DRAIN_S + 0.5 and not code,
        detail=f"exit code {code}, {n_answered} batches answered before",
    )


def death(number: signal.Signals) -> Line:
    """Kill or stop one of two servers under a stream; measure the time until the other has answered its batches."""
    with server(MODEL) as (first, pid), server(MODEL) as (second, _), sidelight.connect([first, second]) as client:
        list(client.stream(images(2) for _ in range(50)))
        n_read, killed_s, waits, n_before = 0, 0.0, 0.0, 0
        places: list[int] = []

        def batches() -> Iterator[np.ndarray]:
            nonlocal n_read
            until_s = time.monotonic() + NOTICE_GOAL_S[number] + 20
            while time.monotonic() < until_s and not (killed_s and waits):
                n_read += 1
                yield images(2)

        for answer in client.stream(batches(), method=sidelight.SmoothGrad(samples=20), timeout=120):
            places.append(answer.index)
            if len(places) == 50:
                os.kill(pid, number)
                killed_s, n_before = time.monotonic(), n_read
                missing = set(range(n_before)) - set(places)
            elif killed_s and not waits:
                missing.discard(answer.index)
                if not missing:
                    waits = time.monotonic() - killed_s
        if number is signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
    once = sorted(places) == list(range(n_read))
    return Line(
        what=f"time until what a server had was answered by the other, after {number.name}",
        figure=waits,
        unit="s",
        goal=f"≤ {NOTICE_GOAL_S[number]:g}",
        met=once and 0 < waits <= NOTICE_GOAL_S[number],
        detail=f"{n_read} batches, each answered once: {once}",
    )
