"""Replicas: three behind Envoy compared with one server on the same cores, and how soon a new replica gets a batch.

The first needs Envoy (`make envoy`) and is left out without it.
"""

import contextlib
import itertools
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import sidelight
import yaml
from sidelight._transport.channel import Connection
from sidelight_server.compute.torch_device import cpu_quota

from ..support.measure import Line, in_turns, ratio, server
from ..support.nets import SIZE

ROOT = Path(__file__).parent.parent.parent
ENVOY = ROOT / ".envoy" / "envoy" / "_bin" / "envoy"
CONFIGURATION = ROOT / "deploy" / "envoy" / "envoy.yaml"
MODEL = "python:benchmarks.support.nets:resnet18"
N_REPLICAS, N_STREAMS = 3, 6  # Envoy sends each stream to one replica
N_BATCHES, BATCH = 24, 4
N_STARTS = 5
TIMEOUT_S = 600.0
SHARE_GOAL, FIRST_BATCH_GOAL_S = 0.95, 5.0
NAME = "sidelight-replicas"


def run() -> list[Line]:
    """Measure both, ResNet-18 at 224², uint8 pixels."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8) for _ in range(N_BATCHES)]
    return [*([_throughput(batches)] if ENVOY.exists() else []), _first_batch(batches)]


def _throughput(batches: Sequence[np.ndarray]) -> Line:
    """The replicas have at least one thread each, so that on fewer than three cores they share them."""
    threads = max(1, cpu_quota() // N_REPLICAS)
    ports = [_free_port() for _ in range(N_REPLICAS)]
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(server(MODEL, "--threads", str(threads), address=f"127.0.0.1:{port}"))
        single, _ = stack.enter_context(server(MODEL, "--threads", str(cpu_quota())))
        proxy = stack.enter_context(_envoy(ports))
        one, several = (stack.enter_context(sidelight.connect(each)) for each in (single, proxy))
        rivals = {"one": lambda: _streams(one, batches), "several": lambda: _streams(several, batches)}
        seconds = in_turns(rivals, rounds=3)
    share = ratio(seconds["one"], seconds["several"])
    return Line(
        what=f"{N_REPLICAS} replicas of {threads} thread behind Envoy over one server of {cpu_quota()}",
        figure=share,
        unit="×",
        goal=f"≥ {SHARE_GOAL}",
        met=share >= SHARE_GOAL,
        detail=f"{N_BATCHES * BATCH / statistics.median(seconds['several']):.1f} images/s in {N_STREAMS} streams",
    )


def _streams(client: sidelight.Client, batches: Sequence[np.ndarray]) -> None:
    """Explain all batches in several concurrent streams."""

    def explain(own: Sequence[np.ndarray]) -> None:
        for _ in client.stream(own, timeout=TIMEOUT_S):
            pass

    threads = [threading.Thread(target=explain, args=(batches[i::N_STREAMS],)) for i in range(N_STREAMS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


def _first_batch(batches: Sequence[np.ndarray]) -> Line:
    """DNS is replaced by a list in this process; everything else is real. A replica is listed once it serves."""
    port, took_s = _free_port(), []
    hosts = ["127.0.0.1"]
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [each for name in (hosts if host == NAME else [host]) for each in look_up(name, *args, **kwargs)]

    with (
        mock.patch.object(socket, "getaddrinfo", getaddrinfo),
        server(MODEL, "--threads", "1", address=f"127.0.0.1:{port}"),
        server(MODEL, "--threads", "1", address=f"127.0.0.2:{port}"),
        sidelight.connect(f"dns:{NAME}:{port}") as client,
    ):
        pool = client._core.pool
        answers = client.stream(itertools.cycle(batches))
        next(answers)
        for _ in range(N_STARTS):
            hosts.append("127.0.0.2")
            began_s = time.monotonic()
            while not _has_answered(pool.connections):
                next(answers)
            took_s.append(time.monotonic() - began_s)
            hosts.remove("127.0.0.2")
            while len(pool.connections) > 1:
                next(answers)
        answers.close()
    return Line(
        what="from a new replica in DNS to its first answer",
        figure=statistics.median(took_s),
        unit="s",
        goal=f"≤ {FIRST_BATCH_GOAL_S:g}",
        met=statistics.median(took_s) <= FIRST_BATCH_GOAL_S,
        detail=f"{N_STARTS} times, {min(took_s):.2f} to {max(took_s):.2f} s; the name is looked up every two seconds",
    )


def _has_answered(connections: Sequence[Connection]) -> bool:
    return any(each.address.startswith("127.0.0.2:") and each.load.example_s(time.monotonic()) for each in connections)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def _envoy(ports: Sequence[int]) -> Iterator[str]:
    """Run Envoy as deploy/envoy configures it, with these replicas; yield its address."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    (listener,), (cluster,) = (configuration["static_resources"][each] for each in ("listeners", "clusters"))
    port = _free_port()
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    configuration["admin"]["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": _free_port()}
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": each}}}} for each in ports
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "envoy.yaml"
        path.write_text(yaml.safe_dump(configuration))
        command = [ENVOY, "-c", path, "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                yield f"127.0.0.1:{port}"
            finally:
                process.kill()
