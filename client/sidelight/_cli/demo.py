"""The demonstration: starts a server with an ImageNet classifier, and compares methods on photographs."""

import collections
import contextlib
import importlib.util
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

from .._clients.client import connect
from ..exceptions import SidelightError
from ..methods.gradient import GradCAM
from ..methods.method import Method
from ..methods.path import IntegratedGradients, SmoothGrad
from ..methods.perturbation import Occlusion
from ..results.attribution import Attribution
from ..results.gallery import gallery
from .tables import make_folder

MODEL = "python:sidelight_server.models.sources.demo:efficientnet_lite0"
START_TIMEOUT_S = 120.0

# What each is good for is the second line of its column.
METHODS: dict[str, Method] = {
    "Integrated gradients\nfine, smoothed: which details count": SmoothGrad(
        samples=8, base=IntegratedGradients(steps=4)
    ),
    "Grad-CAM\ncoarse, in one step: where the object is": GradCAM(),
    "Occlusion\nwhat speaks for the class (red) and against it (blue)": Occlusion(window=32, stride=24),
}
# The astronaut is predicted as a football helmet: the maps show why.
COMPARED = ("chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "astronaut.png", "flower.jpg")

# Photographs from two packages. Those that show an ImageNet class come first.
PHOTOGRAPHS = {
    "skimage": (
        "data",
        "chelsea.png coffee.png motorcycle_left.png rocket.jpg camera.png astronaut.png clock_motion.png "
        "motorcycle_right.png coins.png brick.png grass.png gravel.png moon.png hubble_deep_field.jpg retina.jpg "
        "cell.png ihc.png microaneurysms.png page.png text.png",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}


def run(folder: Path, *, console: Console) -> None:
    """Start a server, explain six photographs by three methods, and write `gallery.png` into a folder."""
    found = {path.name: path for path in photographs()}
    paths = [found[name] for name in COMPARED]
    make_folder(folder)
    began = time.monotonic()
    with demo_server(console) as address, connect(address, connect_timeout=START_TIMEOUT_S) as client:
        server = client.info()
        console.print(
            f'"{server.models[0].name}" is ready on {server.models[0].device} after {time.monotonic() - began:.1f} s'
        )
        answers = {
            name: list(client.stream(paths, method=method, ordered=True, progress=console.is_terminal))
            for name, method in METHODS.items()
        }
    _print_table(console, paths, answers)
    gallery(answers, heading="Which pixels decided?").save(folder / "gallery.png")
    console.print(f"{len(paths)} photographs by {len(METHODS)} methods in {folder / 'gallery.png'}")


def _print_table(console: Console, paths: Sequence[Path], answers: Mapping[str, Sequence[Attribution]]) -> None:
    """Print each photograph's class and probability, and the time of each method."""
    table = Table("photograph", "class", "probability", *(name.partition("\n")[0] for name in answers), box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for path, *each in zip(paths, *answers.values(), strict=True):
        prediction = each[0][0].prediction
        times = [f"{answer.timing.compute_s:.2f} s" for answer in each if answer.timing]
        if prediction:
            table.add_row(path.name, prediction.label, f"{prediction.probability:.2f}", *times)
    console.print(table)


def photographs() -> list[Path]:
    """Return the photographs' paths. `SidelightError` says which extra is missing."""
    found: list[Path] = []
    for package, (folder, names) in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SidelightError("the demonstration needs more packages: pip install 'sidelight[demo]'")
        found += [Path(spec.origin).parent / folder / name for name in names.split()]
    return found


@contextlib.contextmanager
def demo_server(console: Console) -> Iterator[str]:
    """Run the server in its own process, and yield its address."""
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        address = f"unix:{folder}/socket"
        command = [sys.executable, "-m", "sidelight_server", "--model", MODEL, "--listen", address]
        console.print(f"starting sidelight-server --model {MODEL}")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
            try:
                _wait(process)
                # Read the pipe to its end: the server would block if it were full.
                threading.Thread(target=_discard_log, args=(process.stderr,), daemon=True).start()
                yield address
            finally:
                process.terminate()


def _discard_log(pipe: IO[str]) -> None:
    with contextlib.suppress(ValueError):  # the pipe was closed
        collections.deque(pipe, maxlen=0)


def _wait(process: "subprocess.Popen[str]") -> None:
    """Wait for the log event `serving`."""
    lines: list[str] = []
    for line in process.stderr or ():
        if "event=serving" in line:
            return
        lines.append(line)
    raise SidelightError(f"the server did not start: {''.join(lines).strip()}")
