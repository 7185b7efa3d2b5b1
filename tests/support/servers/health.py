"""Servers whose health is watched: models that are slow or hang, and a client that watches."""

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sidelight_server import Engine, ModelSpec, Settings

from support.models import Linear
from support.models.gate import Gate, Gated
from support.models.reloadable import SIZE
from support.servers.processes import LOCAL
from support.servers.running import TIMEOUT_S

Status = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING, SERVICE_UNKNOWN = Status.SERVING, Status.NOT_SERVING, Status.SERVICE_UNKNOWN
UNAVAILABLE = 14
STUCK_S = 0.5
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


class Watching:
    """A Watch that a test reads."""

    def __init__(self, channel: grpc.Channel, service: str = "") -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        self._call = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=TIMEOUT_S, wait_for_ready=True)

    def next(self) -> int:
        return next(self._call).status

    def leave(self) -> None:
        self._call.cancel()

    def rest(self) -> list[int]:
        """Return the remaining statuses until the server ends the call, which must end with OK."""
        statuses = [each.status for each in self._call]
        assert self._call.code() is grpc.StatusCode.OK
        return statuses


def check(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S, wait_for_ready=True).status


def linear(**settings: object) -> Engine:
    return Engine([ModelSpec(Linear(), name="linear")], Settings(device="cpu", threads=1, **settings))


def gated(gate: Gate, **settings: object) -> Engine:
    chosen = {"device": "cpu", "threads": 1, "max_chunk_rows": 1} | settings
    return Engine([ModelSpec(Gated(gate), input_size=SIZE, name="gated")], Settings(**chosen))


SLOW = """
class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        import time
        open("reached", "w").close()  # a pipe, which waits for its other end
        time.sleep(600)
        return self.net(x)

def loading():
    open("reached", "w").close()
    import time
    time.sleep(600)
"""


HANGING = ["--model", "python:factories:Slow", *LOCAL, "--device", "cpu"]
