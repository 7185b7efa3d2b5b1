"""The demonstration: starts a server with an ImageNet classifier, explains photographs and draws a gallery."""

import collections
import contextlib
import importlib.util
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rich.console import Console

from .._client import connect
from ..exceptions import SidelightError
from ..results.attribution import Attribution
from ..results.gallery import gallery
from .tables import make_folder, report

MODEL = "python:sidelight_server.models.sources.demo:efficientnet_lite0"
START_TIMEOUT_S = 120.0

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
    """Start a server, explain every photograph, and write one overlay each and `gallery.png` into a folder."""
    paths = photographs()
    make_folder(folder)
    answers: dict[int, Attribution] = {}
    began = time.monotonic()
    with demo_server(console) as address, connect(address, connect_timeout=START_TIMEOUT_S) as client:
        server = client.info()
        console.print(
            f'"{server.models[0].name}" is ready on {server.models[0].device} after {time.monotonic() - began:.1f} s'
        )

        def collected_answers() -> Iterator[Attribution]:
            for answer in client.stream(paths):
                answers[answer.index] = answer
                yield answer

        report(console, paths, collected_answers(), folder=folder)
    drawn = gallery([answers[index] for index in range(len(paths))], heading="Which pixels decided?")
    drawn.save(folder / "gallery.png")
    console.print(f"{len(paths)} photographs in {folder / 'gallery.png'}")


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
                # If nobody reads the pipe, the server blocks once its buffer is full.
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
