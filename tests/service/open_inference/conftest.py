"""A server that speaks the Open Inference Protocol, and a client of the other service."""

from collections.abc import Iterator

import pytest
import sidelight
from sidelight_server import Engine, ModelSpec, Settings

from support.messages.attribution import floats
from support.messages.inference import infer_request
from support.messages.inference_requests import infer
from support.models import Linear, sized_cnn
from support.servers.running import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Two models: one of closed form, and one that takes files."""
    engine = Engine([ModelSpec(Linear(), name="linear"), sized_cnn()], Settings(device="cpu", threads=1))
    with serving(engine, "127.0.0.1:0") as server:
        infer(server, infer_request(floats(1)))  # without an input size, the first rows show how many classes there are
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[sidelight.Client]:
    with sidelight.connect(server.server.addresses[0]) as client:
        yield client
