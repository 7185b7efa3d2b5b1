"""A job of 20,000 pictures that is killed three times. `python -m benchmarks.soak.jobs`."""

import argparse
import collections
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

from ..support.measure import Line, report

N_PICTURES = 20_000
KILLED_AT = (0.2, 0.45, 0.7)  # of the parts
PART_ROWS = 250
PAUSE_S = 0.02
MODEL = "python:benchmarks.support.nets:digits_cnn"


def run() -> list[Line]:
    """Run a job to its end in four runs, three of which are killed, and count its rows."""
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        pictures, output = Path(folder) / "pictures", Path(folder) / "maps.parquet"
        pictures.mkdir()
        _write_digits(pictures)
        began = time.monotonic()
        kept: dict[str, int] = {}
        n_redone = 0
        for share in KILLED_AT:
            _killed(pictures, output, n_parts=round(share * N_PICTURES / PART_ROWS))
            now = _parts(output)
            n_redone += sum(now.get(name) != written for name, written in kept.items())
            kept = now
        subprocess.run(_command(pictures, output), check=True, capture_output=True)
        seconds = time.monotonic() - began
        n_redone += sum(_parts(output).get(name) != written for name, written in kept.items())
        table = pq.read_table(output, columns=["path", "failure"])
        rows = collections.Counter(table["path"].to_pylist())
    n_once = sum(count == 1 for count in rows.values())
    n_failures = sum(failure != "" for failure in table["failure"].to_pylist())
    met = n_once == len(rows) == N_PICTURES == table.num_rows and not n_failures and not n_redone
    return [
        Line(
            what=f"rows of a job of {N_PICTURES} pictures, killed {len(KILLED_AT)} times, each once",
            figure=n_once,
            unit="rows",
            goal=f"{N_PICTURES}",
            met=met,
            detail=f"{table.num_rows} rows, {n_failures} failures, {n_redone} parts written twice; {seconds:.0f} s "
            f"with {len(KILLED_AT) + 1} starts",
        )
    ]


def _write_digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 digits repeatedly, each time with different noise."""
    digits = load_digits().images  # [1797, 8, 8], 0…16
    random = np.random.default_rng(0)
    for index in range(N_PICTURES):
        pixels = 15 * digits[index % len(digits)] + random.integers(0, 16, (8, 8))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:05d}.png")


def _command(pictures: Path, output: Path) -> list[str]:
    job = [sys.executable, "-m", "sidelight", "job", "--input", str(pictures), "--output", str(output)]
    return [*job, "--model", MODEL, "--part-rows", str(PART_ROWS)]


def _killed(pictures: Path, output: Path, *, n_parts: int) -> None:
    """Start a job, and kill it (SIGKILL) once it has written a number of parts."""
    with subprocess.Popen(_command(pictures, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while len(_parts(output)) < n_parts:
            if job.poll() is not None:
                raise RuntimeError(f"the job ended by itself, with {job.returncode}")
            time.sleep(PAUSE_S)
        job.kill()


def _parts(output: Path) -> dict[str, int]:
    return {each.name: each.stat().st_mtime_ns for each in output.glob("part-*.parquet")}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.exit(report(run()))
