"""Real Prometheus reads a server's metrics, and answers what the dashboard and the alerts ask of it."""

import contextlib
import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sidelight
import sidelight_server
import yaml
from sidelight_server import ModelSpec
from torch import nn

from support import ROOT

RULES = ROOT / "deploy" / "prometheus" / "sidelight.rules.yaml"
BOARD = json.loads((ROOT / "deploy" / "grafana" / "sidelight.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "reference" / "observability.md").read_text(encoding="utf-8")
VARIABLES = {"$job": ".*", "$instance": ".*", "$model": ".*", "$__rate_interval": "30s"}
PATIENCE_S = 30.0
ONLY_ON_A_GPU = {"sidelight_device_free_bytes"}

pytestmark = pytest.mark.requires("prometheus")


def alerts() -> list[dict[str, Any]]:
    return list(yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"])


class Sometimes(nn.Module):
    """The mean of each channel; it raises on an input that is 9 everywhere."""

    def forward(self, x: Any) -> Any:
        if bool((x == 9).all()):
            raise RuntimeError("nine")
        return x.mean((2, 3))


class Prometheus:
    """A running Prometheus."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.ask("query", query=expression)["result"])

    def value(self, expression: str) -> float:
        (only,) = self.query(expression)
        return float(only["value"][1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prometheus")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def prometheus(folder: Path, metrics_port: int) -> Iterator[Prometheus]:
    """A Prometheus that scrapes a server each second, while good, invalid and failing requests run."""
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(RULES)],
                "scrape_configs": [{"job_name": "x", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}],
            }
        )
    )
    own_port = free_port()
    spec = ModelSpec(Sometimes(), input_size=(3, 4, 4), name="sometimes")
    command = [
        "prometheus", "--log.level=error",
        f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{own_port}",
    ]  # fmt: skip
    with (
        sidelight_server.serve(spec, device="cpu", metrics_listen=f"127.0.0.1:{metrics_port}") as address,
        sidelight.connect(address) as client,
        subprocess.Popen(command) as process,
    ):
        found = Prometheus(f"127.0.0.1:{own_port}")
        try:
            until(lambda: found.query("sidelight_device_moves") != [])  # every counter has been scraped at zero
            for _ in range(4):
                use(client)
                time.sleep(1.1)
            yield found
        finally:
            process.terminate()


def use(client: sidelight.Client) -> None:
    ones, nines = np.ones((2, 3, 4, 4), np.float32), np.full((1, 3, 4, 4), 9, np.float32)
    client.attribute(ones, served_classes=[0, 1])
    list(client.stream([ones] * 3))
    assert client.attribute(nines, on_error="return").failures
    with pytest.raises(sidelight.InvalidArgument):
        client.attribute(ones, target=7)


def until(holds: Any) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if holds():
                return
        time.sleep(0.2)
    raise AssertionError("it took too long")


def test_promtool_accepts_the_metrics_and_the_rules(prometheus: Prometheus, metrics_port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read()
    subprocess.run(["promtool", "check", "metrics"], input=text, check=True, capture_output=True)
    subprocess.run(["promtool", "check", "rules", RULES], check=True, capture_output=True)


def test_prometheus_has_the_counts_of_the_requests(prometheus: Prometheus) -> None:
    until(lambda: prometheus.value('sum(sidelight_requests_total{call="AttributeStream"})') == 12)
    assert prometheus.value('sum(sidelight_requests_total{call="Attribute",code="OK"})') == 8
    assert prometheus.value('sum(sidelight_requests_total{code="INVALID_ARGUMENT"})') == 4
    assert prometheus.value('sidelight_failures_total{of="example",model="sometimes",reason="internal"}') == 4
    assert prometheus.value('sum(sidelight_total_seconds_count{model="sometimes"})') == 20


def test_every_panel_of_the_dashboard_has_data(prometheus: Prometheus) -> None:
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            assert prometheus.query(expression) or any(name in expression for name in ONLY_ON_A_GPU), expression


def test_every_alert_can_be_evaluated_and_the_right_ones_fire(prometheus: Prometheus) -> None:
    for alert in alerts():
        prometheus.query(alert["expr"])  # or an error

    def firing() -> set[str]:
        alerts = prometheus.ask("alerts")["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}

    until(lambda: firing() == {"SidelightFailing", "SidelightPredictionsDiffer"})


def test_the_page_describes_each_alert() -> None:
    assert re.findall(r"^\| `(Sidelight\w+)` \|", PAGE, re.MULTILINE) == [alert["alert"] for alert in alerts()]
