"""The command line: explain pictures, ask about a server, see a demonstration."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from . import __version__
from ._client import CONNECT_TIMEOUT_S, DEFAULT_ADDRESS, TIMEOUT_S, connect
from ._errors import SidelightError
from ._methods import Channels, Gradient, Score, Target
from ._report import report

app = typer.Typer(
    help="Which pixels decided each prediction.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)

Address = Annotated[str, typer.Option(help='The server: "host:port" or "unix:/path".', envvar="SIDELIGHT_ADDRESS")]
Patience = Annotated[float, typer.Option(help="Seconds to wait for a server that is not there yet.")]


@app.command()
def attribute(
    images: Annotated[list[Path], typer.Argument(help="Picture files.", show_default=False)],
    *,
    address: Address = DEFAULT_ADDRESS,
    out: Annotated[Path | None, typer.Option(help="A folder for overlays; without it none are written.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name; unset: the server's default.")] = None,
    target: Annotated[str | None, typer.Option(help="A class index or label; unset: the predicted class.")] = None,
    score: Annotated[Score, typer.Option(help="The number whose gradient is taken.")] = "probability",
    channels: Annotated[Channels, typer.Option(help="How the channels become one.")] = "max_abs",
    signed: Annotated[bool, typer.Option("--signed", help="Keep the sign when channels are reduced.")] = False,
    times_input: Annotated[bool, typer.Option("--times-input", help="Multiply by the input.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one picture may take.")] = TIMEOUT_S,
    connect_timeout: Patience = CONNECT_TIMEOUT_S,
) -> None:
    """Explain pictures: print class, probability and time of each, and write overlays."""
    with _errors_in_a_line(), connect(address, connect_timeout=connect_timeout) as client:
        answers = client.stream(
            images,
            model,
            target=_target(target),
            method=Gradient(signed=signed, times_input=times_input),
            score=score,
            channels=channels,
            timeout=timeout,
            ordered=True,
            on_error="return",
        )
        n_failed = report(Console(), images, answers, folder=out)
    if n_failed:
        raise typer.Exit(1)


@app.command()
def info(*, address: Address = DEFAULT_ADDRESS, connect_timeout: Patience = CONNECT_TIMEOUT_S) -> None:
    """Print a server's version, limits, methods and models."""
    with _errors_in_a_line(), connect(address, connect_timeout=connect_timeout) as client:
        server = client.info()
    limits, console = server.limits, Console(soft_wrap=True, highlight=False)
    console.print(f"sidelight-server {server.version} at {escape(address)}")
    facts = {
        "methods": ", ".join(server.methods),
        "message": f"{limits.max_message_bytes / 2**20:g} MiB at most",
        "picture": f"{limits.max_image_pixels / 1e6:g} megapixels at most",
        "in flight": f"{limits.max_in_flight} batches at most, {limits.max_stream_in_flight} of them on one stream",
    }
    _print(console, facts)
    for model in server.models:
        console.print(f"\nmodel {escape(model.name)}, version {model.version}")
        facts = {
            "input": " × ".join(map(str, model.input_size)) if model.input_size else "any C × H × W",
            "classes": str(model.class_count or "not known yet"),
            "scores": ", ".join(model.scores),
            "runs on": f"{model.device} in {model.precision}, {model.chunk_rows} rows at once at most",
            "digest": model.digest,
        }
        _print(console, facts)


def _print(console: Console, facts: dict[str, str]) -> None:
    for name, fact in facts.items():
        console.print(f"  {name:<10} {escape(fact)}")


@app.command()
def demo(*, out: Annotated[Path, typer.Option(help="A folder for overlays and gallery.png.")] = Path("demo")) -> None:
    """Start a server on a real ImageNet classifier and explain real photographs with it."""
    # The demonstration's pictures come from packages that only its extra brings.
    from ._demo import run

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


def _target(text: str | None) -> Target:
    """Return a class index where the text is a number, else a label; None is the predicted class."""
    return int(text) if text is not None and re.fullmatch("-?[0-9]+", text) else text
