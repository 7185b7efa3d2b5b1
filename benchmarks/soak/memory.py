"""Resident memory of the server over thousands of requests: `python -m benchmarks.soak.memory --requests 5000`."""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import psutil
import sidelight

from ..support.held import growth, settled
from ..support.measure import Line, report, server
from ..support.nets import SMALL

WARM_UP = 500


def run(n_requests: int = 5000) -> list[Line]:
    """Send requests of every kind, half of them on streams and one in twenty invalid, and compare resident memory."""
    with (
        server("python:benchmarks.support.nets:trimmed_cnn") as (address, pid),
        sidelight.connect(address) as client,
    ):
        process = psutil.Process(pid)
        _send(client, WARM_UP)
        before = settled(process)
        _send(client, n_requests)
        after = settled(process, before)
    return [growth(f"over {n_requests} requests", before, after)]


def _send(client: sidelight.Client, n_requests: int) -> None:
    rng = np.random.default_rng(0)

    def images(n: int) -> Iterator[object]:
        for i in range(n):
            shape = (1 + i % 8, SMALL + i % 3, SMALL, 3)  # some are resized
            yield b"no picture" if i % 20 == 0 else rng.integers(0, 256, shape, np.uint8)

    for answer in client.stream(images(n_requests // 2), on_error="return"):
        assert bool(answer.failures) == (answer.index % 20 == 0)
    for i, image in enumerate(images(n_requests - n_requests // 2)):
        answer = client.attribute(image, on_error="return")
        assert bool(answer.failures) == (i % 20 == 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    sys.exit(report(run(parser.parse_args().requests)))
