"""JSON lines: one object per picture, printed as soon as its answer arrives."""

import json
from pathlib import Path

import typer
from rich.console import Console

from ..exceptions import SidelightError
from ..results.attribution import Attribution


class JsonLines:
    """The output of `sidelight attribute --json`, with the interface of the table."""

    def __init__(self) -> None:
        self.n_failed = 0

    def add(self, path: Path, answer: Attribution) -> bool:
        """Print a picture's object, and return whether it has a map."""
        has_failed = bool(answer.error or answer.failures)
        self.n_failed += has_failed
        error = answer.error and {"type": _public_type(answer.error), "message": str(answer.error)}
        typer.echo(json.dumps({"picture": str(path), "error": error} | answer.to_dict(), allow_nan=False))
        return not has_failed

    def print(self, console: Console) -> None:
        """Do nothing: the objects are already printed."""


def _public_type(error: SidelightError) -> str:
    return next(each.__name__ for each in type(error).__mro__ if not each.__name__.startswith("_"))
