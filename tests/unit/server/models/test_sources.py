"""Sources: the dispatch, factories and scripts. Exports, Hugging Face and ONNX have modules of their own."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sidelight_server import ConfigurationError
from sidelight_server.models import sources
from torch import Tensor, nn

from support.models.sources import SHAPE, assert_serves, examples, net, refusal, served_maps

FACTORY = """
from sidelight_server import ModelSpec
from support.models.sources import net as made

def net():
    return made()

def spec():
    return ModelSpec(made(), input_size=(3, 16, 16), name="specified")

def sad():
    raise LookupError("no\\n weights")

def five():
    return 5
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "given_factories.py").write_text(FACTORY)
    monkeypatch.delitem(__import__("sys").modules, "given_factories", raising=False)
    return tmp_path


def script(module: nn.Module, name: str = "net.ts") -> str:
    """Write a script, and return the source."""
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(module), name)
    return f"torchscript:{name}"


def test_a_factory_is_served_with_weights_of_a_file(here: Path) -> None:
    torch.manual_seed(9)
    other = net()
    nn.init.normal_(other.linear.weight)
    safetensors.torch.save_file(other.state_dict(), here / "net.safetensors")
    torch.save(other.state_dict(), here / "net.pt")
    for weights in ("net.safetensors", "net.pt"):
        assert_serves("python:given_factories:net", other, examples(3), weights=Path(weights))


def test_a_factory_keeps_the_name_of_its_specification_and_else_has_its_modules() -> None:
    assert sources.load("python:given_factories:spec").name == "specified"
    assert sources.load("python:given_factories:net").name == "given_factories"


def test_a_script_is_served() -> None:
    source = script(net())
    assert sources.load(source).name == "net"
    assert_serves(source, net(), examples(5))


def test_a_script_is_served_in_eval_mode() -> None:
    assert_serves(script(net().train()), net(), examples(5))


@pytest.mark.parametrize("sized", [True, False], ids=["a size", "any size"])
def test_a_trace_recorded_in_train_mode_is_refused(*, sized: bool) -> None:
    with warnings.catch_warnings(action="ignore"):
        for module in (net().train(), net().eval()):
            torch.jit.save(torch.jit.trace(module, examples(2), check_trace=False), f"{module.training}.ts")
    size = {"input_size": SHAPE} if sized else {}
    with pytest.raises(ConfigurationError, match="exported in train mode"):
        served_maps("torchscript:True.ts", examples(2), **size)
    assert_serves("torchscript:False.ts", net(), examples(5), **size)


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, image: Tensor, disease: Tensor, scale: float = 2.0) -> Tensor:
        return self.net(image) * scale + disease.sum() * 0.0


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a.mean((2, 3)) + b + c


class Nothing(nn.Module):
    def forward(self) -> Tensor:
        return torch.zeros(1, 2)


def test_a_script_s_label_is_known() -> None:
    source = script(Labelled())
    assert sources.load(source).label_argument == "disease"
    assert_serves(source, lambda x: 2.0 * net()(x), examples(3))


def test_each_source_has_its_watched_files() -> None:
    weights = Path("net.safetensors")
    assert sources.files("python:given_factories:net", weights) == (weights,)
    assert sources.files("python:given_factories:net") == ()
    assert sources.files("export:net.pt2") == (Path("net.pt2"),)
    assert sources.files("torchscript:net.ts") == (Path("net.ts"),)
    assert Path("net.onnx") in sources.files("onnx:net.onnx")
    assert sources.files("hf:nowhere")  # the folder may come


def cut() -> str:
    source = script(net())
    Path("net.ts").write_bytes(Path("net.ts").read_bytes()[:3000])
    return source


def folder() -> str:
    Path("folder.ts").mkdir()
    return "torchscript:folder.ts"


def text() -> str:
    Path("text.ts").write_text("weights\n")
    return "torchscript:text.ts"


def state() -> str:
    torch.save(net().state_dict(), "state.ts")
    return "torchscript:state.ts"


REFUSALS: Mapping[str, tuple[Callable[[], str], str]] = {
    "near an export": (lambda: "exprot:net.pt2", 'did you mean "export:"?'),
    "near a folder": (lambda: "hff:net", 'did you mean "hf:"?'),
    "near a script": (lambda: "torch_script:net.ts", 'did you mean "torchscript:"?'),
    "far from all": (lambda: "keras:net", f'model: got "keras:net", expected {sources.FORMS}'),
    "no kind": (lambda: "net.pt2", f'model: got "net.pt2", expected {sources.FORMS}'),
    "no place": (lambda: "hf:", 'model: got "hf:", expected "hf:DIR"'),
    "no factory": (lambda: "python:given_factories", 'expected "python:package.module:factory"'),
    "factory that raises": (
        lambda: "python:given_factories:sad",
        "model: python:given_factories:sad raised LookupError: no weights",
    ),
    "factory of a number": (lambda: "python:given_factories:five", "returned int, expected a torch.nn.Module"),
    "missing script": (lambda: "torchscript:gone.ts", "model: gone.ts does not exist"),
    "folder of a script": (folder, "model: folder.ts: is a folder, expected a file"),
    "half of a script": (cut, "model: net.ts: "),
    "text": (text, "model: text.ts: "),
    "state dict": (state, "model: state.ts: "),
    "script of three inputs": (
        lambda: script(Pair()),
        "model: net.ts: the script also requires b, c, expected nothing else but labels",
    ),
    "script without inputs": (lambda: script(Nothing()), "model: net.ts: the script takes no input"),
}


@pytest.mark.parametrize(("make", "fragment"), REFUSALS.values(), ids=REFUSALS)
def test_an_invalid_source_is_refused_in_one_line(make: Callable[[], str], fragment: str) -> None:
    assert fragment in refusal(make())


@pytest.mark.parametrize("source", ["torchscript:net.ts", "export:net.pt2", "hf:net", "onnx:net.onnx"])
def test_weights_beside_a_source_that_has_its_own_are_refused(source: str) -> None:
    message = refusal(source, Path("net.pt"))
    assert message.startswith("weights: net.pt: ")
    assert message.endswith("brings its own; leave weights unset")


def test_a_shape_of_the_settings_is_checked_against_a_source() -> None:
    assert sources.load(script(net())).input_size is None
    assert_serves(script(net()), net(), examples(2), input_size=SHAPE)


def test_the_flag_s_description_lists_every_form() -> None:
    from sidelight_server.config.model_settings import SOURCES

    assert SOURCES.replace(" or ", ", ") == sources.FORMS
