"""The command line: `attribute`, `replay`, `info`, `reload`, `page`, `demo`, `bench` and `job`."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from .._clients.core import RELOAD_TIMEOUT_S, TIMEOUT_S
from .._clients.recomputation import replay as recompute
from ..exceptions import SidelightError
from ..results.storage import load_array
from .arguments import from_baseline, pictures_of
from .bench.command import bench
from .job import job
from .options import (
    DEFAULT_ADDRESS,
    Address,
    Connector,
    Explanation,
    ModelName,
    Timeout,
    connection,
    explanation,
    with_options,
)
from .page import page
from .server_tables import report_server
from .tables import report, report_replay

app = typer.Typer(help="Which pixels decided each prediction.", no_args_is_help=True, rich_markup_mode=None)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        Console(highlight=False).print(__version__)
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the client's version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Which pixels decided each prediction."""


@app.command()
@with_options(explained=explanation, connect_to=connection)
def attribute(
    images: Annotated[list[Path], typer.Argument(help="Picture files, or folders with pictures.", show_default=False)],
    *,
    address: Address = DEFAULT_ADDRESS,
    out: Annotated[Path | None, typer.Option(help="Write overlays to this folder.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write complete answers to this folder, for `sidelight replay`.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --save: replace answers that the folder already has.")
    ] = False,
    original: Annotated[
        bool, typer.Option("--original", help="Draw overlays on the uncropped pictures at full size.")
    ] = False,
    model: ModelName = None,
    baseline: Annotated[Path | None, typer.Option(help="A .npy array to use as the method's baseline.")] = None,
    explained: Explanation,
    timeout: Timeout = TIMEOUT_S,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per picture and line, and no table.")
    ] = False,
    connect_to: Connector,
) -> None:
    """Explain pictures: print the class, probability and time of each, and write overlays."""
    with _errors_on_one_line():
        images = pictures_of(images)
    with _errors_on_one_line(), connect_to(address) as client:
        if baseline is not None:
            explained = explained | {"method": from_baseline(explained["method"], load_array(baseline))}
        answers = client.stream(
            images,
            model=model,
            **explained,
            timeout=timeout,
            ordered=True,
            on_error="return",
            progress=Console(stderr=True).is_terminal and not json_,
        )
        n_failed = report(
            Console(),
            images,
            answers,
            folder=out,
            save_folder=save,
            original=original,
            overwrite=overwrite,
            as_json=json_,
        )
    if n_failed:
        raise typer.Exit(1)


@app.command()
@with_options(connect_to=connection)
def replay(
    answer: Annotated[Path, typer.Argument(help="An answer.json, or its folder.", show_default=False)],
    *,
    image: Annotated[list[Path], typer.Option(help="A picture of the answer; once for each, in order.")],
    baseline: Annotated[Path | None, typer.Option(help="The baseline array (.npy). Default: the saved one.")] = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Timeout in seconds.")] = TIMEOUT_S,
    connect_to: Connector,
) -> None:
    """Recompute a saved answer and compare. Exits with 0 if the maps match, else with 1.

    If the model is served as reproducible, maps must be equal bit for bit, otherwise within a tolerance.
    """
    with _errors_on_one_line(), connect_to(address) as client:
        replayed = recompute(client, answer, image, baseline=baseline, timeout=timeout)
    report_replay(Console(), image, replayed)
    if not replayed.kept:
        raise typer.Exit(1)


@app.command()
@with_options(connect_to=connection)
def info(
    *,
    address: Address = DEFAULT_ADDRESS,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    connect_to: Connector,
) -> None:
    """Print a server's version, limits, methods and models."""
    with _errors_on_one_line(), connect_to(address) as client:
        server = client.info()
    if json_:
        typer.echo(json.dumps({"address": address} | dataclasses.asdict(server), indent=2))
        return
    report_server(Console(soft_wrap=True, highlight=False), server, address=address)


@app.command()
@with_options(connect_to=connection)
def reload(
    model: Annotated[
        str | None, typer.Argument(help="The model's name. Default: the server's default model.", show_default=False)
    ] = None,
    *,
    address: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Timeout for loading, in seconds.")] = RELOAD_TIMEOUT_S,
    connect_to: Connector,
) -> None:
    """Reload a model from its source. The server must run with --allow-reload."""
    with _errors_on_one_line(), connect_to(address) as client:
        loaded = client.reload(model, timeout=timeout)
    Console(soft_wrap=True, highlight=False).print(f"model {loaded.name}, version {loaded.version}, {loaded.digest}")


@app.command()
def demo(*, out: Annotated[Path, typer.Option(help="A folder for gallery.png.")] = Path("demo")) -> None:
    """Start a server on a real ImageNet classifier and explain real photographs by three methods."""
    # Imported here: the photographs come from packages of the extra sidelight[demo].
    from .demo import run

    with _errors_on_one_line():
        run(out, console=Console())


@contextlib.contextmanager
def _errors_on_one_line() -> Iterator[None]:
    try:
        yield
    except (SidelightError, OSError) as error:
        Console(stderr=True).print(f"[bold red]sidelight:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


for command in (page, bench, job):
    app.command()(_errors_on_one_line()(command))
