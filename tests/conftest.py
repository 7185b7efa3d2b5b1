"""What the tests share: the options of a run, the device, and servers on small models.

`pytest --device cuda` runs the same tests on a GPU. With `--require=envoy,onnx` a test whose component is missing fails
instead of being skipped: see `support.components`. Hypothesis has three profiles: see `support.profiles`.
"""

import gc
import os
from collections.abc import Iterator

import pytest
from sidelight_server.app.openmp import limit_spinning

limit_spinning()  # before torch is loaded: where tests run side by side, threads that spin take each other's cores
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers, and the processes that they start, share the cores
pytest.register_assert_rewrite("support")
gc.disable()  # until the tests are collected: see `pytest_collection_finish`

import sidelight
import sidelight_server
import torch
from torch import nn

import support.profiles  # noqa: F401  (it loads a profile)
from support import TESTS
from support.components import COMPONENTS
from support.models import LABELS, small_cnn
from support.models.gate import Gate

# A folder of tests/ is a marker: `pytest -m unit`.
KINDS = {
    "unit": "one part, without a server",
    "oracle": "against other people's code",
    "service": "a real server, by its messages",
    "client": "the client, with a real server",
    "process": "commands, as an operator starts them",
    "faults": "what breaks, and what goes on",
    "interop": "beside foreign programs",
    "packaging": "what is built and shipped",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the server under test computes: cpu, cuda, cuda:N, mps")
    parser.addoption(
        "--require",
        default="",
        metavar="NAMES",
        help=f"components without which their tests fail instead of being skipped: {','.join(COMPONENTS)}",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return one more worker than there are cores: a third of the time a test waits, for a process or a connection."""
    return (os.cpu_count() or 1) + 1


def pytest_configure(config: pytest.Config) -> None:
    if unknown := _required(config) - COMPONENTS.keys():
        raise pytest.UsageError(f"--require: got {','.join(sorted(unknown))}, expected some of {','.join(COMPONENTS)}")
    for kind, meaning in KINDS.items():
        config.addinivalue_line("markers", f"{kind}: {meaning} (set by the folder)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(TESTS).parts[0]
        if kind in KINDS:
            item.add_marker(kind)


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collection: torch's objects take half a second each time."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        for name in mark.args:
            if not COMPONENTS[name].is_there():
                end = pytest.fail if name in _required(item.config) else pytest.skip
                end(f"{name} is not here: {COMPONENTS[name].hint}")


def _required(config: pytest.Config) -> set[str]:
    return set(filter(None, config.getoption("--require").split(",")))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    torch.backends.cudnn.allow_tf32 = False  # as the server's own process has it
    return str(pytestconfig.getoption("--device"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Restore torch's number of threads, which loading a model may change: other tests' last bits depend on it."""
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
        module, input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), class_names=LABELS, name="small"
    )


@pytest.fixture(scope="session")
def address(spec: sidelight_server.ModelSpec, device: str) -> Iterator[str]:
    """The address of a server on the small CNN, for tests that do not change it."""
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
