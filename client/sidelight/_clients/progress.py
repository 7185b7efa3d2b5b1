"""Progress of a stream: examples per second, rows and retries, on a terminal or in a notebook."""

import sys
import time
from collections.abc import Sized
from dataclasses import dataclass
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol, Self

from .._inputs.validation import flag
from ..exceptions import InvalidArgument
from ..results.attribution import Attribution
from ..results.display import LiveGallery

UPDATE_S = 0.2  # between two updates of a notebook's cell
DESCRIPTION = "explaining"


@dataclass(slots=True)
class Counts:
    """Counts of the answers of a stream."""

    total: int | None  # batches; None if unknown
    batches: int = 0
    examples: int = 0
    failed: int = 0  # examples, or whole batches
    rows: int = 0
    retries: int = 0  # parts of batches that were sent again
    elapsed_s: float = 0.0

    @property
    def text(self) -> str:
        """The counts in one line, without the batches."""
        parts = [f"{self.examples / max(self.elapsed_s, 1e-9):.3g} examples/s", f"{self.rows:,} rows"]
        parts.append("1 retry" if self.retries == 1 else f"{self.retries:,} retries")
        return ", ".join(parts + ([f"{self.failed:,} failed"] if self.failed else []))


class Display(Protocol):
    """Shows counts."""

    def show(self, counts: Counts, answer: Attribution) -> None:
        """Show the counts after an answer."""

    def close(self, counts: Counts) -> None:
        """Show the last counts, and release the display's resources."""


class Progress:
    """Counts the answers of one stream, and shows the counts. Without a display it does nothing."""

    def __init__(self, display: Display | None = None, *, total: int | None = None) -> None:
        self._display = display
        self._counts = Counts(total)
        self._began_s = time.monotonic()

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._display is not None:
            self._display.close(self._counts)

    def add(self, answer: Attribution, *, n_retries: int) -> None:
        """Count an answer. `n_retries` is the stream's number so far."""
        if self._display is None:
            return
        counts = self._counts
        counts.retries = n_retries
        counts.elapsed_s = time.monotonic() - self._began_s
        if answer.final:
            counts.batches += 1
            counts.examples += len(answer)
            counts.failed += len(answer.failures) + (answer.error is not None)
            counts.rows += _rows(answer)
        self._display.show(counts, answer)


def progress_of(batches: object, *, is_shown: bool) -> Progress:
    """Return the progress of a stream. `InvalidArgument` if nothing can show it."""
    if not flag(is_shown, "progress"):
        return Progress()
    total = len(batches) if isinstance(batches, Sized) else None
    return Progress(_display(total), total=total)


def _rows(answer: Attribution) -> int:
    """Return the rows of an answer. A method of one row reports no convergence: it took a row for each map."""
    n_maps = answer.maps.shape[1] if answer.is_top_k else 1
    each = answer.convergence or (None,) * len(answer)
    pairs = zip(each, answer.predictions, strict=True)
    return sum(convergence.rows if convergence else n_maps for convergence, prediction in pairs if prediction)


def _display(total: int | None) -> Display:
    if _is_notebook():
        return NotebookDisplay()
    if find_spec("rich"):
        return RichBar(total)
    if find_spec("tqdm"):
        return TqdmBar(total)
    raise InvalidArgument("progress: got True, but neither rich nor tqdm is installed: pip install 'sidelight[cli]'")


def _is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")


class RichBar:
    """A bar of rich on the error output."""

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        counts = TextColumn("batches, {task.fields[text]}")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), counts, TimeRemainingColumn()
        self._bars = Bars(*columns, console=Console(stderr=True))
        self._task = self._bars.add_task(DESCRIPTION, total=total, text="")
        self._bars.start()

    def show(self, counts: Counts, answer: Attribution) -> None:
        self._bars.update(self._task, completed=counts.batches, text=counts.text)

    def close(self, counts: Counts) -> None:
        self._bars.stop()


class TqdmBar:
    """A bar of tqdm on the error output."""

    def __init__(self, total: int | None) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=DESCRIPTION, total=total, unit=" batches")

    def show(self, counts: Counts, answer: Attribution) -> None:
        self._bar.set_postfix_str(counts.text, refresh=False)
        self._bar.update(counts.batches - self._bar.n)

    def close(self, counts: Counts) -> None:
        self._bar.close()


class NotebookDisplay:
    """A bar in a notebook's cell, above a live gallery of the newest answers."""

    def __init__(self) -> None:
        from IPython.display import display

        self._gallery = LiveGallery()
        self._updated_s = 0.0
        # IPython has no types.
        self._handle: Any = display({"text/html": ""}, raw=True, display_id=True)

    def show(self, counts: Counts, answer: Attribution) -> None:
        is_due = time.monotonic() - self._updated_s >= UPDATE_S or counts.batches == counts.total
        if is_due or not self._gallery.is_full:  # drawing every answer of a fast stream would slow it down
            self._gallery.add(answer)
            self._update(counts)
            self._updated_s = time.monotonic()

    def close(self, counts: Counts) -> None:
        self._update(counts)

    def _update(self, counts: Counts) -> None:
        end = f' max="{counts.total}" value="{counts.batches}"' if counts.total else ""
        done = f"{counts.batches}/{counts.total}" if counts.total else f"{counts.batches}"
        text = f"{done} batches, {counts.text}"
        bar = f'<progress{end} aria-label="{DESCRIPTION}" style="width:240px;vertical-align:middle"></progress> {text}'
        html = f'<div style="font:12px sans-serif">{bar}{self._gallery.html()}</div>'
        self._handle.update({"text/html": html, "text/plain": text}, raw=True)
