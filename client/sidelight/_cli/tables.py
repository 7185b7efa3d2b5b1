"""Output of `attribute` and `replay`: table of answers, overlays, and the comparison of a replay."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..exceptions import public_name
from ..results.attribution import Attribution
from ..results.comparison import Replay, Replayed
from ..results.storage import check_free
from ..results.types import Convergence, ExplainedTarget

HEADERS = ("picture", "class", "probability", "rows", "error", "completeness error", "device time")
ALWAYS = ("picture", "class", "probability", "device time")


def report(
    console: Console,
    paths: Sequence[Path],
    answers: Iterable[Attribution],
    *,
    folder: Path | None,
    save_folder: Path | None = None,
    original: bool = False,
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """Print the class, probability and time of each picture, and return how many failed.

    `answers` have one example each and may come in any order. Overlays are written into `folder`. `save_folder` gets
    one folder per picture, written by `Attribution.save`; `original` and `overwrite` are those of `save`. With
    `as_json`, only one line of JSON is printed per picture, as soon as its answer arrives.
    """
    write = _writer(paths, folder, save_folder, original=original, overwrite=overwrite)
    sheet, n_failed = _Sheet(), 0
    try:
        for answer in answers:
            path, has_map = paths[answer.index], not (answer.error or answer.failures)
            n_failed += not has_map
            if as_json:
                _print_json(path, answer)
            else:
                sheet.add(path, answer)
            if has_map:
                write(answer)
    finally:  # also if the server dies: print the answers so far
        sheet.print(console)
    for written, where in (("overlays", folder), ("answers", save_folder)):
        if where is not None and not as_json:
            console.print(f"{len(paths) - n_failed} {written} in {escape(str(where))}")
    return n_failed


def report_replay(console: Console, paths: Sequence[Path], replayed: Replay) -> None:
    """Print for each picture whether its map is equal, and the differences in provenance."""
    for path, example in zip(paths, replayed.examples, strict=True):
        console.print(f"{escape(path.name)}: {_compared(example)}", soft_wrap=True, highlight=False)
    if replayed.differences:
        table = Table("provenance", "then", "now", box=None, header_style="bold")
        for column in table.columns:
            column.overflow = "fold"  # print digests in full
        for each in replayed.differences:
            table.add_row(escape(each.name), escape(each.then), escape(each.now))
        console.print(table)
    console.print(_verdict(replayed), soft_wrap=True, highlight=False)


def make_folder(folder: Path, *, option: str = "--out", content: str = "overlays") -> None:
    """Create a folder. The `OSError` of a failure names the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{option}: {folder} cannot be a folder for {content}: {error.strerror}") from error


def overlay_names(paths: Sequence[Path], folder: Path) -> list[str]:
    """Return a file name for each picture's overlay: all unique, and none that would overwrite a picture."""
    taken = {path.resolve() for path in paths}
    names: list[str] = []
    for path in paths:
        tries = itertools.chain([path.stem], (f"{path.stem}-{n}" for n in itertools.count(2)))
        name = next(f"{each}.png" for each in tries if (folder / f"{each}.png").resolve() not in taken)
        taken.add((folder / name).resolve())
        names.append(name)
    return names


def _writer(
    paths: Sequence[Path], folder: Path | None, save_folder: Path | None, *, original: bool, overwrite: bool
) -> Callable[[Attribution], None]:
    """Create the folders, and return a function that writes an answer into them."""
    if folder is not None:
        make_folder(folder)
    if save_folder is not None:
        make_folder(save_folder, option="--save", content="answers")
    names, save_names = (overlay_names(paths, each or Path()) for each in (folder, save_folder))
    folders = [(save_folder or Path()) / name.removesuffix(".png") for name in save_names]
    if save_folder is not None:
        for each in folders:  # before the first request
            check_free(each, overwrite=overwrite)

    def write(answer: Attribution) -> None:
        if folder is not None:
            _overlays(answer, original=original).save(folder / names[answer.index])
        if save_folder is not None:
            answer.save(folders[answer.index], original=original, overwrite=overwrite)

    return write


