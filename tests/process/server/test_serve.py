"""`serve` in the process of its caller: any form of a model, and nothing remains."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sidelight_server import ConfigurationError, ModelSpec, serve
from torch import nn

from support.models import Linear, small_cnn
from support.models.factories import ask_net, net

MODELS = {
    "a module": (lambda: net(), {"input_size": (3, 4, 4)}),
    "a specification": (lambda: ModelSpec(net(), input_size=(3, 4, 4)), {}),
    "a source": (lambda: "python:factories:net", {"input_size": (3, 4, 4), "weights": "good.pt"}),
}


@pytest.mark.parametrize(("make", "settings"), MODELS.values(), ids=MODELS)
def test_any_form_of_a_model_is_served(
    make: Callable[[], nn.Module | ModelSpec | str], settings: dict[str, object], here: Path, device: str
) -> None:
    with serve(make(), device=device, **settings) as address:
        result = ask_net(address).result
    with serve(net(), input_size=(3, 4, 4), device=device) as address:
        assert ask_net(address).result.maps == result.maps


def threads() -> set[str]:
    return {each.name for each in threading.enumerate() if each.name.startswith("sidelight-")}


def test_a_served_module_stays_as_it_was(device: str) -> None:
    module = small_cnn()
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with serve(module, input_size=(3, 32, 32), device=device) as address:
        ask_net(address)
    assert all(each.training for each in module.modules())
    for parameter in module.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert parameter.device.type == "cpu"
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_served_module_that_is_trained_on_is_served_as_it_has_become(device: str) -> None:
    """The replica shares its storage if it is on the module's device."""
    module = net()
    with serve(module, input_size=(3, 4, 4), device="cpu") as address:
        before = ask_net(address).result.maps
        with torch.no_grad():
            module[1].weight.mul_(2)
        assert ask_net(address).result.maps != before


def test_a_server_leaves_nothing_behind_after_its_with_block(device: str) -> None:
    before = threads()
    with serve(Linear(), device=device) as first, serve(Linear(), device=device) as second:
        assert first != second
        paths = [Path(address.removeprefix("unix:")) for address in (first, second)]
        assert all(path.is_socket() for path in paths)
    assert not any(path.parent.exists() for path in paths)
    assert threads() == before


def test_a_served_module_answers_until_close_and_leaves_nothing_behind(device: str) -> None:
    before = threads()
    server = serve(net(), input_size=(3, 4, 4), device=device)
    folder = Path(server.address.removeprefix("unix:")).parent
    with serve(net(), input_size=(3, 4, 4), device=device) as address:
        assert ask_net(server.address).result.maps == ask_net(address).result.maps
    server.close()
    assert not folder.exists()
    until_s = time.monotonic() + 10
    while threads() != before:  # an idle preparation thread ends a moment after its pool was closed
        assert time.monotonic() < until_s, threads()
        time.sleep(0.01)
    server.close()  # as a `with` around it would


def test_a_served_module_that_is_never_closed_ends_with_its_process() -> None:
    script = """if True:
        import sidelight, sidelight_server, torch
        spec = sidelight_server.ModelSpec(torch.nn.Flatten(), input_size=(3, 2, 2), output_kind="logits")
        server = sidelight_server.serve(spec, device="cpu")
        with sidelight.connect(server.address) as client:
            client.attribute(torch.ones(1, 3, 2, 2))
        print(server.address)
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(done.stdout.strip().removeprefix("unix:")).parent.exists()


def test_an_exception_inside_stops_the_server(device: str) -> None:
    before = threads()
    with pytest.raises(ZeroDivisionError), serve(Linear(), device=device) as address:
        raise ZeroDivisionError
    assert not Path(address.removeprefix("unix:")).parent.exists()
    assert threads() == before


def test_a_server_that_cannot_start_raises_and_leaves_nothing_behind(
    folder: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threads()
    with (
        pytest.raises(ConfigurationError, match="exists and is not a socket"),
        serve(Linear(), listen=(f"unix:{folder}/plain",), device=device),
    ):
        pytest.fail("it has started")
    assert threads() == before
