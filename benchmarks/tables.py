"""The tables of results. `make bench-docs` writes the newest figures into those of the documentation.

There a table stands between `<!-- figures: NAME … -->` and `<!-- end of figures -->`, with the lines of the benchmarks
named. `<!-- summary: NAME … -->` has a row for each goal instead.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .results import NEWEST, Results, Run
from .support.measure import Line

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "explanation" / "figures.json"  # committed, unlike the results of single runs
PAGES = (ROOT / "README.md", ROOT / "docs" / "explanation" / "performance.md")
TABLE = re.compile(r"(<!-- (figures|summary): ([a-z_ ]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """The lines of one goal, with their figures in one cell."""

    name: str
    lines: list[Line]

    @property
    def goal(self) -> str:
        return _joined(line.goal for line in self.lines)

    @property
    def verdict(self) -> str:
        return _joined("met" if line.met else "not met" for line in self.lines)


def summary(lines: Iterable[Line]) -> list[SummaryRow]:
    """Return the rows that lines belong to, in the order of their first lines."""
    rows: dict[str, SummaryRow] = {}
    for line in lines:
        if line.row:
            rows.setdefault(line.row, SummaryRow(line.row, [])).lines.append(line)
    return list(rows.values())


def written(page: str, results: Results) -> str:
    """Return a page with new tables."""
    return TABLE.sub(lambda found: f"{found[1]}{_table(found[2], found[3].split(), results)}\n{found[4]}", page)


def _table(kind: str, names: list[str], results: Results) -> str:
    runs = [results.runs[name] for name in names if name in results.runs]
    if not runs:
        return "Not measured."
    lines = [line for run in runs for line in run.lines]
    rows = _summary_rows(lines) if kind == "summary" else _line_rows(lines)
    return "\n".join([_origin(results.machine, runs), "", *rows])


def _origin(machine: dict[str, object], runs: list[Run]) -> str:
    """Return a sentence with the machine, date and commit of these runs."""
    when = ", ".join(dict.fromkeys(f"{run.date} at commit {run.commit}" for run in runs))
    return f"{machine['cpus']} CPU cores ({machine['cpu']}), torch {machine['torch']}; {when}:"


def _line_rows(lines: list[Line]) -> list[str]:
    cells = ((line.what, _bold(line), line.goal, line.detail) for line in lines)
    return ["| measured | figure | goal | detail |", "| --- | --- | --- | --- |", *map(_row, cells)]


def _summary_rows(lines: list[Line]) -> list[str]:
    cells = ((row.name, " / ".join(map(_bold, row.lines)), row.goal, row.verdict) for row in summary(lines))
    return ["| measured | figure | goal | |", "| --- | --- | --- | --- |", *map(_row, cells)]


def _bold(line: Line) -> str:
    return line.figure_text if line.met else f"**{line.figure_text}**"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(each.replace('|', '/') for each in cells)} |"


def _joined(words: Iterable[str]) -> str:
    """Return words with strokes between them; one of them if they are all the same."""
    found = list(words)
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def main() -> None:
    if NEWEST.exists():
        Results.read(NEWEST).merge_into(FIGURES)
    results = Results.read(FIGURES)
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
