"""The documentation: links, anchors and paths resolve, and the worked example computes what it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import ROOT
from support.tolerances import COMPANY

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
NEW_METHOD = "server/sidelight_server/methods/mirrored_gradient.py"  # of the worked example
MADE = {NEW_METHOD, "benchmarks/results/bench.json"}  # by the reader, or by a command

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


def test_the_index_lists_every_page() -> None:
    index = DOCS / "README.md"
    listed = {(index.parent / link).resolve() for link in LINK.findall(_prose(index))}
    assert {page for page in DOCS.glob("*/*.md") if page not in listed} == set()


def test_the_architecture_lists_every_package() -> None:
    page = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.relative_to(ROOT) for source in SOURCES for path in source.glob("*/__init__.py")}
    assert len(packages) > 15
    assert {package for package in packages if f"`{package}`" not in page} == set()


# docs/how-to/add-a-method.md


def test_the_places_to_touch_are_those_that_an_existing_method_has() -> None:
    page = (DOCS / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
    table = "\n".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))
    named = {name for name in FILE.findall(table) if name != NEW_METHOD}
    files = [path for folder in ("client", "server", "proto") for path in (ROOT / folder).rglob("*.*")]
    touched = {
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix in (".py", ".proto")
        and "_pb2" not in path.name
        and re.search("ExpectedGradients|expected_gradients", path.read_text(encoding="utf-8"))
    }
    own = {"server/sidelight_server/methods/expected_gradients.py", "client/sidelight/methods/path.py"}
    assert own < touched
    assert named == touched - own | {"client/sidelight/methods/gradient.py"}


def test_the_method_of_the_worked_example_is_the_mean_of_both_gradients() -> None:
    page = (DOCS / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for language, text in FENCE.findall(page):
        if language == "python":
            exec(compile(text, "add-a-method.md", "exec", dont_inherit=True), names)
    module, images = names["module"], torch.from_numpy(names["images"])

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        probabilities = module(x).softmax(1)
        chosen = probabilities.gather(1, module(images).argmax(1, keepdim=True))
        return torch.autograd.grad(chosen.sum(), x)[0]

    mean = (gradient(images) + gradient(images.flip(-1)).flip(-1)) / 2
    expected = mean.sum(1).numpy()
    assert names["answer"].maps.shape == expected.shape
    assert abs(names["answer"].maps - expected).max() < COMPANY * abs(expected).max()
