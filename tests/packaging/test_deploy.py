"""deploy/ and the Dockerfile: they follow Kubernetes' schema, name existing settings, and agree with each other."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from sidelight_server.app.health.health_check import check_health, is_health_check
from sidelight_server.config.reading import read_settings
from sidelight_server.config.settings import Settings
from torch import nn

from support import ROOT

KSERVE = ROOT / "deploy" / "kserve"
MANIFESTS = sorted([*(ROOT / "deploy" / "kubernetes").glob("*.yaml"), *KSERVE.glob("*.yaml")])
OF_KSERVE = ("annotations", "minReplicas", "maxReplicas")  # fields of a component beside those of a pod
ENVOY = yaml.safe_load((ROOT / "deploy" / "envoy" / "envoy.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAGE = (ROOT / "deploy" / "README.md").read_text()
PATIENCE_S = 60
MINE = """
from sidelight_server import ModelSpec
from torch import nn

def factory():
    return ModelSpec(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), input_size=(3, 2, 2))
"""
STOPPING_S = 10  # that a drained server takes to end, at most: its last chunk

every_manifest = pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    return [each for each in documents(path) if each["kind"] == kind]


def pods(path: Path) -> list[dict[str, Any]]:
    return [each["spec"] for each in templates(path)]


def templates(path: Path) -> list[dict[str, Any]]:
    """Return the pods of a manifest and of its deployments, and those that KServe makes of its custom components."""
    found = of_kind(path, "Pod") + [each["spec"]["template"] for each in of_kind(path, "Deployment")]
    for each in of_kind(path, "InferenceService"):
        for component in each["spec"].values():
            if "containers" in component:
                spec = {name: value for name, value in component.items() if name not in OF_KSERVE}
                found.append({"metadata": {"annotations": component["annotations"]}, "spec": spec})
    return found


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return pod.get("initContainers", []) + pod["containers"]


def sidelights(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], Settings]]:
    """Yield each container of Sidelight with its pod, and its settings as the server reads them."""
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(path, "ConfigMap")}
    for pod in pods(path):
        for container in containers(pod):
            if container["image"] == "sidelight:latest":
                volumes = {each["name"]: each.get("configMap", {}).get("name") for each in pod["volumes"]}
                folders = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
                text = maps[folders[container["workingDir"]]]["sidelight.toml"]
                yield pod, container, Settings(**tomllib.loads(text))


@pytest.mark.requires("kubernetes")
@every_manifest
def test_the_manifests_match_the_schema_of_kubernetes(path: Path) -> None:
    import kubernetes_validate as validate

    assert len(documents(path)) > 1
    pods_of_kserve = [
        {"apiVersion": "v1", "kind": "Pod", **each, "metadata": {"name": "pod"}} for each in templates(path)
    ]
    for each in (*documents(path), *pods_of_kserve):
        if each["kind"] != "InferenceService":
            validate.validate(each, validate.latest_version(), strict=True)


@every_manifest
def test_manifests_name_only_existing_settings(path: Path) -> None:
    ours = list(sidelights(path))
    assert ours
    for _, container, settings in ours:
        assert settings.model
        assert not [*container.get("args", []), *container.get("command", [])]  # the file sets all of it
        known = {f"SIDELIGHT_{name.upper()}" for name in Settings.model_fields}
        assert {each["name"] for each in container.get("env", [])} <= known


@every_manifest
def test_the_grace_period_of_a_pod_is_longer_than_its_drain(path: Path) -> None:
    for pod, _, settings in sidelights(path):
        hooks = [each["lifecycle"]["preStop"]["sleep"]["seconds"] for each in containers(pod) if "lifecycle" in each]
        assert pod["terminationGracePeriodSeconds"] >= max(hooks, default=0) + settings.drain_s + STOPPING_S


@every_manifest
def test_probes_ask_where_the_server_listens(path: Path) -> None:
    for _, container, settings in sidelights(path):
        probes = [container[each] for each in ("startupProbe", "readinessProbe", "livenessProbe")]
        for each in probes:
            if "grpc" in each:
                assert f"0.0.0.0:{each['grpc']['port']}" in settings.listen
            else:
                program, *arguments = each["exec"]["command"]
                assert (program, is_health_check(arguments)) == ("sidelight-server", True)
                assert arguments[1] in settings.listen
        startup, _, liveness = probes
        assert startup["failureThreshold"] * startup["periodSeconds"] >= 300  # a large model loads
        assert liveness["failureThreshold"] * liveness["periodSeconds"] > settings.stuck_s


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def check(probe: dict[str, Any], moved: Callable[[str], str]) -> int:
    """Ask as the kubelet does: by the arguments of the command, or by grpc.health.v1 on the port."""
    if "exec" in probe:
        _, *arguments = map(moved, probe["exec"]["command"])
    else:
        asked = probe["grpc"]
        arguments = ["--check", moved(f"0.0.0.0:{asked['port']}"), "--service", asked.get("service", "")]
    return check_health(arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the layout of Triton's repositories
@every_manifest
def test_a_server_with_the_settings_of_a_manifest_passes_its_probes(path: Path, tmp_path: Path) -> None:
    ((_, container, settings),) = sidelights(path)
    folders = {each["mountPath"]: tmp_path / each["name"] for each in container["volumeMounts"]}
    ports = {f"0.0.0.0:{each['containerPort']}": f"127.0.0.1:{free_port()}" for each in container["ports"]}
    for folder in folders.values():
        folder.mkdir()

    def moved(text: str) -> str:
        """Replace the pod's folders and ports in a text by those of this machine."""
        for old, new in sorted({**{key: str(each) for key, each in folders.items()}, **ports}.items(), reverse=True):
            text = text.replace(old, new)
        return text

    here = folders[container["workingDir"]]
    (text,) = (
        each["data"]["sidelight.toml"] for each in of_kind(path, "ConfigMap") if "sidelight.toml" in each["data"]
    )
    (here / "sidelight.toml").write_text(moved(text))
    (here / "mine.py").write_text(MINE)
    if settings.weights:
        safetensors.torch.save_file(nn.Linear(12, 3).state_dict(prefix="1."), moved(str(settings.weights)))
    else:  # the file of a Triton's model repository
        file = Path(moved(settings.model.removeprefix("torchscript:")))
        file.parent.mkdir(parents=True)
        torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 3)), torch.zeros(1, 3, 224, 224)).save(
            file
        )
    environment = os.environ | {"SIDELIGHT_THREADS": "1"}
    environment |= {each["name"]: each["value"] for each in container.get("env", [])}
    with subprocess.Popen([sys.executable, "-m", "sidelight_server"], cwd=here, env=environment) as server:
        try:
            until_s = time.monotonic() + PATIENCE_S
            while check(container["startupProbe"], moved):
                assert server.poll() is None
                assert time.monotonic() < until_s
                time.sleep(0.1)
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert check(container[probe], moved) == 0, probe
            unknown = {"exec": {"command": ["", "--check", moved(settings.listen[0]), "--service", "model/other"]}}
            assert check(unknown, moved) != 0
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0


