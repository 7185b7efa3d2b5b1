"""`make bench-docs`: writes the newest figures into the tables of the documentation.

A table stands between `<!-- figures: MODULE … -->` and `<!-- end of figures -->`, with the lines of the modules named.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from .__main__ import RESULTS

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "explanation" / "figures.json"  # committed, unlike the results of a run
PAGES = (ROOT / "README.md", ROOT / "docs" / "explanation" / "performance.md")
TABLE = re.compile(r"(<!-- figures: ([a-z_ ]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def written(page: str, figures: dict[str, Any]) -> str:
    """Return a page with its tables written anew."""
    return TABLE.sub(lambda found: found[1] + "\n".join(_table(found[2].split(), figures)) + "\n" + found[3], page)


def _table(modules: list[str], figures: dict[str, Any]) -> list[str]:
    runs = [figures["modules"][name] for name in modules if name in figures["modules"]]
    machine = figures["machine"]
    when = ", ".join(sorted({f"{run['date']} at {run['commit']}" for run in runs}))
    return [
        f"{machine['cpus']} CPU cores ({machine['cpu']}), torch {machine['torch']}, {when}:",
        "",
        "| measured | figure | goal | detail |",
        "| --- | --- | --- | --- |",
        *(_row(line) for run in runs for line in run["lines"]),
    ]


def _row(line: dict[str, Any]) -> str:
    figure = f"{line['figure']:.2f} {line['unit']}".strip()
    cells = (line["what"], figure if line["met"] else f"**{figure}**", line["goal"], line["detail"])
    return f"| {' | '.join(each.replace('|', '/') for each in cells)} |"


def main() -> None:
    newest = RESULTS / "bench.json"
    if newest.exists():
        shutil.copyfile(newest, FIGURES)
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()
