"""A job's folder: parts in Parquet, and the plan that lists the pictures of each part.

    maps.parquet/part-000000.parquet …    the rows; pandas, Arrow and Ray read the folder as one table
    maps.parquet/_provenance.json         their provenance, by digest
    maps.parquet/_failures.csv            the pictures without a map
    maps.parquet/_job/                    the plan, the options, the lock, and parts that are being written

The plan is fixed once it is written, and later pictures only add parts to it. A part appears whole, by a rename. So
however often a job is killed and repeated, each picture has its one row in its one part.
"""

import contextlib
import csv
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ..errors import ConfigurationError
from .rows import Columns

VOLATILE = ("device", "threads", "chunk_rows", "software", "model_version")  # may differ between parts of one job


class JobFolder:
    """The folder of a job's output. Every node must see it under this path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._job = path / "_job"
        self._plan = self._job / "plan.parquet"
        self._asked = self._job / "asked.json"
        self._unfinished = self._job / "unfinished"
        self.provenance = self._job / "provenance"

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder and lock it. Raises `ConfigurationError` if that fails or another job of this host has it."""
        try:
            self._job.mkdir(parents=True, exist_ok=True)
            lock = (self._job / "lock").open("w")
        except OSError as error:
            raise ConfigurationError(f"output: {self.path}: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigurationError(f"output: another job is writing to {self.path}") from None
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished.mkdir(exist_ok=True)
            yield

    def check_asked(self, facts: dict[str, Any]) -> None:
        """Record the options. Raises `ConfigurationError` if the folder has maps of another model or method."""
        asked = {name: value for name, value in facts.items() if name not in VOLATILE}
        if not self._asked.exists():
            self._replace(self._asked, json.dumps(asked, indent=2, sort_keys=True) + "\n")
            return
        before = json.loads(self._asked.read_text(encoding="utf-8"))
        for name in sorted(before.keys() | asked.keys()):
            if before.get(name) != asked.get(name):
                raise ConfigurationError(
                    f"output: {self.path} has maps with {name} {json.dumps(before.get(name))}, got "
                    f"{json.dumps(asked.get(name))}; choose another --output"
                )

    def plan(self, pictures: Sequence[str], *, part_rows: int) -> list[list[str]]:
        """Return the pictures of every part: those planned before, and new parts for pictures that are new."""
        parts: list[list[str]] = []
        if self._plan.exists():
            table = pq.read_table(self._plan)
            for part, picture in zip(table["part"].to_pylist(), table["path"].to_pylist(), strict=True):
                if part == len(parts):
                    parts.append([])
                parts[part].append(picture)
        known = {picture for part in parts for picture in part}
        new = [picture for picture in dict.fromkeys(pictures) if picture not in known]
        if new:
            parts += [new[start : start + part_rows] for start in range(0, len(new), part_rows)]
            rows = [(index, picture) for index, part in enumerate(parts) for picture in part]
            written = self._unfinished / self._plan.name
            pq.write_table(
                pa.table(dict(zip(("part", "path"), map(list, zip(*rows, strict=True)), strict=True))), written
            )
            written.replace(self._plan)
        return parts

    def part(self, index: int) -> Path:
        return self.path / f"part-{index:06d}.parquet"

    def write(self, index: int, tables: Iterator[pa.Table]) -> None:
        """Write a part from tables of the same columns. It appears once it is whole; an older one is replaced."""
        writer = f"{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}"
        written = self._unfinished / f"{self.part(index).name}.{writer}"
        first = next(tables)
        with pq.ParquetWriter(written, first.schema) as file:
            file.write_table(first)
            for table in tables:
                file.write_table(table)
        written.replace(self.part(index))

    def finish(self) -> tuple[int, int]:
        """Write the report of failures and the provenance file. Return the numbers of rows and of failures."""
        rows = ds.dataset(self.path, format="parquet")
        n_failures = 0
        with (self.path / "_failures.csv").open("w", newline="", encoding="utf-8") as file:
            report = csv.writer(file)
            report.writerow(("path", "failure"))
            for batch in rows.to_batches(columns=["path", "failure"], filter=pc.field("failure") != ""):
                report.writerows(zip(batch["path"].to_pylist(), batch["failure"].to_pylist(), strict=True))
                n_failures += batch.num_rows
        facts = {each.stem: json.loads(each.read_text(encoding="utf-8")) for each in self.provenance.glob("*.json")}
        text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        self._replace(self.path / "_provenance.json", text)
        return rows.count_rows(), n_failures

    def _replace(self, path: Path, text: str) -> None:
        written = self._unfinished / path.name
        written.write_text(text, encoding="utf-8")
        written.replace(path)


def table_of(columns: Columns) -> pa.Table:
    """Return columns as a table. Arrays of more than one dimension become Arrow's fixed-shape tensors."""
    return pa.table(
        {
            name: pa.FixedShapeTensorArray.from_numpy_ndarray(column) if column.ndim > 1 else pa.array(column)
            for name, column in columns.items()
        }
    )
