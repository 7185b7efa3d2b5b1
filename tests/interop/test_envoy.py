"""Envoy, as deploy/envoy/envoy.yaml sets it up, in front of real replicas: one dies, another leaves."""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import sidelight
import yaml

from support import ROOT, TESTS
from support.components import ENVOY
from support.tolerances import NEIGHBORS

CONFIGURATION = ROOT / "deploy" / "envoy" / "envoy.yaml"
WITHIN_S = 60.0
PAUSE_S = 0.02
SOURCE = "python:support.models.crashing:small"

pytestmark = [
    pytest.mark.requires("envoy"),
    pytest.mark.skipif(importlib.util.find_spec("resource") is None, reason="POSIX signals"),
]


def until(is_so: Callable[[], bool], what: str) -> None:
    """Poll another process until a condition holds: it sends no event."""
    ends_s = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < ends_s, f"not within {WITHIN_S:g} s: {what}"
        threading.Event().wait(PAUSE_S)


@dataclass
class Replica:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int


@contextlib.contextmanager
def replica(port: int = 0) -> Iterator[Replica]:
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "sidelight_server", "--model", SOURCE, "--listen", address]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "SIDELIGHT_THREADS": "1", "SIDELIGHT_DRAIN_S": "20"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            serving_line = next(line for line in process.stderr if "event=serving" in line)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Replica(process, int(re.search(r"addresses=127\.0\.0\.1:(\d+)", serving_line)[1]))
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@dataclass
class Envoy:
    """The proxy, and its statistics of the replicas by port."""

    admin: str
    ports: list[int]
    address: str = field(init=False)

    def __post_init__(self) -> None:
        (listener,) = self.ask("listeners")["listener_statuses"]
        self.address = f"127.0.0.1:{listener['local_address']['socket_address']['port_value']}"

    def ask(self, what: str) -> dict:
        with urllib.request.urlopen(f"http://{self.admin}/{what}?format=json", timeout=10) as answer:
            return json.load(answer)

    def hosts(self) -> dict[int, dict]:
        (cluster,) = self.ask("clusters")["cluster_statuses"]
        return {each["address"]["socket_address"]["port_value"]: each for each in cluster.get("host_statuses", [])}

    def serves(self, port: int) -> bool:
        """Return whether the proxy routes calls to a replica."""
        status = self.hosts()[port]["health_status"]
        return not any(value is True for key, value in status.items() if key.startswith("failed_"))

    def calls(self, port: int, name: str = "rq_total") -> int:
        """Return how many calls were routed to a replica, or another of its counts."""
        counts = {each["name"]: int(each.get("value", 0)) for each in self.hosts()[port]["stats"]}
        return counts[name]


