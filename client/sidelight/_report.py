"""The report: a table of answers as they come, a progress bar, and an overlay of each picture."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ._attribution import Attribution


def report(console: Console, paths: Sequence[Path], answers: Iterable[Attribution], *, folder: Path | None) -> int:
    """Print class, probability and time of each picture, write overlays into a folder, and return how many failed.

    `answers` hold one example each; they may come in any order.
    """
    table = Table("picture", "class", "probability", "device time", box=None, header_style="bold")
    table.columns[2].justify = table.columns[3].justify = "right"
    names = overlay_names(paths, folder or Path())
    if folder is not None:
        make_folder(folder)
    n_failed = 0
    try:
        for answer in track(answers, "explaining", total=len(paths), console=console, transient=True):
            n_failed += bool(answer.error or answer.failures)
            table.add_row(*_cells(paths[answer.index], answer))
            if folder is not None and not (answer.error or answer.failures):
                answer.overlay(0).save(folder / names[answer.index])
    finally:  # where the server dies half-way, what it said before is still told
        if table.row_count:
            console.print(table)
    if folder is not None:
        console.print(f"{len(paths) - n_failed} overlays in {escape(str(folder))}")
    return n_failed


def make_folder(folder: Path) -> None:
    """Make a folder for overlays. `OSError` says that `--out` is wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out: {folder} cannot be a folder for overlays: {error.strerror}") from error


def overlay_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """Return a file name for each picture's overlay in a folder: all of them different, and none a picture's own."""
    taken = {path.resolve() for path in paths}
    names: list[str] = []
    for path in paths:
        tries = itertools.chain([path.stem], (f"{path.stem}-{n}" for n in itertools.count(2)))
        name = next(f"{each}.png" for each in tries if (folder / f"{each}.png").resolve() not in taken)
        taken.add((folder / name).resolve())
        names.append(name)
    return names


def _cells(path: Path, answer: Attribution) -> tuple[str, str, str, str]:
    if answer.error or answer.failures:
        message = str(answer.error) if answer.error else answer.failures[0].message
        return escape(path.name), f"[red]{escape(message)}[/]", "", ""
    prediction, explained, timing = answer.predictions[0], answer.explained[0], answer.timing
    if prediction is None or explained is None or timing is None:
        raise ValueError("the answer is empty")
    label = prediction.label or f"class {prediction.index}"
    if explained.index != prediction.index:
        label += f" (explained: {explained.label or f'class {explained.index}'})"
    return escape(path.name), escape(label), f"{prediction.probability:.2f}", f"{timing.compute_s * 1e3:.0f} ms"
