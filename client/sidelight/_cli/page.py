"""The command `page`: serves a web page for pictures, and with --demo also starts the demonstration's server."""

import contextlib
import functools
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..exceptions import SidelightError
from .arguments import pictures_of
from .options import DEFAULT_ADDRESS, Address, Connector, connection, with_options

ANY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104  (compared with, not listened on)


@with_options(connect_to=connection)
def page(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Picture files, or folders with pictures, to begin with.")
    ] = None,
    *,
    address: Address = DEFAULT_ADDRESS,
    host: Annotated[str, typer.Option(help="The IP address to listen on. The page has no login.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 chooses one.", min=0, max=65535)] = 8050,
    host_name: Annotated[
        list[str] | None, typer.Option(help="Another name by which browsers may open the page; repeatable.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    demo: Annotated[
        bool, typer.Option("--demo", help="Start the server of `sidelight demo`, and begin with its photographs.")
    ] = False,
    connect_to: Connector,
) -> None:
    """Serve a web page that explains pictures. Listens only on this machine, unless --host says otherwise."""
    paths = pictures_of(pictures or [])
    try:
        from ..aio import connect
        from ..page.serving import is_loopback, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise SidelightError(f"the page needs {error.name}: pip install 'sidelight[page]'") from None
    if host in ANY_ADDRESS and not host_name:
        raise typer.BadParameter("expected --host-name NAME, by which browsers open the page", param_hint="--host")
    console = Console(soft_wrap=True, highlight=False)

    def ready(url: str) -> None:
        console.print(f"the page is at {escape(url)}")
        if not is_loopback(host):
            console.print("[yellow]everybody who can reach this address can use the page, and through it the server[/]")
        if open_:
            webbrowser.open(url)

    with contextlib.ExitStack() as stack:
        connect_page = functools.partial(connect_to, address, factory=connect)
        if demo:
            from .demo import demo_server, photographs

            paths = paths or photographs()
            connect_page = functools.partial(connect, stack.enter_context(demo_server(console)))
        serve(paths, connect=connect_page, host=host, port=port, host_names=host_name or [], ready=ready)
