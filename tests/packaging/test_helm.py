"""The Helm chart: by default it renders the manifest of deploy/kubernetes, and it scales by the backlog."""

import subprocess
from typing import Any

import pytest
import yaml

from support import ROOT
from support.components import HELM

CHART = ROOT / "deploy" / "helm"
MANIFEST = ROOT / "deploy" / "kubernetes" / "replicas.yaml"
METRICS = (ROOT / "docs" / "reference" / "observability.md").read_text()

pytestmark = pytest.mark.requires("helm")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [HELM, "template", "sidelight", CHART, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def rendered(*options: str) -> dict[tuple[str, str], dict[str, Any]]:
    done = run(*options)
    assert done.returncode == 0, done.stderr
    return by_name(done.stdout)


def by_name(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text) if each}


def without_comments(settings: str) -> list[str]:
    return [line.partition("#")[0].rstrip() for line in settings.splitlines()]


def test_by_default_the_chart_is_the_manifest_and_envoys_configuration() -> None:
    ours, plain = rendered(), by_name(MANIFEST.read_text())
    envoy = ours.pop(("ConfigMap", "sidelight-envoy"))
    assert envoy["data"]["envoy.yaml"] == (ROOT / "deploy" / "envoy" / "envoy.yaml").read_text()
    pods = ours["Deployment", "sidelight-replicas"]["spec"]["template"]["metadata"]["annotations"]
    assert pods.pop("sidelight/settings")
    settings = [each["ConfigMap", "sidelight-replicas"]["data"] for each in (ours, plain)]
    assert len({tuple(without_comments(each.pop("sidelight.toml"))) for each in settings}) == 1
    assert ours == plain


@pytest.mark.parametrize("by", ["", "keda", "hpa"])
def test_the_rendered_manifests_match_the_schema_of_kubernetes(by: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for (kind, _), each in rendered("--set", f"autoscaling.by={by}").items():
        if kind != "ScaledObject":  # KEDA's own
            validate.validate(each, validate.latest_version(), strict=True)


@pytest.mark.parametrize(("by", "kind"), [("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")])
def test_replicas_are_scaled_by_an_existing_metric(by: str, kind: str) -> None:
    ours = rendered("--set", f"autoscaling.by={by}", "--set", "autoscaling.backlogSeconds=3")
    deployment, scaler = ours["Deployment", "sidelight-replicas"], ours[kind, "sidelight-replicas"]["spec"]
    assert "replicas" not in deployment["spec"]  # otherwise each upgrade would undo the scaling
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    if by == "keda":
        (trigger,) = scaler["triggers"]
        metric, goal = trigger["metadata"]["query"], trigger["metadata"]["threshold"]
    else:
        pods = scaler["metrics"][0]["pods"]
        metric, goal = pods["metric"]["name"], pods["target"]["averageValue"]
    assert metric.removeprefix("sum(").removesuffix(")") == "sidelight_backlog_seconds"
    assert "`sidelight_backlog_seconds`" in METRICS
    assert goal == "3"


def test_settings_that_change_replace_the_pods() -> None:
    first, second = (
        rendered("--set", f"settings=model = '{each}'")["Deployment", "sidelight-replicas"]["spec"]["template"]
        for each in ("a", "b")
    )
    assert first["metadata"]["annotations"] != second["metadata"]["annotations"]


def test_an_unknown_scaling_is_refused_with_the_known_ones() -> None:
    done = run("--set", "autoscaling.by=cpu")
    assert done.returncode != 0
    assert 'autoscaling.by: got "cpu", expected "keda", "hpa" or nothing' in done.stderr