def localized(ports: list[int]) -> dict:
    """Return the shipped configuration with this machine's addresses instead of a cluster's."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    (listener,), (cluster,) = (configuration["static_resources"][each] for each in ("listeners", "clusters"))
    here = {"address": "127.0.0.1", "port_value": 0}
    listener["address"]["socket_address"] = here
    configuration["admin"]["address"]["socket_address"] = here
    (locality,) = cluster["load_assignment"]["endpoints"]
    locality["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": here | {"port_value": port}}}} for port in ports
    ]
    return configuration


@contextlib.contextmanager
def envoy(folder: Path, ports: list[int], *, n_serving: int | None = None) -> Iterator[Envoy]:
    """Run the proxy in front of replicas, and wait until all of them serve, or `n` of them."""
    (folder / "envoy.yaml").write_text(yaml.safe_dump(localized(ports)))
    admin = folder / "admin"
    command = [ENVOY, "-c", folder / "envoy.yaml", "--admin-address-path", admin, "--disable-hot-restart"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([*command, "--concurrency", "2", "--log-level", "warning"], stderr=log) as process,
    ):
        try:
            until(lambda: admin.exists() and bool(admin.read_text()), "Envoy is there")
            proxy = Envoy(admin.read_text().strip(), ports)
            until(lambda: all(map(proxy.serves, ports[:n_serving])), "all replicas serve")
            yield proxy
        finally:
            process.kill()


BATCHES = [np.random.default_rng(i).normal(size=(8, 3, 24, 24)).astype(np.float32) for i in range(10)]


@dataclass
class Load:
    """Streams of batches without end, each read by a thread of its own, until `end` is called."""

    client: sidelight.Client
    expected: list[np.ndarray]
    places: list[list[int]] = field(default_factory=list)
    wrong: list[object] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    sent: list[int] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def begin(self, n: int) -> None:
        for i in range(n):
            self.places.append([])
            self.sent.append(0)
            self.threads.append(threading.Thread(target=self._stream, args=(i,)))
            self.threads[-1].start()

    def _batches(self, i: int) -> Iterator[np.ndarray]:
        for batch in itertools.cycle(BATCHES):
            if self.ended.is_set():
                return
            self.sent[i] += 1
            yield batch

    def _stream(self, i: int) -> None:
        try:
            for each in self.client.stream(self._batches(i), window=32, timeout=60):
                self.places[i].append(each.index)
                expected = self.expected[each.index % len(BATCHES)]
                np.testing.assert_allclose(each.maps, expected, rtol=0, atol=NEIGHBORS * expected.max())
        except BaseException as error:
            self.wrong.append(error)
            raise

    def more(self, n: int = 20) -> None:
        """Wait until every stream has received `n` more answers."""
        goals = [len(each) + n for each in self.places]
        until(
            lambda: self.wrong or all(len(each) >= goal for each, goal in zip(self.places, goals, strict=True)),
            "every stream goes on",
        )
        assert self.wrong == []

    def end(self) -> None:
        """End all streams, and check that each batch was answered once, with its own maps."""
        self.ended.set()
        for each in self.threads:
            each.join(WITHIN_S)
        assert self.wrong == []
        assert [sorted(each) for each in self.places] == [list(range(n)) for n in self.sent]


@contextlib.contextmanager
def loaded(proxy: Envoy, *, n_streams: int) -> Iterator[Load]:
    with sidelight.connect(proxy.address, connect_timeout=60) as client:
        load = Load(client, [each.maps for each in client.stream(BATCHES, ordered=True)])
        load.begin(n_streams)
        try:
            yield load
        finally:
            load.ended.set()


@pytest.mark.slow
def test_streams_go_on_while_one_replica_is_killed_and_another_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as stack:
        first, second = stack.enter_context(replica()), stack.enter_context(replica())
        proxy = stack.enter_context(envoy(tmp_path, [first.port, second.port]))
        load = stack.enter_context(loaded(proxy, n_streams=4))
        load.more()
        assert min(proxy.calls(each, "rq_active") for each in proxy.ports) == 2  # of four: the replica with the fewest

        first.process.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        first.process.wait()
        until(lambda: not proxy.serves(first.port), "Envoy knows that one is dead")
        noticed_s = time.monotonic() - killed_s
        n_led = proxy.calls(first.port)
        load.more()
        assert proxy.calls(second.port, "rq_active") == 4
        for _ in range(20):
            load.client.info()
        assert proxy.calls(first.port) == n_led

        again = stack.enter_context(replica(first.port))
        until(lambda: proxy.serves(first.port), "Envoy knows that it is back")
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(WITHIN_S) == 0
        load.more()
        assert proxy.calls(again.port, "rq_active") == 4
        load.end()
    with capsys.disabled():
        print(f" [a killed replica gets no call after {noticed_s:.2f} s]", end="")


@pytest.mark.slow
def test_messages_as_large_as_the_server_takes_pass_envoy(tmp_path: Path) -> None:
    pixels = np.zeros((60, 3, 256, 256), np.float32)  # 47 MB, and maps of 16 MB
    with (
        replica() as one,
        envoy(tmp_path, [one.port]) as proxy,
        sidelight.connect(proxy.address, connect_timeout=60) as client,
    ):
        assert client.attribute(pixels).maps.shape == (60, 256, 256)
        (answer,) = client.stream([pixels])
        assert answer.maps.shape == (60, 256, 256)


@pytest.mark.nightly
def test_a_rolling_replacement_of_three_replicas_loses_no_batch(tmp_path: Path) -> None:
    """As a Deployment with maxSurge 1 and maxUnavailable 0: a new one serves before an old one is stopped."""
    with contextlib.ExitStack() as stack:
        replicas = [stack.enter_context(replica()) for _ in range(3)]
        spare = free_port()
        proxy = stack.enter_context(envoy(tmp_path, [*(each.port for each in replicas), spare], n_serving=3))
        load = stack.enter_context(loaded(proxy, n_streams=6))
        load.more()
        for old in replicas:
            new = stack.enter_context(replica(spare))
            until(lambda: proxy.serves(new.port), "Envoy has resolved the new one")  # noqa: B023
            old.process.send_signal(signal.SIGTERM)
            assert old.process.wait(WITHIN_S) == 0
            spare = old.port
            load.more()
        assert not any(proxy.calls(old.port, "rq_active") for old in replicas[2:])
        load.end()
