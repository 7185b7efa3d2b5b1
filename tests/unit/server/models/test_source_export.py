"""Sources: `export:FILE.pt2`. The inputs of a program, and that no code in a file runs."""

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from sidelight_server import ConfigurationError
from sidelight_server.models import sources
from torch import Tensor, nn
from torch.export import Dim

from support.models.sources import N_CLASSES, SHAPE, assert_serves, examples, net, refusal, served_maps

MARK = "code-that-a-file-brought-was-run"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Named(nn.Module):
    """As PyHealth's models: keywords only, a label that no output depends on, a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, *, image: Tensor, disease: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        logit = self.net(image) * scale
        return {"loss": nn.functional.cross_entropy(logit, disease), "logit": logit}


def export(
    module: nn.Module,
    *inputs: Tensor,
    sizes: object = None,
    to: str = "net.pt2",
    strict: bool = False,
    **named: object,
) -> str:
    """Write a program to a file, and return the source."""
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(module.eval(), inputs, named or None, dynamic_shapes=sizes, strict=strict)
        torch.export.save(program, to)
    return f"export:{to}"


def test_a_program_exported_in_train_mode_is_refused() -> None:
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(net().train(), (examples(2),))
        torch.export.save(program, "training.pt2")
        torch.export.save(program.run_decompositions(), "decomposed.pt2")
    for name in ("training", "decomposed"):
        with pytest.raises(ConfigurationError, match="exported in train mode"):
            served_maps(f"export:{name}.pt2", examples(2))


def test_a_norm_without_running_statistics_does_not_count_as_train_mode() -> None:
    module = nn.Sequential(nn.Conv2d(SHAPE[0], 2, 12), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    source = export(module, examples(1))
    assert_serves(source, module.eval(), examples(1))


def test_a_static_export_is_served_in_batches_of_any_size() -> None:
    source = export(net(), examples(2))
    spec = sources.load(source)
    assert (spec.batch, spec.input_size, spec.input, spec.label_argument, spec.name) == (
        (2, 2),
        SHAPE,
        None,
        None,
        "net",
    )
    assert_serves(source, net(), examples(5))


def test_a_range_of_examples_is_kept() -> None:
    source = export(net(), examples(4), sizes={"x": {0: Dim("n", min=3, max=6)}})
    assert sources.load(source).batch == (3, 6)
    assert_serves(source, net(), examples(8))


@pytest.mark.parametrize("size", [Dim.AUTO, Dim.DYNAMIC, Dim("n")], ids=["automatic", "dynamic", "named"])
def test_any_number_of_examples_needs_no_batch(size: object) -> None:
    source = export(net(), examples(4), sizes={"x": {0: size}})
    assert sources.load(source).batch is None
    assert_serves(source, net(), examples(1))


def test_an_export_of_any_size_takes_pictures_of_any_size() -> None:
    source = export(net(), examples(4), sizes={"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}})
    assert sources.load(source).input_size is None
    assert_serves(source, net(), examples(3, (3, 20, 12)))


def test_the_mode_of_an_export_is_left_alone() -> None:
    module = net()
    module.norm.train()  # an export in this mode changes statistics: it must not be switched, which raises
    program = torch.export.export(module, (examples(4),))
    torch.export.save(program, "trained.pt2")
    spec = sources.load("export:trained.pt2")
    assert spec.module(examples(4)).shape == (4, N_CLASSES)


def test_keywords_constants_and_labels_of_an_export_are_known() -> None:
    source = export(
        Named(), image=examples(2), disease=torch.zeros(2, dtype=torch.int64), scale=3.0, sizes=None, to="named.pt2"
    )
    spec = sources.load(source)
    assert (spec.input, spec.label_argument, spec.arguments, spec.batch) == ("image", "disease", {"scale": 3.0}, (2, 2))
    assert_serves(source, lambda x: 3.0 * net()(x), examples(3))


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None, *, z: object = None) -> Tensor:
        return x.mean((2, 3)) + (0 if y is None else y.float().mean()) + (0 if not isinstance(z, Tensor) else z.mean())


class Nested(nn.Module):
    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"].mean((2, 3))


class Bytes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3))


FOREIGN: Mapping[str, tuple[Callable[[], str], str]] = {
    "two by position": (lambda: export(Two(), examples(2), examples(2)), "takes 2 inputs by position"),
    "two pictures": (lambda: export(Two(), examples(2), z=examples(2)), "also takes z float32 [2, 3, 16, 16]"),
    "pictures within": (lambda: export(Nested(), {"x": examples(2)}), "nested inputs"),
    "bytes": (lambda: export(Bytes(), torch.zeros(2, *SHAPE, dtype=torch.uint8)), "the first uint8 [2, 3, 16, 16]"),
    "no picture": (lambda: export(nn.Linear(4, 2), torch.zeros(2, 4)), "float32 [2, 4], expected floating images"),
    "a multiple of examples": (
        lambda: export(net(), examples(4), sizes={"x": {0: 2 * Dim("half", min=1, max=8)}}),
        "examples at once, expected any number",
    ),
}


@pytest.mark.parametrize(("make", "fragment"), FOREIGN.values(), ids=FOREIGN)
def test_an_export_with_other_inputs_is_refused(make: Callable[[], str], fragment: str) -> None:
    message = refusal(make())
    assert message.startswith("model: net.pt2: ")
    assert fragment in message


def rewritten(changes: Mapping[str, Callable[[bytes], bytes]], *, dynamic: bool = False) -> str:
    """Write an archive like torch's own but for some members, and return its path."""
    sizes = {"x": {0: Dim("n", min=1, max=8)}} if dynamic else None
    export(net(), examples(4), sizes=sizes, to="good.pt2")
    changes = dict(changes)
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("bad.pt2", "w") as bad:
        for name in good.namelist():
            change = changes.pop(name.removeprefix("good/"), lambda data: data)
            bad.writestr(name.replace("good/", "bad/", 1), change(good.read(name)))
        for name, change in changes.items():
            bad.writestr(f"bad/{name}" if "/" in name else name, change(b""))
    return "bad.pt2"


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (MARK,)


