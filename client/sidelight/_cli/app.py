"""The command line: explain pictures, ask about a server, see a demonstration."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from .._client import RELOAD_TIMEOUT_S, TIMEOUT_S
from .._inputs.enums import Channels, MapDtype, Score
from .._inputs.targets import Choice, Contrast, Dense, Region, Target, TopK
from .._inputs.tensors import Array
from ..exceptions import InvalidArgument, SidelightError
from ..methods.gradient import Gradient
from ..methods.method import Method
from ..methods.parsing import METHODS, parse_method
from ..methods.path import ExpectedGradients, IntegratedGradients, SmoothGrad
from ..methods.perturbation import Occlusion
from ..results.replay import replay as compute_again
from ..results.storage import load_array
from .bench.command import bench
from .options import DEFAULT_ADDRESS, Address, Reach, with_access
from .server_tables import report_server
from .tables import report, report_replay

REGION = "TOP,LEFT,HEIGHT,WIDTH"
METHOD_HELP = f"How: {', '.join(METHODS)}; with options as in 'integrated_gradients(steps=20, baseline=black)'."

app = typer.Typer(
    help="Which pixels decided each prediction.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


@app.command()
@with_access
def attribute(
    images: Annotated[list[Path], typer.Argument(help="Picture files.", show_default=False)],
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
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "gradient",
    baseline: Annotated[Path | None, typer.Option(help="An array, .npy, that is the method's baseline.")] = None,
    score: Annotated[Score, typer.Option(help="The number whose gradient is taken.")] = "probability",
    channels: Annotated[Channels, typer.Option(help="How the channels become one.")] = "max_abs",
    signed: Annotated[bool, typer.Option("--signed", help="gradient(signed=True), for short.")] = False,
    times_input: Annotated[bool, typer.Option("--times-input", help="gradient(times_input=True), for short.")] = False,
    map_dtype: Annotated[MapDtype, typer.Option(help="How the maps travel; the shorter ones are rounded.")] = "float32",
    timeout: Annotated[float, typer.Option(help="Seconds that one picture may take.")] = TIMEOUT_S,
    reach: Reach,
) -> None:
    """Explain pictures: print class, probability and time of each, and write overlays."""
    how = _method(method, signed=signed, times_input=times_input)
    what = _target(target, against=against, region=region, top_k=top_k)
    with _errors_in_a_line(), reach(address) as client:
        answers = client.stream(
            images,
            model=model,
            target=what,
            method=how if baseline is None else _from_baseline(how, load_array(baseline)),
            score=score,
            channels=channels,
            map_dtype=map_dtype,
            timeout=timeout,
            ordered=True,
            on_error="return",
        )
        n_failed = report(
            Console(), images, answers, folder=out, save_folder=save, original=original, overwrite=overwrite
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
    reach: Reach,
) -> None:
    """Print a server's version, limits, methods and models."""
    with _errors_in_a_line(), reach(address) as client:
        server = client.info()
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


@app.command()
def version() -> None:
    """Print the client's version."""
    Console().print(__version__)


@contextlib.contextmanager
def _errors_in_a_line() -> Iterator[None]:
    try:
        yield
    except (SidelightError, OSError) as error:
        Console(stderr=True).print(f"[bold red]sidelight:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


app.command()(with_access(_errors_in_a_line()(bench)))


def _method(text: str, *, signed: bool, times_input: bool) -> Method:
    try:
        method = parse_method(text)
    except SidelightError as error:
        raise typer.BadParameter(error.message, param_hint="--method") from None
    if not (signed or times_input):
        return method
    if text.strip() != "gradient":
        raise typer.BadParameter("--signed and --times-input are options of gradient alone", param_hint="--method")
    return Gradient(signed=signed, times_input=times_input)


def _from_baseline(method: Method, array: Array) -> Method:
    """Return a method with an array for its baseline."""
    match method:
        case IntegratedGradients() | Occlusion():
            return dataclasses.replace(method, baseline=array)
        case ExpectedGradients():
            return dataclasses.replace(method, baselines=array)
        case SmoothGrad(base=IntegratedGradients() as base):
            return dataclasses.replace(method, base=dataclasses.replace(base, baseline=array))
        case _:
            raise InvalidArgument(f"--baseline: {type(method).__name__} has none")


def _target(text: str | None, *, against: str | None, region: str | None, top_k: int | None) -> Target:
    beside = [name for name, each in (("--against", against), ("--region", region)) if each is not None]
    if top_k is not None:
        if text is not None or beside:
            raise typer.BadParameter("expected it without --target, --against and --region", param_hint="--top-k")
        return TopK(top_k)
    if text is None and beside:
        raise typer.BadParameter("expected --target beside it", param_hint=beside[0])
    if len(beside) == 2:
        raise typer.BadParameter("expected it without --region", param_hint="--against")
    if text is not None and against is not None:
        return Contrast(_choice(text), _choice(against))
    if text is not None and region is not None:
        return Dense(_choice(text), _region(region))
    return None if text is None else _choice(text)


def _choice(text: str) -> Choice:
    """Return a class index where the text is a number, else a label."""
    return int(text) if re.fullmatch("-?[0-9]+", text) else text


def _region(text: str) -> Region:
    if not re.fullmatch("[0-9]+(,[0-9]+){3}", text):
        raise typer.BadParameter(f"got {text!r}, expected {REGION}", param_hint="--region")
    top, left, height, width = map(int, text.split(","))
    return top, left, height, width