class _Sheet:
    """The table of answers, with advice below it."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, ...]] = []
        self._advice: dict[str, str] = {}  # by "saturated" or "negligible"

    def add(self, path: Path, answer: Attribution) -> None:
        self._lines.append(_cells(path, answer))
        for each in answer[0].targets if len(answer) else ():
            if each.advice:
                self._advice.setdefault("saturated" if each.saturated else "negligible", each.advice)

    def print(self, console: Console) -> None:
        """Print the table without empty optional columns."""
        if not self._lines:
            return
        kept = [i for i, header in enumerate(HEADERS) if header in ALWAYS or any(line[i] for line in self._lines)]
        table = Table(*(HEADERS[i] for i in kept), box=None, header_style="bold")
        for column in table.columns[2:]:
            column.justify = "right"
        for line in self._lines:
            table.add_row(*(line[i] for i in kept))
        console.print(table)
        for word, advice in self._advice.items():
            console.print(f"{word}: {escape(advice)}", soft_wrap=True, highlight=False)


def _print_json(path: Path, answer: Attribution) -> None:
    error = answer.error and {"type": public_name(answer.error), "message": str(answer.error)}
    typer.echo(json.dumps({"picture": str(path), "error": error} | answer.to_dict(), allow_nan=False))


def _cells(path: Path, answer: Attribution) -> tuple[str, ...]:
    if answer.error or answer.failures:
        message = str(answer.error) if answer.error else answer.failures[0].message
        return escape(path.name), f"[red]{escape(message)}[/]", "", "", "", "", ""
    prediction, timing = answer.predictions[0], answer.timing
    if prediction is None or timing is None:
        raise ValueError("the answer is empty")
    label = _class(prediction.index, prediction.label)
    targets = answer[0].targets
    if answer.is_top_k or any(each.index != prediction.index or each.against is not None for each in targets):
        label += f" (explained: {', '.join(map(_target_text, targets))})"
    return (
        escape(path.name),
        escape(label),
        f"{prediction.probability:.2f}",
        *_converged(answer.convergence[0]),
        f"{timing.compute_s * 1e3:.0f} ms",
    )


def _target_text(target: ExplainedTarget) -> str:
    against = "" if target.against is None else f" against class {target.against}"
    return _class(target.index, target.label) + against


def _class(index: int, label: str) -> str:
    return label or f"class {index}"


_MET = {None: "", True: " (met)", False: " (missed)"}


def _converged(convergence: Convergence | None) -> tuple[str, str, str]:
    if convergence is None:
        return "", "", ""
    error, completeness = convergence.error, convergence.completeness_error
    relative = convergence.relative_completeness_error
    share = "" if relative is None else f" ({relative:.1%})"
    return (
        str(convergence.rows),
        "" if error is None else f"{error:.2g}{_MET[convergence.is_met]}",
        "" if completeness is None else f"{completeness:.2g}{share}",
    )


def _overlays(answer: Attribution, *, original: bool) -> Image.Image:
    """Return the overlay of the only example; for a top-k target, the k overlays side by side."""
    count = answer.maps.shape[1] if answer.is_top_k else 1
    overlays = [answer.overlay(0, k=k, original=original) for k in range(count)]
    return Image.fromarray(np.hstack([np.asarray(each) for each in overlays]))


def _compared(example: Replayed) -> str:
    if example.equal:
        return "equal bit for bit"
    if example.difference is None:
        return "differs"
    return f"differs: at most {example.difference:.2g} of the map's maximum"


def _verdict(replayed: Replay) -> str:
    if replayed.equal:
        return "[green]equal bit for bit[/]"
    if replayed.reproducible:
        return "[red]not equal[/], although the saved answer is reproducible"
    if replayed.within_tolerance:
        return f"[green]equal within {replayed.tolerance:.2g} of each map's maximum[/]: the answer is not reproducible"
    return f"[red]not equal within {replayed.tolerance:.2g} of each map's maximum[/]: the answer is not reproducible"
