"""Sidelight itself, through its public client: a stream of one-image batches. Run in sidelight's environment."""

import os
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import sidelight

from .driver import IMAGES, Answer, Image, Loop, drive
from .rival import arguments

MODEL = "python:benchmarks.support.nets:resnet18"
FOLDED = ("--fold", "--channels-last")
CONNECT_TIMEOUT_S = 120.0  # the server imports torch and measures its chunk size


def streamed(address: str, images: Sequence[Image], at_once: int) -> Loop:
    """Stream the images, `at_once` of them unanswered. An image's latency begins when the client reads it."""
    with sidelight.connect(address) as client:  # a new connection, as for the peers: the server may have been paused
        client.info()
        return _streamed(client, images, at_once)


def _streamed(client: sidelight.Client, images: Sequence[Image], at_once: int) -> Loop:
    began_s: list[float] = []
    ended_s = [0.0] * len(images)
    answers: dict[int, Answer] = {}

    def batches() -> Iterator[Image]:
        for image in images:
            began_s.append(time.perf_counter())
            yield image

    began = time.perf_counter()
    for answer in client.stream(batches(), window=at_once):
        assert answer.index is not None
        ended_s[answer.index] = time.perf_counter()
        answers[answer.index] = Answer(answer.maps[0], answer.predictions[0].index)
    wall_s = time.perf_counter() - began
    latencies = [ended - began for began, ended in zip(began_s, ended_s, strict=True)]
    return Loop(wall_s, latencies, [answers[i] for i in range(len(images))])


def main() -> None:
    args = arguments(__doc__)
    address = f"127.0.0.1:{args.port}"
    if args.role == "serve":
        precision = ("--precision", args.precision) if args.precision else ()
        command = ["-m", "sidelight_server", "--model", MODEL, "--listen", address, "--threads", str(args.threads)]
        os.execv(sys.executable, [sys.executable, *command, *precision, *(FOLDED if args.folded else ())])
    images = np.load(args.folder / IMAGES)
    with sidelight.connect(address, connect_timeout=CONNECT_TIMEOUT_S) as client:
        client.attribute(images[0], timeout=CONNECT_TIMEOUT_S)
    drive(lambda some, at_once: streamed(address, some, at_once), images)


if __name__ == "__main__":
    main()
