"""The HTTP endpoint of metrics: its address, its connections, and the dashboard and the page that name its metrics."""

import contextlib
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
from prometheus_client import CollectorRegistry
from sidelight.v1 import attribution_pb2 as pb
from sidelight_server import ConfigurationError, Engine, ModelSpec, Settings
from sidelight_server.app.metrics.metrics_http import N_CALLERS, MetricsServer
from sidelight_server.app.metrics.prometheus import Metrics
from sidelight_server.app.server import Server

from support import ROOT
from support.messages.attribution import ask, floats
from support.models import Linear
from support.servers.exposition import in_thread, scrape, scrape_of
from support.servers.running import TIMEOUT_S, running


def test_several_servers_in_one_process_report_their_own(spec: ModelSpec, tmp_path: Path) -> None:
    scrapes = []
    with contextlib.ExitStack() as stack:
        for n in (1, 2):
            server = Server(
                Engine([spec], Settings(device="cpu")), listen=[f"unix:{tmp_path}/{n}"], metrics_listen="127.0.0.1:0"
            )
            stack.enter_context(in_thread(server))
            with sidelight.connect(server.addresses[0]) as client:
                for _ in range(n):
                    client.attribute(np.zeros((1, 3, 32, 32), np.float32))
            scrapes.append(scrape(server.metrics))
    assert [each.sum("sidelight_total_seconds_count") for each in scrapes] == [1, 2]


def test_a_metrics_port_that_is_taken_does_not_stop_the_start(spec: ModelSpec, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = Server(Engine([spec], Settings(device="cpu")), listen=[f"unix:{tmp_path}/s"], metrics_listen=address)
        with in_thread(server), sidelight.connect(server.addresses[0]) as client:
            assert not client.attribute(np.zeros((1, 3, 32, 32), np.float32)).failures
    assert server.metrics == f"none: {address}: Address already in use"


@pytest.mark.parametrize("address", ["0.0.0.0:0", "9464", "localhost", "127.0.0.1:99999"])
def test_an_address_that_is_wrong_or_open_to_others_is_refused(spec: ModelSpec, address: str) -> None:
    with (
        pytest.raises(ConfigurationError, match="metrics_listen: "),
        sidelight_server.serve(spec, device="cpu", metrics_listen=address),
    ):
        pass


def test_closing_the_endpoint_ends_its_thread_beside_an_idle_connection() -> None:
    exposition = MetricsServer(CollectorRegistry(), "127.0.0.1:0", plaintext=False)
    host, port = exposition.address.split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S):  # an idle connection does not block others
        assert scrape(exposition.address).sum("process_open_fds") > 3
        exposition.close()
    assert not exposition._thread.is_alive()
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        scrape(exposition.address)


def test_idle_connections_to_the_endpoint_do_not_block_others() -> None:
    exposition = MetricsServer(CollectorRegistry(), "127.0.0.1:0", plaintext=False)
    host, port = exposition.address.split(":")
    with contextlib.closing(exposition), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)]
        assert scrape(exposition.address).sum("process_open_fds") > 3
        assert _n_answering(at_most=N_CALLERS) <= N_CALLERS
        for each in idle:
            each.close()
        assert _n_answering(at_most=0) == 0
        assert not exposition._callers


def _n_answering(*, at_most: int) -> int:
    """Wait until at most `at_most` threads answer scrapes, and return their number."""
    until_s = time.monotonic() + TIMEOUT_S
    while (n := sum("process_request_thread" in each.name for each in threading.enumerate())) > at_most:
        if time.monotonic() > until_s:
            break
        time.sleep(0.01)
    return n


# The dashboard and the page


def _names(tmp_path: Path) -> set[str]:
    """Every metric name of a server on which each has a value."""
    with running(Linear(), tmp_path, device="cpu") as server:
        served = pb.ServedPredictions(classes=[pb.ClassChoice(index=0)])
        server.stub.Attribute(ask(floats(1), served_classes=served), timeout=TIMEOUT_S)
        with pytest.raises(grpc.RpcError):
            server.stub.Attribute(ask(floats(1), method=pb.Method()), timeout=TIMEOUT_S)
        families = Metrics(server.engine, server.server.handler.telemetry.counters, server.counts).collect()
        empty = {f"{each.name}_total" if each.type == "counter" else each.name for each in families}
        return scrape_of(server).names | empty


def test_the_dashboard_queries_only_existing_metrics(tmp_path: Path) -> None:
    board = json.loads((ROOT / "deploy" / "grafana" / "sidelight.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    used = set(re.findall(r"\b(?:sidelight|process)_[a-z_]+", " ".join(asked)))
    assert len(used) > 15
    assert used <= _names(tmp_path)


def test_the_page_names_every_metric(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "reference" / "observability.md").read_text(encoding="utf-8")
    own = {name for name in _names(tmp_path) if name.startswith("sidelight_")}
    missing = {re.sub(r"_(bucket|count|sum)$", "", name) for name in own}
    assert {name for name in missing if f"`{name}`" not in page} == set()
