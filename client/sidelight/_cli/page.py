"""The command `page`: checks its addresses, starts the demonstration if requested, and prints the page's URL."""

import contextlib
import functools
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from ..exceptions import SidelightError

ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104  (compared with, not listened on)


def run(
    pictures: Sequence[Path],
    *,
    connect_to: Callable[..., Any],
    host: str,
    port: int,
    host_names: Sequence[str],
    is_opened: bool,
    is_demo: bool,
    console: Console,
) -> None:
    """Serve the page until it is interrupted. `connect_to` returns a client; with `is_demo`, of another address."""
    try:
        from ..aio import connect
        from ..page.serving import is_loopback, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise SidelightError(f"the page needs {error.name}: pip install 'sidelight[page]'") from None
    if host in ANY_ADDRESS and not host_names:
        raise typer.BadParameter("expected --host-name NAME, by which browsers open the page", param_hint="--host")

    def ready(url: str) -> None:
        console.print(f"the page is at {escape(url)}")
        if not is_loopback(host):
            console.print("[yellow]everybody who can reach this address can use the page, and through it the server[/]")
        if is_opened:
            webbrowser.open(url)

    with contextlib.ExitStack() as stack:
        connect_to = functools.partial(connect_to, factory=connect)
        if is_demo:
            from .demo import demo_server, photographs

            pictures = pictures or photographs()
            connect_to = functools.partial(connect, stack.enter_context(demo_server(console)))
        serve(pictures, connect=connect_to, host=host, port=port, host_names=host_names, ready=ready)
