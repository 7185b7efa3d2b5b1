"""The driver: a process that sends images to one rival, as commanded, and reports how long each answer took.

A command is a line of JSON on its standard input, `{"n_images": 64, "at_once": 8, "answers": "PATH.npz" or null}`.
The reply is a line of JSON too. Imported in the peers' own environments: the standard library and numpy.
"""

import contextlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # [H, W, C]

IMAGES = "images.npy"  # in the folder that all processes share
FIRST_ANSWER_S = 120.0  # servers load torch and the model
RETRY_S = 0.1


class Answer(NamedTuple):
    """One image explained."""

    map: NDArray[np.float32]  # [H, W]
    predicted: int


@dataclass(frozen=True, slots=True)
class Loop:
    """The result of one closed loop."""

    wall_s: float
    latencies_s: Sequence[float]
    answers: Sequence[Answer]


ExplainAll = Callable[[Sequence[Image], int], Loop]  # the images, and how many are unanswered at a time
Connection = Callable[[], AbstractContextManager[Callable[[Image], Answer]]]


def drive_calls(folder: Path, connect: Connection) -> None:
    """Run the driver of a server that is called with one image at a time."""
    images = np.load(folder / IMAGES)
    wait_for(connect, images[0])
    drive(closed_loop(connect), images)


def closed_loop(connect: Connection) -> ExplainAll:
    """Return a closed loop of callers. Each has a connection of its own, and sends one image after the other."""

    def explain_all(images: Sequence[Image], at_once: int) -> Loop:
        turns, latencies = itertools.count(), [0.0] * len(images)
        answers: list[Answer | None] = [None] * len(images)
        start = threading.Barrier(at_once + 1)

        def caller() -> None:
            with connect() as ask:
                start.wait()
                while (turn := next(turns)) < len(images):
                    began = time.perf_counter()
                    answers[turn] = ask(images[turn])
                    latencies[turn] = time.perf_counter() - began

        threads = [threading.Thread(target=caller, daemon=True) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        start.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        wall_s = time.perf_counter() - began
        got = [answer for answer in answers if answer is not None]
        if len(got) < len(images):
            raise RuntimeError(f"{len(images) - len(got)} of {len(images)} images have no answer")
        return Loop(wall_s, latencies, got)

    return explain_all


def wait_for(connect: Connection, image: Image) -> None:
    """Wait until a server answers: each peer reports readiness in its own way."""
    until = time.monotonic() + FIRST_ANSWER_S
    while True:
        try:
            with connect() as ask:
                ask(image)
            return
        except Exception:
            if time.monotonic() > until:
                raise
        time.sleep(RETRY_S)


def drive(explain_all: ExplainAll, images: NDArray[np.uint8]) -> None:
    """Execute commands until standard input ends. The first line of output says that the rival is ready."""
    sys.stdout = sys.stderr  # libraries print
    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        loop = explain_all([images[i % len(images)] for i in range(order["n_images"])], order["at_once"])
        if order["answers"]:
            maps, predicted = zip(*loop.answers, strict=True)
            np.savez(Path(order["answers"]), maps=np.stack(maps), predicted=np.array(predicted))
        # The first images are sent together and meet an idle server: their latencies are those of no later image.
        latencies = loop.latencies_s[order["at_once"] :] or loop.latencies_s
        _say({"wall_s": loop.wall_s, "latencies_s": list(latencies)})


def _say(words: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the comparison is over
        print(json.dumps(words), file=sys.__stdout__, flush=True)