@every_manifest
def test_no_container_has_more_rights_than_it_needs(path: Path) -> None:
    for pod in pods(path):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in containers(pod):
            rights = each["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["capabilities"] == {"drop": ["ALL"]}


def test_the_sidecar_opens_no_port_for_calls_and_shares_memory_and_socket_with_its_neighbor() -> None:
    ((pod, container, settings),) = sidelights(ROOT / "deploy" / "kubernetes" / "sidecar.yaml")
    assert all(each.startswith("unix:") for each in settings.listen)
    assert [each["name"] for each in container["ports"]] == ["metrics"]
    in_memory = {each["name"] for each in pod["volumes"] if each.get("emptyDir", {}).get("medium") == "Memory"}
    (neighbor,) = pod["containers"]
    for each in (container, neighbor):
        folders = {mount["mountPath"] for mount in each["volumeMounts"] if mount["name"] in in_memory}
        assert {str(settings.shared_memory), str(Path(settings.listen[0].removeprefix("unix:")).parent)} == folders


@every_manifest
def test_prometheus_scrapes_where_the_server_has_metrics(path: Path) -> None:
    annotated = [each["metadata"] for each in templates(path)]
    (port,) = {each["annotations"]["prometheus.io/port"] for each in annotated if "annotations" in each}
    ((_, container, settings),) = sidelights(path)
    assert settings.metrics_listen == f"0.0.0.0:{port}"
    assert {"name": "metrics", "containerPort": int(port)} in container["ports"]
    allowed = [each["ports"] for policy in of_kind(path, "NetworkPolicy") for each in policy["spec"]["ingress"]]
    assert not allowed or [{"port": int(port)}] in allowed


def test_envoy_looks_for_the_replicas_where_their_service_is() -> None:
    path = ROOT / "deploy" / "kubernetes" / "replicas.yaml"
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(path, "Service")}
    (cluster,), (listener,) = (ENVOY["static_resources"][each] for each in ("clusters", "listeners"))
    ((endpoint,),) = (each["lb_endpoints"] for each in cluster["load_assignment"]["endpoints"])
    address = endpoint["endpoint"]["address"]["socket_address"]
    replicas = services[address["address"]]
    assert replicas["clusterIP"] == "None"
    assert [each["port"] for each in replicas["ports"]] == [address["port_value"]]
    assert [each["port"] for each in services["sidelight"]["ports"]] == [
        listener["address"]["socket_address"]["port_value"]
    ]
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in of_kind(path, "Deployment")
    }
    assert {name: each["selector"] for name, each in services.items()} == labels


