"""The command `job`: explains many pictures on Ray, on this machine or on a cluster."""

import glob
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..exceptions import SidelightError
from .arguments import PICTURES, pictures_of
from .options import Explanation, explanation, with_options

NEEDS = "sidelight job needs {}: pip install 'sidelight[ray]'"


@with_options(explained=explanation)
def job(
    *,
    input_: Annotated[
        list[str],
        typer.Option("--input", help="Pictures: a pattern such as 'pictures/**/*.jpg', or a folder; repeatable."),
    ],
    output: Annotated[Path, typer.Option(help="The folder for the rows, in Parquet; continues an unfinished job.")],
    model: Annotated[str, typer.Option(help="The model's source, as of `sidelight-server --model`.")],
    setting: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the server, as weights; repeatable.")
    ] = None,
    explained: Explanation,
    actors: Annotated[int, typer.Option(min=0, help="Engines to run; 0: as many as fit.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each engine.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each engine.")] = 0.0,
    part_rows: Annotated[int, typer.Option(min=1, help="Pictures of one part; a kill loses unfinished parts.")] = 256,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Default: this machine alone.")
    ] = None,
) -> None:
    """Explain many pictures, and write a row for each to a folder in Parquet. After a kill, run it again to continue.

    A picture that cannot be explained is a row with a failure. It needs sidelight[ray].
    """
    pictures = _pictures(input_)
    options = _settings(setting or []) | {"model": model} | explained
    try:
        from sidelight_server.ray import job as jobs
    except ModuleNotFoundError as error:
        raise SidelightError(NEEDS.format(error.name)) from None
    from sidelight_server.errors import ConfigurationError

    console = Console(soft_wrap=True, highlight=False)
    columns = (TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("explaining", total=len(pictures))
        try:
            report = jobs.run(
                pictures,
                output,
                options,
                resources=jobs.Resources(address=address, actors=actors, threads=threads, gpus=gpus),
                part_rows=part_rows,
                on_progress=lambda progress: bar.update(task, completed=progress.done, total=progress.total),
            )
        except ConfigurationError as error:
            raise SidelightError(" ".join(str(error).split())) from None
    rate = report.n_explained / report.seconds if report.seconds else 0.0
    console.print(
        f"{escape(str(output))}: {report.n_rows} rows, {report.n_explained} of them now, {rate:.1f} a second; "
        f"{report.n_failures} failed" + (f", see {escape(str(output / '_failures.csv'))}" if report.n_failures else "")
    )


def _pictures(patterns: list[str]) -> list[str]:
    """Return the absolute paths of all pictures, sorted. Raises `SidelightError` for a pattern that matches none."""
    found: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            found += map(str, pictures_of([Path(pattern)]))
            continue
        files = [each for each in glob.iglob(pattern, recursive=True) if os.path.isfile(each)]
        if not files:
            raise SidelightError(f"--input: no file matches {pattern!r}; expected a folder with pictures "
                                 f"({', '.join(PICTURES)}) or a pattern such as 'pictures/**/*.jpg'")  # fmt: skip
        found += files
    return sorted({os.path.abspath(each) for each in found})


def _settings(given: list[str]) -> dict[str, str]:
    settings = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"got {each!r}, expected NAME=VALUE", param_hint="--setting")
        settings[name.replace("-", "_")] = value
    return settings
