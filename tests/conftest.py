"""What the tests share: the device they run on, and servers on small models.

`pytest --device cuda` runs the same tests on a GPU.
"""

from collections.abc import Iterator

import pytest
import sidelight
import sidelight_server
import torch
from gate import Gate
from models import LABELS, small_cnn
from torch import nn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the server under test computes: cpu, cuda, cuda:N, mps")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    torch.backends.cudnn.allow_tf32 = False  # as the server's own process has it
    return str(pytestconfig.getoption("--device"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A server's own process loads with one thread; what others compute in this one must not, or bits would move."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def module() -> nn.Module:
    return small_cnn()


@pytest.fixture(scope="session")
def spec(module: nn.Module) -> sidelight_server.ModelSpec:
    return sidelight_server.ModelSpec(
        module, input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), labels=LABELS, name="small"
    )


@pytest.fixture(scope="session")
def address(spec: sidelight_server.ModelSpec, device: str) -> Iterator[str]:
    """The address of a server on the small CNN, for tests that leave it as it was."""
    with sidelight_server.serve(spec, device=device) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[sidelight.Client]:
    with sidelight.connect(address, connect_timeout=10) as client:
        yield client


@pytest.fixture
def floats() -> torch.Tensor:
    """Model-ready examples, [5, 3, 32, 32]."""
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()