def test_the_image_runs_as_an_unprivileged_user_with_a_health_check() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("FROM ") :]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK .*CMD \["sidelight-server", "--check"\]$', last, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["sidelight-server"\]$', last, re.MULTILINE)  # a list: signals reach the server


def commands(text: str) -> list[list[str]]:
    """Return the arguments for the server of every `docker run … sidelight …` and `sidelight-server …` in a text."""
    lines = re.sub(r"\\\n#?\s*", "", text).splitlines()
    found = [re.search(r"(?:docker run .*? sidelight|sidelight-server) (--[^`']*)", line) for line in lines]
    return [shlex.split(each[1]) for each in found if each]


@pytest.mark.parametrize("text", [DOCKERFILE, PAGE], ids=["Dockerfile", "page"])
def test_commands_that_are_shown_are_read_by_the_server(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [each for each in commands(text) if not is_health_check(each) and "--help" not in each]
    assert shown
    for each in shown:
        assert read_settings(each).model
    variables = set(re.findall(r"SIDELIGHT_([A-Z_]+)=", text))
    assert variables
    assert {each.lower() for each in variables} <= set(Settings.model_fields)


@pytest.mark.parametrize("path", sorted(KSERVE.glob("*.yaml")), ids=lambda path: path.stem)
def test_kserve_finds_one_container_that_speaks_grpc_without_tls(path: Path) -> None:
    ((pod, container, settings),) = sidelights(path)
    assert [each["name"] for each in pod["containers"]] == ["kserve-container"]
    first = container["ports"][0]  # the port that its service forwards to
    assert first["name"] == "h2c"
    assert settings.listen == (f"0.0.0.0:{first['containerPort']}",)
    (service,) = of_kind(path, "InferenceService")
    assert container["readinessProbe"]["grpc"]["service"] == f"model/{service['metadata']['name']}"


def test_triton_and_sidelight_serve_the_same_file() -> None:
    ((pod, container, settings),) = sidelights(ROOT / "deploy" / "kubernetes" / "triton.yaml")
    (triton,) = pod["containers"]
    repository = {each["mountPath"] for each in triton["volumeMounts"] if each["name"] == "models"}
    assert repository == {each["mountPath"] for each in container["volumeMounts"] if each["name"] == "models"}
    (folder,) = repository
    assert f"--model-repository={folder}" in triton["args"]
    assert settings.model == f"torchscript:{folder}/{settings.name}/1/model.pt"  # as Triton lays it out
