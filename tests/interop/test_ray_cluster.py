"""Ray on two nodes of one machine: an actor is killed, a node is killed, a job is killed and repeated."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from support.servers.processes import WITHIN_S, ray_environment, until

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

MODEL = "python:support.models:sized_cnn"
METHOD = "integrated_gradients(steps=200)"  # about 0.1 s for a picture, so that a job can be met in the middle
PICTURES = 120

# As `requires`: only a run that names the component starts a cluster, which takes both cores for minutes.
pytestmark = [pytest.mark.requires("serve"), pytest.mark.timeout(900)]

# Ray's own use: a class for `Dataset.map_batches`, on a cluster. It prints the rows of the data set.
PROGRAM = f"""
import sys
import ray
from sidelight_server.ray import Explainer
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
options = {{"model": {MODEL!r}, "method": {METHOD!r}, "threads": 1}}
rows = ray.data.read_binary_files(sys.argv[2], include_paths=True, override_num_blocks=30, num_cpus=0.5).map_batches(
    Explainer, fn_constructor_kwargs=options, batch_size=4, num_cpus=0.5,
    compute=ray.data.ActorPoolStrategy(size=2, enable_true_multi_threading=True, max_concurrent_calls_per_actor=2),
)
for row in rows.iter_rows():
    print("row", row["path"], row["map"].shape, row["predicted"], row["failure"], flush=True)
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(PICTURES - 1):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:04d}.png")
    (folder / "bad.png").write_text("no picture")
    return folder


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> "Iterator[Cluster]":
    """Two nodes of one CPU each. The first one also has the cluster's own processes."""
    for name, value in ray_environment().items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster  # here, because Ray reads its token when it is imported

    memory = 150 * 1024 * 1024
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=1, object_store_memory=memory)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def job(folder: Path, *arguments: str, method: str = METHOD) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "sidelight", "job", "--input", "pictures", "--output", "maps.parquet"]
    with subprocess.Popen(
        [*command, "--model", MODEL, "--method", method, "--part-rows", "6", *arguments],
        cwd=folder,
        env=os.environ | ray_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def n_parts(folder: Path) -> int:
    return len(list((folder / "maps.parquet").glob("part-*.parquet")))


def actors(name: str) -> list[psutil.Process]:
    """Return the processes of an actor's class, as Ray titles them."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"({name})" in each.name() or f"({name})" in "".join(each.cmdline()[:1]):
                found.append(each)
    return found


def check_rows(folder: Path) -> None:
    """Check that each picture has one row, and all but one a map."""
    table = pq.read_table(folder / "maps.parquet").sort_by("path")
    assert table["path"].to_pylist() == sorted(map(str, (folder / "pictures").iterdir()))
    maps = table["map"].combine_chunks().to_numpy_ndarray()
    assert np.isnan(maps).any(axis=(1, 2)).tolist() == [failure != "" for failure in table["failure"].to_pylist()]
    assert sum(failure != "" for failure in table["failure"].to_pylist()) == 1


def test_a_job_outlives_an_actor_and_a_node(cluster: "Cluster", pictures: Path, tmp_path: Path) -> None:
    with job(tmp_path, "--address", cluster.address) as process:
        until(lambda: n_parts(tmp_path) >= 2, "the first parts are written")
        (*_, actor) = actors("MapBatches(PartWriter)")
        actor.send_signal(signal.SIGKILL)
        before = n_parts(tmp_path)
        until(lambda: n_parts(tmp_path) >= before + 4, "the job goes on without the actor")
        node = next(each for each in cluster.list_all_nodes() if each is not cluster.head_node)
        cluster.remove_node(node, allow_graceful=False)
        out, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, err
    # Ray reports what it has lost on the same stream.
    assert re.search(rf"^maps.parquet: {PICTURES} rows, {PICTURES} of them now, .*; 1 failed", out, re.MULTILINE), out
    check_rows(tmp_path)


def test_a_data_set_outlives_an_actor(cluster: "Cluster", pictures: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, cluster.address, str(pictures)]
    with subprocess.Popen(command, env=os.environ | ray_environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            rows = [next(line for line in process.stdout if line.startswith("row "))]
            (*_, actor) = actors("MapBatches(Explainer)")
            actor.send_signal(signal.SIGKILL)
            rows += [line for line in process.stdout if line.startswith("row ")]
            assert process.wait(WITHIN_S) == 0
        finally:
            process.kill()
    paths = [line.split()[1] for line in rows]
    assert sorted(paths) == sorted(map(str, pictures.iterdir()))
    assert sum("INVALID_ARGUMENT" in line for line in rows) == 1


def test_a_killed_job_resumes_where_it_was(pictures: Path, tmp_path: Path) -> None:
    for parts in (3, 8):
        with job(tmp_path) as process:
            until(lambda wanted=parts: n_parts(tmp_path) >= wanted, "parts are written")
            process.kill()
    before = {each: each.stat().st_mtime_ns for each in (tmp_path / "maps.parquet").glob("part-*.parquet")}
    with job(tmp_path) as process:
        out, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, err
    now = int(re.search(r"rows, (\d+) of them now", out)[1])
    assert 0 < now <= PICTURES - 8 * 6
    assert {each: each.stat().st_mtime_ns for each in before} == before
    check_rows(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--model", "python:nowhere:net"], "nowhere"),
        (["--method", "grad_cam(layer=nowhere)"], "nowhere"),
        (["--address", "127.0.0.1:1"], "address"),
        (["--gpus", "1"], "GPU"),
    ],
)
def test_a_job_that_cannot_run_is_refused_in_one_line(
    pictures: Path, tmp_path: Path, arguments: list[str], fragment: str
) -> None:
    with job(tmp_path, *arguments) as process:
        _, err = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1
    assert fragment in err
    assert len(err.splitlines()) == 1