def pickled(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.save((Malicious(),), file)
    return file.getvalue()


def pickled_weight(config: bytes) -> bytes:
    held = json.loads(config)
    held["config"]["linear.bias"] |= {"use_pickle": True}
    return json.dumps(held).encode()


def weight_place(wanted: str) -> str:
    export(net(), examples(4), to="good.pt2")
    with zipfile.ZipFile("good.pt2") as good:
        config = json.loads(good.read("good/data/weights/model_weights_config.json"))["config"]
    return f"data/weights/{config[wanted]['path_name']}"


def object_constant(name: str) -> Callable[[bytes], bytes]:
    entry = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
    return lambda _: json.dumps({"config": {"held": entry}}).encode()


def program(change: Callable[[dict[str, object]], object]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        held = json.loads(data)
        change(held)
        return json.dumps(held).encode()

    return changed


def operator(held: dict[str, object]) -> None:
    nodes = held["graph_module"]["graph"]["nodes"]
    name = {"name": "", "arg": {"as_string": MARK}, "kind": 1}
    nodes.append({"target": "torch.os.mkdir", "inputs": [name], "outputs": [], "metadata": {}, "name": "made"})


def size(held: dict[str, object]) -> None:
    def evil(part: object) -> None:
        if isinstance(part, dict):
            if "expr_str" in part:
                part["expr_str"] = f"__import__('os').mkdir('{MARK}')"
            for each in part.values():
                evil(each)
        elif isinstance(part, list):
            for each in part:
                evil(each)

    evil(held)


def guard(held: dict[str, object]) -> None:
    held["guards_code"] = [f"__import__('os').mkdir('{MARK}') is None"]


def default(data: bytes) -> bytes:
    """Make a default value of the name of the input: torch writes it into the head of a Python function."""
    code = f"x=__import__('os').mkdir('{MARK}')"
    return data.replace(b'"x"', json.dumps(code).encode())


CALLS = 'calls "torch.os.mkdir"'
SEEN_BY_TORCH = (CALLS,)  # whose verifier this one does not pass

MALICIOUS: Mapping[str, tuple[Callable[[], str], str]] = {
    "example inputs": (lambda: rewritten({"data/sample_inputs/model.pt": pickled}), "code in a file is never run"),
    "weight": (
        lambda: rewritten(
            {"data/weights/model_weights_config.json": pickled_weight, weight_place("linear.bias"): pickled}
        ),
        "code in a file is never run",
    ),
    "older weights": (lambda: rewritten({"data/weights/model.pt": pickled}), 'holds "data/weights/model.pt"'),
    "constant object": (
        lambda: rewritten(
            {
                "data/constants/model_constants_config.json": object_constant("opaque_obj_0"),
                "data/constants/opaque_obj_0": lambda _: pickle.dumps(Malicious()),
            }
        ),
        'holds "data/constants/opaque_obj_0"',
    ),
    "constant": (
        lambda: rewritten(
            {
                "data/constants/model_constants_config.json": object_constant("tensor_0"),
                "data/constants/tensor_0": pickled,
            }
        ),
        "code in a file is never run",
    ),
    "operator": (lambda: rewritten({"models/model.json": program(operator)}), CALLS),
    "size": (lambda: rewritten({"models/model.json": program(size)}, dynamic=True), 'has the size "__import__'),
    "name": (lambda: rewritten({"models/model.json": default}), 'has the name "x=__import__'),
}


def load_as_torch_does(path: str) -> None:
    """Load and run a program without checking it first."""
    module = torch.export.load(path).module()
    module(examples(4))


@pytest.mark.parametrize(("make", "fragment"), MALICIOUS.values(), ids=MALICIOUS)
@pytest.mark.filterwarnings("ignore")
def test_code_in_an_archive_is_refused_and_never_run(
    make: Callable[[], str], fragment: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = make()
    message = refusal(f"export:{path}")
    assert message.startswith(f"model: {path}: ")
    assert fragment in message
    assert not (here / MARK).exists()
    with contextlib.suppress(Exception):
        load_as_torch_does(path)
    # Else the archive was harmless, and the test shows nothing.
    assert (here / MARK).exists() or fragment in SEEN_BY_TORCH


def test_guards_of_an_archive_are_not_run(here: Path) -> None:
    path = rewritten({"models/model.json": program(guard)})
    assert sources.load(f"export:{path}").module(examples(4)).shape == (4, N_CLASSES)
    assert not (here / MARK).exists()
    with contextlib.suppress(Exception):
        load_as_torch_does(path)
    assert (here / MARK).exists()


def test_compiled_code_in_an_archive_is_refused() -> None:
    path = rewritten({"data/aotinductor/model/net.so": lambda _: b"\x7fELF"})
    assert 'holds "data/aotinductor/model/net.so"' in refusal(f"export:{path}")


def test_an_archive_of_the_older_form_is_refused() -> None:
    path = rewritten({"version": lambda _: b"8.8"})
    assert "export the model again" in refusal(f"export:{path}")


def cut(name: str) -> Callable[[], str]:
    def make() -> str:
        export(net(), examples(2))
        Path(name).write_bytes(Path("net.pt2").read_bytes()[:2000])
        return f"export:{name}"

    return make


def text() -> str:
    Path("text.pt2").write_text("weights\n")
    return "export:text.pt2"


def folder() -> str:
    Path("folder.pt2").mkdir()
    return "export:folder.pt2"


def state() -> str:
    torch.save(net().state_dict(), "state.pt2")
    return "export:state.pt2"


def script() -> str:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(net()), "script.pt2")
    return "export:script.pt2"


BROKEN: Mapping[str, tuple[Callable[[], str], str]] = {
    "missing": (lambda: "export:gone.pt2", "model: gone.pt2 does not exist"),
    "folder": (folder, "model: folder.pt2: is a folder, expected a file"),
    "cut": (cut("cut.pt2"), "model: cut.pt2: is not an archive, or is broken"),
    "text": (text, "model: text.pt2: is not an archive, or is broken"),
    "state dict": (state, "model: state.pt2: is another kind of archive"),
    "script": (script, "model: script.pt2: is another kind of archive"),
}


@pytest.mark.parametrize(("make", "prefix"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_program_is_refused(make: Callable[[], str], prefix: str) -> None:
    assert refusal(make()).startswith(prefix)


def test_weights_beside_a_program_are_refused() -> None:
    assert refusal(export(net(), examples(2)), Path("net.pt")).startswith("weights: net.pt: export: brings its own")
