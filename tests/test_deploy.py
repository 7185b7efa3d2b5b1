"""What deploy/ and the Dockerfile say: of Kubernetes' own schema, of settings that there are, and of each other."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sidelight_server.config import Settings, read_settings
from sidelight_server.probe import is_probe

ROOT = Path(__file__).parent.parent
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
ENVOY = yaml.safe_load((ROOT / "deploy" / "envoy" / "envoy.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAGE = (ROOT / "deploy" / "README.md").read_text()
STOPPING_S = 10  # that a drained server takes to end, at most: its last chunk

every_manifest = pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    return [each for each in documents(path) if each["kind"] == kind]


def pods(path: Path) -> list[dict[str, Any]]:
    templates = [each["spec"]["template"] for each in of_kind(path, "Deployment")]
    return [each["spec"] for each in of_kind(path, "Pod") + templates]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return pod.get("initContainers", []) + pod["containers"]


def sidelights(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], Settings]]:
    """Yield each container of Sidelight with its pod, and its settings as the server reads them."""
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(path, "ConfigMap")}
    for pod in pods(path):
        for container in containers(pod):
            if container["name"] == "sidelight":
                volumes = {each["name"]: each.get("configMap", {}).get("name") for each in pod["volumes"]}
                folders = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
                text = maps[folders[container["workingDir"]]]["sidelight.toml"]
                yield pod, container, Settings(**tomllib.loads(text))


@every_manifest
def test_manifests_are_of_kubernetes_own_schema(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate checks manifests")
    assert len(documents(path)) > 1
    for each in documents(path):
        validate.validate(each, validate.latest_version(), strict=True)


@every_manifest
def test_manifests_name_settings_that_there_are(path: Path) -> None:
    ours = list(sidelights(path))
    assert ours
    for _, container, settings in ours:
        assert settings.model
        assert not [*container.get("args", []), *container.get("command", [])]  # all of it is in the file
        known = {f"SIDELIGHT_{name.upper()}" for name in Settings.model_fields}
        assert {each["name"] for each in container.get("env", [])} <= known


@every_manifest
def test_a_pod_is_given_the_time_that_its_drain_takes(path: Path) -> None:
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
                assert (program, is_probe(arguments)) == ("sidelight-server", True)
                assert arguments[1] in settings.listen
        startup, _, liveness = probes
        assert startup["failureThreshold"] * startup["periodSeconds"] >= 300  # a large model loads
        assert liveness["failureThreshold"] * liveness["periodSeconds"] > settings.stuck_s


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


def test_the_sidecar_opens_no_port_for_calls_and_shares_memory_and_socket_with_its_neighbour() -> None:
    ((pod, container, settings),) = sidelights(ROOT / "deploy" / "kubernetes" / "sidecar.yaml")
    assert all(each.startswith("unix:") for each in settings.listen)
    assert [each["name"] for each in container["ports"]] == ["metrics"]
    in_memory = {each["name"] for each in pod["volumes"] if each.get("emptyDir", {}).get("medium") == "Memory"}
    (neighbour,) = pod["containers"]
    for each in (container, neighbour):
        folders = {mount["mountPath"] for mount in each["volumeMounts"] if mount["name"] in in_memory}
        assert {str(settings.shared_memory), str(Path(settings.listen[0].removeprefix("unix:")).parent)} == folders


@every_manifest
def test_prometheus_is_sent_where_the_server_tells_metrics(path: Path) -> None:
    annotated = [each["metadata"] for each in of_kind(path, "Pod")]
    annotated += [each["spec"]["template"]["metadata"] for each in of_kind(path, "Deployment")]
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


def test_the_image_runs_without_rights_and_asks_itself_for_its_health() -> None:
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
    shown = [each for each in commands(text) if not is_probe(each) and "--help" not in each]
    assert shown
    for each in shown:
        assert read_settings(each).model
    variables = set(re.findall(r"SIDELIGHT_([A-Z_]+)=", text))
    assert variables
    assert {each.lower() for each in variables} <= set(Settings.model_fields)
