"""JSON lines: an object for each picture, printed as its answer comes."""

import json
from pathlib import Path

import typer
from rich.console import Console

from ..exceptions import SidelightError
from ..results.attribution import Attribution


class JsonLines:
    """What `sidelight attribute --json` prints. It is used as the table is."""

    def __init__(self) -> None:
        self.n_failed = 0

    def add(self, path: Path, answer: Attribution) -> bool:
        """Print a picture's object, and return whether it was explained."""
        has_failed = bool(answer.error or answer.failures)
        self.n_failed += has_failed
        error = answer.error and {"type": _public_type(answer.error), "message": str(answer.error)}
        typer.echo(json.dumps({"picture": str(path), "error": error} | answer.to_dict(), allow_nan=False))
        return not has_failed

    def print(self, console: Console) -> None:
        """Print nothing more."""


def _public_type(error: SidelightError) -> str:
    return next(each.__name__ for each in type(error).__mro__ if not each.__name__.startswith("_"))
