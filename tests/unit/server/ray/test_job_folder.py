"""A job's folder: each part has the same pictures in every run, and when a part counts as complete."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidelight_server import ConfigurationError
from sidelight_server.ray.job_folder import JobFolder, table_of

PATHS = st.lists(st.text("abc/", min_size=1, max_size=4), min_size=1, max_size=20)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[JobFolder]:
    folder = JobFolder(tmp_path / "maps.parquet")
    with folder.open():
        yield folder


@given(runs=st.lists(st.tuples(PATHS, st.integers(1, 5)), min_size=1, max_size=4))
def test_a_plan_only_grows_and_has_each_picture_once(tmp_path_factory: pytest.TempPathFactory, runs) -> None:
    folder = JobFolder(tmp_path_factory.mktemp("job") / "maps.parquet")
    before: list[list[str]] = []
    for pictures, part_rows in runs:
        with folder.open():
            parts = folder.plan(pictures, part_rows=part_rows)
        assert parts[: len(before)] == before
        assert max(map(len, parts[len(before) :]), default=1) <= part_rows
        before = parts
    planned = [picture for part in before for picture in part]
    assert len(planned) == len(set(planned))
    assert set(planned) == {picture for pictures, _ in runs for picture in pictures}


def test_a_part_of_a_picture_is_drawn_whole_and_again_at_its_position(folder: JobFolder) -> None:
    def broken() -> Iterator[pa.Table]:
        yield pa.table({"path": ["a"]})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.write(0, broken())
    assert not folder.part(0).exists()
    for _ in range(2):
        folder.write(0, iter([pa.table({"path": ["a"]}), pa.table({"path": ["b"]})]))
    assert [each.name for each in folder.path.glob("*.parquet")] == ["part-000000.parquet"]
    assert pq.read_table(folder.path)["path"].to_pylist() == ["a", "b"]


def test_maps_are_tensors_of_arrow(folder: JobFolder) -> None:
    maps = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    folder.write(0, iter([table_of({"map": maps, "failure": np.array(["", "x"], object)})]))
    read = pq.read_table(folder.path)["map"].combine_chunks()
    np.testing.assert_array_equal(read.to_numpy_ndarray(), maps)


def test_the_report_has_the_failures_and_every_provenance(folder: JobFolder) -> None:
    folder.provenance.mkdir()
    (folder.provenance / "d1.json").write_text('{"model": "m"}')
    folder.write(0, iter([pa.table({"path": ["a", "b,c"], "failure": ["", "INTERNAL: it broke"]})]))
    assert folder.finish() == (2, 1)
    assert (folder.path / "_failures.csv").read_text().splitlines() == ["path,failure", '"b,c",INTERNAL: it broke']
    assert (folder.path / "_provenance.json").read_text().split() == ["{", '"d1":', "{", '"model":', '"m"', "}", "}"]


def test_other_maps_do_not_go_into_a_folder_that_has_some(folder: JobFolder) -> None:
    folder.check_asked({"method": "gradient", "threads": 1})
    folder.check_asked({"method": "gradient", "threads": 2})
    with pytest.raises(ConfigurationError, match=r'method "gradient", got "rise"; choose another --output'):
        folder.check_asked({"method": "rise", "threads": 1})


def test_one_job_at_a_time_has_a_folder(folder: JobFolder) -> None:
    with pytest.raises(ConfigurationError, match="another job is writing"), JobFolder(folder.path).open():
        pass


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigurationError, match=r"output: .*: Not a directory"),
        JobFolder(tmp_path / "file" / "x").open(),
    ):
        pass
