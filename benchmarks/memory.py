"""Memory: the server's resident bytes over thousands of requests. `python -m benchmarks.memory --requests 5000`."""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import psutil
import sidelight
import sidelight_server
import torch
from torch import nn

from .held import growth, settled, without_reserve
from .measure import Line, report, server

SIZE = 64
WARM_UP = 500


def small() -> sidelight_server.ModelSpec:
    """Return a small CNN: the requests are many, so the model must be quick."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    return sidelight_server.ModelSpec(module, input_size=(3, SIZE, SIZE))


def trimmed() -> sidelight_server.ModelSpec:
    """Return it, in a server whose resident memory is what it uses."""
    without_reserve()
    return small()


def run(n_requests: int = 5000) -> list[Line]:
    """Send requests of every kind, half of them on streams, one in twenty of them bad, and compare resident memory."""
    with server("python:benchmarks.memory:trimmed") as (address, pid), sidelight.connect(address) as client:
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
            shape = (1 + i % 8, SIZE + i % 3, SIZE, 3)  # some are resized
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
