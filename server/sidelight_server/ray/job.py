"""A job: explains the pictures of a folder on Ray Data, and continues where an earlier run ended."""

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.exceptions import RayTaskError
from sidelight.exceptions import SidelightError as ClientError

from ..app.openmp import limit_spinning
from ..errors import ConfigurationError, SidelightError
from .explainer import Explainer
from .job_folder import JobFolder, table_of

PART_ROWS = 256
BATCH_ROWS = 32
CALLS = 2  # parts that an actor works on at once: one is read and written while the other computes
MAX_BLOCKS = 1000  # limit of the blocks that the parts are grouped into, for Ray's driver
CONNECT_S = 10.0
OBJECT_STORE_BYTES = 256 * 1024 * 1024  # size for a Ray that the job starts itself: maps do not travel through it

Options = dict[str, Any]  # the keywords of `Explainer`


@dataclass(frozen=True, slots=True)
class Resources:
    """The cluster of a job and the resources of each actor. `actors` 0: as many as its CPUs and GPUs suffice for."""

    address: str | None = None  # of a Ray cluster; None: a Ray of its own, on this machine
    actors: int = 0
    threads: int = 1
    gpus: float = 0.0

    def n_actors(self, n_parts: int) -> int:
        return min(self.actors or self.max_actors(), max(1, n_parts))

    def max_actors(self) -> int:
        """Return the number of actors that Ray's resources suffice for. Raises `ConfigurationError` if it is 0."""
        cluster = ray.cluster_resources()
        n = int(cluster.get("CPU", 0) // self.threads)
        if self.gpus:
            n = min(n, int(cluster.get("GPU", 0) // self.gpus))
        if not n:
            raise ConfigurationError(
                f"threads, gpus: got {self.threads} and {self.gpus:g} for each actor; Ray has "
                f"{cluster.get('CPU', 0):g} CPUs and {cluster.get('GPU', 0):g} GPUs"
            )
        return n


@dataclass(frozen=True, slots=True)
class Progress:
    """How many pictures have a row, and how many there are."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a job: the rows of its output, those without a map, and the time of this run."""

    n_rows: int
    n_failures: int
    n_explained: int  # in this run
    seconds: float


def run(
    pictures: Sequence[str],
    output: Path,
    options: Options,
    *,
    resources: Resources = Resources(),
    part_rows: int = PART_ROWS,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Explain pictures, given by absolute paths, and write a row for each to the folder `output`.

    Parts that an earlier run has written are kept. Raises `ConfigurationError` if the job cannot run.
    """
    folder = JobFolder(output.absolute())
    with folder.open(), _ray(resources.address):
        try:
            resources.max_actors()  # raises: Ray itself would wait forever for resources that it does not have
            check = ray.remote(num_cpus=resources.threads, num_gpus=resources.gpus)(_facts)
            folder.check_asked(ray.get(check.remote(os.getcwd(), options)) | {"map_dtype": options.get("map_dtype")})
            parts = folder.plan(pictures, part_rows=part_rows)
            missing = [index for index in range(len(parts)) if not folder.part(index).exists()]
            total, began = sum(map(len, parts)), time.monotonic()
            done = before = total - sum(len(parts[index]) for index in missing)
            on_progress(Progress(done, total))
            for n_rows in _explain_parts(folder, {index: parts[index] for index in missing}, options, resources):
                done += n_rows
                on_progress(Progress(done, total))
        except RayTaskError as error:
            if isinstance(error.cause, ConfigurationError | SidelightError | ClientError):
                raise ConfigurationError(str(error.cause)) from None
            raise
        n_rows, n_failures = folder.finish()
        return Report(n_rows, n_failures, done - before, time.monotonic() - began)


class PartWriter:
    """An actor of Ray Data: explains the pictures of a part and writes it."""

    def __init__(self, working_directory: str, output: str, options: Options) -> None:
        _enter(working_directory)
        self._folder = JobFolder(Path(output))
        self._explain = Explainer(**options, provenance=self._folder.provenance)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, list[int]]:
        """Write the one part of a batch. Return its number of rows."""
        index, pictures = int(batch["part"][0]), list(batch["paths"][0])
        if not self._folder.part(index).exists():  # otherwise Ray repeats a task whose actor has died
            starts = range(0, len(pictures), BATCH_ROWS)
            self._folder.write(index, (self._table(pictures[start : start + BATCH_ROWS]) for start in starts))
        return {"rows": [len(pictures)]}

    def _table(self, pictures: Sequence[str]) -> Any:
        return table_of(self._explain({"path": np.array(pictures, object)}))


def _facts(working_directory: str, options: Options) -> dict[str, Any]:
    """Load the model and check the options where the actors will run. Return the provenance."""
    _enter(working_directory)
    return Explainer(**options).facts


def _explain_parts(
    folder: JobFolder, parts: Mapping[int, Sequence[str]], options: Options, resources: Resources
) -> Iterator[int]:
    """Explain parts, and yield each one's number of rows once it is written."""
    if not parts:
        return
    n_actors = resources.n_actors(len(parts))
    data = ray.data.from_items(
        [{"part": index, "paths": list(paths)} for index, paths in parts.items()],
        override_num_blocks=min(len(parts), MAX_BLOCKS),
    ).map_batches(
        PartWriter,
        fn_constructor_args=(os.getcwd(), str(folder.path), options),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=n_actors,
            max_tasks_in_flight_per_actor=2 * CALLS,
            max_concurrent_calls_per_actor=CALLS,
            enable_true_multi_threading=True,
        ),
        num_cpus=resources.threads,
        num_gpus=resources.gpus,
    )
    for row in data.iter_rows():
        yield int(row["rows"])


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or run a Ray for the time of a job, without dashboard and telemetry."""
    if address:
        _check_listens(address)
    limit_spinning()  # the actors share the cores
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else own),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"address: {address}: {error}") from None
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Raise `ConfigurationError` if nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as error:
            raise ConfigurationError(f"address: {address}: {error}; expected that of a Ray cluster") from None


def _enter(working_directory: str) -> None:
    """Find the model where the job was started, as `sidelight-server` does."""
    if os.path.isdir(working_directory):
        os.chdir(working_directory)
    if "" not in sys.path:
        sys.path.insert(0, "")
