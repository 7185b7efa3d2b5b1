"""The documentation: links, anchors and paths resolve, and the worked example gives the results it states."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sidelight_server import Settings
from torch import Tensor

from support import ROOT
from support.components import FLOOR
from support.tolerances import NEIGHBORS

DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "RELEASING")),
    *sorted(DOCS.glob("**/*.md")),
    ROOT / "deploy" / "README.md",
]
SOURCES = (ROOT / "server" / "sidelight_server", ROOT / "client" / "sidelight")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|toml|yaml|json|proto))`")
MADE = {  # by the reader of a page, or by a command
    "server/sidelight_server/methods/mirrored_gradient.py",
    "client/sidelight/methods/mirrored_gradient.py",
    "benchmarks/results/bench.json",
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def _prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.strip().lower()).replace(" ", "-") for each in headings}


@every_page
def test_each_link_resolves(page: Path) -> None:
    for link in LINK.findall(_prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@every_page
def test_each_file_that_is_named_exists(page: Path) -> None:
    """A path begins at the root, or in the source of the server or the client."""
    for name in FILE.findall(_prose(page)):
        assert name in MADE or any((base / name).exists() for base in (ROOT, *SOURCES, page.parent)), name


def test_the_folders_say_the_purpose_of_a_page() -> None:
    assert {path.name for path in DOCS.iterdir()} == {
        "README.md", "explanation", "how-to", "images", "notebooks", "reference", "site", "tutorial",
    }  # fmt: skip


def test_the_index_lists_every_page() -> None:
    index = DOCS / "README.md"
    listed = {(index.parent / link).resolve() for link in LINK.findall(_prose(index))}
    assert {page for page in [*DOCS.glob("*/*.md"), *DOCS.glob("*/*.ipynb")] if page not in listed} == set()


def test_the_architecture_lists_every_package() -> None:
    page = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.relative_to(ROOT) for source in SOURCES for path in source.glob("*/__init__.py")}
    assert len(packages) > 15
    assert {package for package in packages if f"`{package}`" not in page} == set()


def _shown(name: str, default: object) -> str:
    """Return a default as docs/reference/settings.md shows it."""
    match default:
        case None | "" | {}:
            return "unset"
        case bool():
            return "on" if default else "off"
        case (only,):
            return f"`{only}`"
        case int() if name.endswith("_bytes"):
            return f"{default >> 30} GiB" if default >> 30 else f"{default >> 20} MiB"
        case int() | float():
            return f"{default:g}" if default < 10_000 else f"{default:,}"
        case _:
            return str(default)


def test_the_settings_page_has_every_setting_and_its_default() -> None:
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    shown = {
        name: default
        for names, default in re.findall(r"^\| (`.*?) \| (.*?) \|", page, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    fields = {name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()}
    assert shown == {name: _shown(name, default) for name, default in fields.items()}


# docs/how-to/add-a-method.md

METHOD_PAGE = DOCS / "how-to" / "add-a-method.md"
STEP = re.compile(
    r"(?:^|\. )(?:Create `(?P<new>[^`]+)`|At the end of `(?P<end>[^`]+)`"
    r"|In `(?P<path>[^`]+)`, after `(?P<anchor>[^`]+)`):\n\n```\w*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
CALL = """
import sys, numpy, sidelight, torch
from sidelight.methods.parsing import parse_method
from sidelight_server import serve

torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
images = torch.randn(5, 3, 8, 8)
with serve(module) as address, sidelight.connect(address) as client:
    options = {"channels": "none", "target": 2}
    mirrored = client.attribute(images, method=parse_method("mirrored_gradient(mirror_weight=0.3)"), **options)
    assert "mirrored_gradient" in client.info().methods
    plain, flipped = (
        client.attribute(each, method=sidelight.Gradient(signed=True), **options).maps
        for each in (images, images.flip(-1))
    )
numpy.save(sys.argv[1], [mirrored.maps, 0.7 * plain + 0.3 * flipped[..., ::-1]])
"""


def test_the_places_to_touch_are_those_that_an_existing_method_has() -> None:
    table = "\n".join(re.findall(r"^\| (.*?) \|", METHOD_PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    touched = {
        str(path.relative_to(ROOT))
        for folder in ("client", "server", "proto")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".proto")
        and "_pb2" not in path.name
        and re.search("ExpectedGradients|expected_gradients", path.read_text(encoding="utf-8"))
    }
    own = {"server/sidelight_server/methods/expected_gradients.py", "client/sidelight/methods/path.py"}
    assert own < touched
    named = {name for name in FILE.findall(table) if name not in MADE}
    assert named == (touched - own) | {"tests/oracle/test_methods.py"}


def test_the_method_of_the_worked_example_is_the_mean_of_both_gradients() -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for language, text in FENCE.findall(METHOD_PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, METHOD_PAGE.name, "exec", dont_inherit=True), names)
    module, images = names["module"], torch.from_numpy(names["images"])

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        probabilities = module(x).softmax(1)
        chosen = probabilities.gather(1, module(images).argmax(1, keepdim=True))
        return torch.autograd.grad(chosen.sum(), x)[0]

    mean = (gradient(images) + gradient(images.flip(-1)).flip(-1)) / 2
    expected = mean.sum(1).numpy()
    assert names["answer"].maps.shape == expected.shape
    assert abs(names["answer"].maps - expected).max() < NEIGHBORS * abs(expected).max()


@pytest.mark.requires("floor")
def test_the_steps_of_the_worked_example_are_all_that_is_needed(tmp_path: Path) -> None:
    for folder in ("client", "server", "proto"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    steps = list(STEP.finditer(METHOD_PAGE.read_text(encoding="utf-8")))
    assert len(steps) == 4
    for step in steps:
        path, text = tmp_path / (step["new"] or step["end"] or step["path"]), step["text"]
        before = [] if step["new"] else path.read_text(encoding="utf-8").splitlines(keepends=True)
        at = len(before)
        if step["anchor"]:
            (at,) = (i + 1 for i, line in enumerate(before) if line.strip() == step["anchor"])
        path.write_text("".join([*before[:at], text, *before[at:]]), encoding="utf-8")
    schema = [str(path) for path in (tmp_path / "proto").rglob("*.proto")]
    outs = [f"--{kind}_out={tmp_path / 'client'}" for kind in ("python", "grpc_python")]
    protoc = [FLOOR, "-m", "grpc_tools.protoc", f"--proto_path={tmp_path / 'proto'}", *outs, *schema]
    subprocess.run(protoc, check=True, timeout=60)
    maps = tmp_path / "maps.npy"
    sources = os.pathsep.join(str(tmp_path / folder) for folder in ("client", "server"))
    subprocess.run(
        [sys.executable, "-c", CALL, maps],
        env=os.environ | {"PYTHONPATH": sources},
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    found, expected = np.load(maps)
    assert abs(found - expected).max() < NEIGHBORS * abs(expected).max()
