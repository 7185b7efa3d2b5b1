"""Ray Serve, as deploy/ray/serve.yaml deploys the service: our client calls it through Serve's gRPC proxy."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import yaml
from PIL import Image
from sidelight.exceptions import DeadlineExceeded, InvalidArgument, NotFound, SidelightError

from support import ROOT
from support.components import SERVE
from support.models import LABELS, sized_cnn
from support.models.crashing import POISON
from support.servers.processes import WITHIN_S, ray_environment, until
from support.tolerances import NEIGHBORS

CONFIGURATION = ROOT / "deploy" / "ray" / "serve.yaml"
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)

pytestmark = [pytest.mark.requires("serve"), pytest.mark.timeout(600)]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in opened]


class Deployment:
    """A Ray of its own with Serve, and the configuration that is deployed on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.grpc_port, self._http_port, self._dashboard_port, self._port = free_ports(4)
        self._configuration = yaml.safe_load(CONFIGURATION.read_text())
        self._configuration["grpc_options"]["port"] = self.grpc_port
        self._configuration["http_options"] = {"port": self._http_port}
        self.environment = os.environ | ray_environment()
        self._log = (folder / "ray.log").open("w")
        self._node = subprocess.Popen(
            [
                *(SERVE / "bin" / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={self._port}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard_port}"),
                *("--node-ip-address=127.0.0.1", "--object-store-memory=200000000"),
            ],
            env=self.environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def deploy(self, options: dict[str, object] | None = None, **user_config: object) -> None:
        """Send the configuration with other `options` to Serve; return once Serve has accepted it."""
        (deployment,) = self._configuration["applications"][0]["deployments"]
        deployment |= options or {}
        deployment["user_config"] = {"model": "python:support.models:sized_cnn", "threads": 1} | user_config
        file = self._folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self._configuration))
        command = [SERVE / "bin" / "serve", "deploy", file, "--address", f"http://127.0.0.1:{self._dashboard_port}"]

        def is_deployed() -> bool:
            return not subprocess.run(command, env=self.environment, capture_output=True, timeout=WITHIN_S).returncode

        until(is_deployed, "Ray's dashboard takes the configuration")

    def n_running(self) -> int:
        """Return the number of replicas that serve."""
        command = [SERVE / "bin" / "serve", "status", "--address", f"http://127.0.0.1:{self._dashboard_port}"]
        output = subprocess.run(command, env=self.environment, capture_output=True, timeout=WITHIN_S, check=True).stdout
        deployment = yaml.safe_load(output)["applications"]["sidelight"]["deployments"]["Sidelight"]
        return deployment["replica_states"].get("RUNNING", 0)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._node.pid, signal.SIGTERM)
        try:
            self._node.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._node.pid, signal.SIGKILL)
            self._node.wait()
        self._log.close()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path_factory.mktemp("serve"))
    try:
        deployment.deploy()
        yield deployment
    finally:
        deployment.close()


@pytest.fixture(scope="module")
def client(deployment: Deployment) -> Iterator[sidelight.Client]:
    with sidelight.connect(f"127.0.0.1:{deployment.grpc_port}", connect_timeout=WITHIN_S) as client:

        def answers() -> bool:
            with contextlib.suppress(SidelightError):
                return bool(client.info().models)
            return False

        until(answers, "the application serves")
        yield client


def test_a_unary_call_is_answered_as_by_a_server(client: sidelight.Client) -> None:
    method = sidelight.IntegratedGradients(steps=4)
    answer = client.attribute(PIXELS, method=method, target=[3, 4])
    with sidelight_server.serve(sized_cnn(), threads=1, device="cpu") as address, sidelight.connect(address) as direct:
        expected = direct.attribute(PIXELS, method=method, target=[3, 4])
    np.testing.assert_allclose(answer.maps, expected.maps, rtol=0, atol=NEIGHBORS * expected.maps.max())
    assert answer.provenance.model_digest == expected.provenance.model_digest
    assert answer.provenance.example_digests == expected.provenance.example_digests


def test_an_invalid_request_has_the_status_and_the_message_of_a_server(client: sidelight.Client) -> None:
    with pytest.raises(InvalidArgument, match="99"):
        client.attribute(PIXELS, target=99)
    with pytest.raises(NotFound, match="nowhere"):
        client.attribute(PIXELS, model="nowhere")
    with pytest.raises(NotFound, match="nowhere"):
        client.model("nowhere")


def test_a_bad_example_fails_alone(client: sidelight.Client) -> None:
    answer = client.attribute([b"no picture", Image.fromarray(PIXELS[0])], on_error="return")
    assert [each.example for each in answer.failures] == [0]
    assert np.isfinite(answer.maps[1]).all()


def test_a_new_configuration_reloads_without_a_failed_call(
    deployment: Deployment, client: sidelight.Client, tmp_path: Path
) -> None:
    assert client.attribute(PIXELS).predictions[0].label == ""
    (tmp_path / "names.txt").write_text("\n".join(LABELS))
    deployment.deploy(class_names=str(tmp_path / "names.txt"))
    until(lambda: client.attribute(PIXELS).predictions[0].label in LABELS, "the new configuration serves")


def test_ongoing_requests_start_a_second_replica(deployment: Deployment, client: sidelight.Client) -> None:
    assert deployment.n_running() == 1
    deployment.deploy({"autoscaling_config": {"max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1}})
    is_scaled = threading.Event()

    def call() -> None:
        while not is_scaled.is_set():
            client.attribute(PIXELS, method=sidelight.IntegratedGradients(steps=200))

    with ThreadPoolExecutor(4) as threads:
        callers = [threads.submit(call) for _ in range(4)]
        try:
            until(lambda: deployment.n_running() == 2, "a second replica serves")
        finally:
            is_scaled.set()
        for each in callers:
            each.result()


def test_a_replica_whose_device_is_stuck_is_replaced(deployment: Deployment, client: sidelight.Client) -> None:
    options = {"health_check_period_s": 1, "graceful_shutdown_timeout_s": 2, "autoscaling_config": {"max_replicas": 1}}
    deployment.deploy(options, model="python:support.models.crashing:stalled", stuck_s=1)
    until(lambda: client.info().models[0].name == "small" and deployment.n_running() == 1, "the new model serves")
    floats = np.zeros((1, 3, 32, 32), np.float32)
    client.attribute(floats)
    with pytest.raises(DeadlineExceeded):
        client.attribute(np.full_like(floats, POISON), timeout=5)

    def answers() -> bool:
        with contextlib.suppress(SidelightError):
            client.attribute(floats, timeout=5)
            return True
        return False

    until(answers, "another replica answers")
