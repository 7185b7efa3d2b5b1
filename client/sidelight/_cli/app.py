"""The command line: explain pictures, ask about a server, see a demonstration."""

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
from .._core import RELOAD_TIMEOUT_S, TIMEOUT_S
from .._inputs.enums import Channels, MapDtype, Score
from .._replay import replay as compute_again
from ..exceptions import SidelightError
from ..methods.parsing import METHODS
from ..results.storage import load_array
from .arguments import REGION, from_baseline, method_names, method_of, pictures_of, target_of
from .bench.command import bench
from .options import DEFAULT_ADDRESS, Address, Reach, with_access
from .server_tables import report_server
from .tables import report, report_replay

METHOD_HELP = f"How: {', '.join(METHODS)}; with options as in 'integrated_gradients(steps=20, baseline=black)'."

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
@with_access
def attribute(
    images: Annotated[list[Path], typer.Argument(help="Picture files, and folders of them.", show_default=False)],
    *,
    address: Address = DEFAULT_ADDRESS,
    out: Annotated[Path | None, typer.Option(help="A folder for overlays; without it none are written.")] = None,
    save: Annotated[Path | None, typer.Option(help="A folder for whole answers, as `sidelight replay` reads.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --save: answers that lie in the folder already are replaced.")
    ] = False,
    original: Annotated[
        bool, typer.Option("--original", help="Overlays on the whole pictures, at their size.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="The model's name; unset: the server's default.")] = None,
    target: Annotated[str | None, typer.Option(help="A class index or label; unset: the predicted class.")] = None,
    against: Annotated[str | None, typer.Option(help="With --target: a class whose score is subtracted.")] = None,
    region: Annotated[str | None, typer.Option(help=f"With --target, of a dense output: {REGION}.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Explain so many of the most probable classes.")] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP, autocompletion=method_names)] = "gradient",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="With the name of a --method: an option of it.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="An array, .npy, that is the method's baseline.")] = None,
    score: Annotated[Score, typer.Option(help="The number whose gradient is taken.")] = "probability",
    channels: Annotated[Channels, typer.Option(help="How the channels become one.")] = "max_abs",
    signed: Annotated[bool, typer.Option("--signed", help="gradient(signed=True), for short.")] = False,
    times_input: Annotated[bool, typer.Option("--times-input", help="gradient(times_input=True), for short.")] = False,
    map_dtype: Annotated[MapDtype, typer.Option(help="How the maps travel; the shorter ones are rounded.")] = "float32",
    timeout: Annotated[float, typer.Option(help="Seconds that one picture may take.")] = TIMEOUT_S,
    json_: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each picture, and no table.")] = False,
    reach: Reach,
) -> None:
    """Explain pictures: print class, probability and time of each, and write overlays."""
    with _errors_in_a_line():
        images = pictures_of(images)
    how = method_of(method, option, signed=signed, times_input=times_input)
    what = target_of(target, against=against, region=region, top_k=top_k)
    with _errors_in_a_line(), reach(address) as client:
        answers = client.stream(
            images,
            model=model,
            target=what,
            method=how if baseline is None else from_baseline(how, load_array(baseline)),
            score=score,
            channels=channels,
            map_dtype=map_dtype,
            timeout=timeout,
            ordered=True,
            on_error="return",
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
@with_access
def replay(
    answer: Annotated[Path, typer.Argument(help="An answer.json, or the folder it lies in.", show_default=False)],
    *,
    image: Annotated[list[Path], typer.Option(help="A picture that it explained; once for each, in order.")],
    baseline: Annotated[Path | None, typer.Option(help="The array given as a baseline; unset: the saved one.")] = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Seconds that it may take.")] = TIMEOUT_S,
    reach: Reach,
) -> None:
    """Compute a saved answer again and compare: ends with 0 where it comes out as promised, else with 1.

    Promised are equal bytes where the model is served as reproducible, else maps that are equal within a tolerance.
    """
    with _errors_in_a_line(), reach(address) as client:
        replayed = compute_again(client, answer, image, baseline=baseline, timeout=timeout)
    report_replay(Console(), image, replayed)
    if not replayed.kept:
        raise typer.Exit(1)


@app.command()
@with_access
def info(
    *,
    address: Address = DEFAULT_ADDRESS,
    json_: Annotated[bool, typer.Option("--json", help="Print all of it as one object.")] = False,
    reach: Reach,
) -> None:
    """Print a server's version, limits, methods and models."""
    with _errors_in_a_line(), reach(address) as client:
        server = client.info()
    if json_:
        typer.echo(json.dumps({"address": address} | dataclasses.asdict(server), indent=2))
        return
    report_server(Console(soft_wrap=True, highlight=False), server, address=address)


@app.command()
@with_access
def reload(
    model: Annotated[str | None, typer.Argument(help="Unset: the default model.", show_default=False)] = None,
    *,
    address: Address = DEFAULT_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Seconds that loading may take.")] = RELOAD_TIMEOUT_S,
    reach: Reach,
) -> None:
    """Have a model loaded again from its source; the server must be started with --allow-reload."""
    with _errors_in_a_line(), reach(address) as client:
        loaded = client.reload(model, timeout=timeout)
    Console(soft_wrap=True, highlight=False).print(f"model {loaded.name}, version {loaded.version}, {loaded.digest}")


@app.command()
def demo(*, out: Annotated[Path, typer.Option(help="A folder for overlays and gallery.png.")] = Path("demo")) -> None:
    """Start a server on a real ImageNet classifier and explain real photographs with it."""
    # The demonstration's pictures come from packages that only its extra brings.
    from .demo import run

    with _errors_in_a_line():
        run(out, console=Console())


@contextlib.contextmanager
def _errors_in_a_line() -> Iterator[None]:
    try:
        yield
    except (SidelightError, OSError) as error:
        Console(stderr=True).print(f"[bold red]sidelight:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


app.command()(with_access(_errors_in_a_line()(bench)))
