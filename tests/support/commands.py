"""What tests of the command `sidelight` need: pictures to explain, and readers of its output."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import Result
from PIL import Image

Run = Callable[..., Result]
ABSENT = "unix:/nonexistent/socket"


def picture(path: Path | str, *, seed: int = 0) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return path


def objects(done: Result) -> list[dict[str, Any]]:
    """Return the printed lines of JSON, and check that there are no others."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(output: str) -> dict[str, list[str]]:
    """Return the table's rows by picture name; cells are separated by two or more spaces."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) > 1}
