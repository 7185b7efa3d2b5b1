"""The tables of benchmarks: pages have the figures of `figures.json`, and a goal is one row."""

from pathlib import Path

import pytest

from benchmarks.results import Results, Run
from benchmarks.support.measure import Line
from benchmarks.tables import FIGURES, PAGES, TABLE, summary, written

FAST = Line("speed, small", 1.5, "×", "≥ 1.4", met=True, detail="100 images/s", row="speed: small / large")
SLOW = Line("speed, large", 1.25, "×", "≥ 1.4", met=False, detail="10 images/s", row="speed: small / large")
OTHER = Line("memory", None, "MB", "< 20", met=False, detail="not run: no memory")
MACHINE = {"cpu": "a processor", "cpus": 2, "torch": "2.13.0", "python": "3.11.2"}
PAGE = """Before.

<!-- summary: speed -->
old
<!-- end of figures -->

Between.

<!-- figures: speed memory -->
<!-- end of figures -->
After.
"""
WRITTEN = """Before.

<!-- summary: speed -->
2 CPU cores (a processor), torch 2.13.0; 2026-11-27 at commit abc:

| measured | figure | goal | |
| --- | --- | --- | --- |
| speed: small / large | 1.50 × / **1.25 ×** | ≥ 1.4 | met / not met |
<!-- end of figures -->

Between.

<!-- figures: speed memory -->
2 CPU cores (a processor), torch 2.13.0; 2026-11-27 at commit abc, 2026-11-28 at commit def:

| measured | figure | goal | detail |
| --- | --- | --- | --- |
| speed, small | 1.50 × | ≥ 1.4 | 100 images/s |
| speed, large | **1.25 ×** | ≥ 1.4 | 10 images/s |
| memory | **not run** | < 20 | not run: no memory |
<!-- end of figures -->
After.
"""


def results() -> Results:
    runs = {"memory": Run("2026-11-28", "def", [OTHER]), "speed": Run("2026-11-27", "abc", [FAST, SLOW])}
    return Results(MACHINE, runs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_documentation_are_the_committed_figures(page: Path):
    text = page.read_text(encoding="utf-8")
    assert TABLE.search(text)
    assert written(text, Results.read(FIGURES)) == text, "make bench-docs"


def test_tables_are_written_between_their_marks_and_nothing_else_is_touched():
    assert written(PAGE, results()) == WRITTEN
    assert written(WRITTEN, results()) == WRITTEN


def test_a_table_of_benchmarks_that_did_not_run_states_it():
    page = "<!-- figures: peers -->\n<!-- end of figures -->"
    assert written(page, results()) == "<!-- figures: peers -->\nNot measured.\n<!-- end of figures -->"


def test_the_lines_of_a_goal_are_one_row_and_a_line_without_a_goal_is_none():
    (row,) = summary([FAST, OTHER, SLOW])
    assert row.lines == [FAST, SLOW]
    assert row.verdict == "met / not met"


def test_results_come_back_from_their_file(tmp_path: Path):
    results().merge_into(tmp_path / "bench.json")
    assert Results.read(tmp_path / "bench.json") == results()


def test_a_new_run_replaces_the_old_one_and_leaves_other_benchmarks_alone(tmp_path: Path):
    file = tmp_path / "bench.json"
    results().merge_into(file)
    newer = Run("2026-11-29", "abd", [FAST])
    Results(MACHINE, {"speed": newer}).merge_into(file)
    assert Results.read(file).runs == {"memory": results().runs["memory"], "speed": newer}


def test_the_results_of_another_machine_are_dropped(tmp_path: Path):
    file = tmp_path / "bench.json"
    results().merge_into(file)
    here = Results(MACHINE | {"cpus": 64}, {"speed": Run("2026-11-29", "abd", [FAST])})
    here.merge_into(file)
    assert Results.read(file) == here
