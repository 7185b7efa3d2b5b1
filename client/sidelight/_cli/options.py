"""The options by which every command connects to its server: timeout, TLS and token."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .._client import Client, connect
from .._core import CONNECT_TIMEOUT_S
from .._transport.credentials import TLS
from .._transport.environment import ADDRESS_VARIABLE, TOKEN_VARIABLE

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_HELP = 'The server: "host:port" or "unix:/path"; of several, with commas between them.'
TOKEN_HELP = f"A file whose first line is the token; unset: ${TOKEN_VARIABLE}, if any."

Address = Annotated[str, typer.Option(help=ADDRESS_HELP, envvar=ADDRESS_VARIABLE)]
_file = functools.partial(typer.Option, exists=True, dir_okay=False)
Reach = Callable[..., Client]


def with_access(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options. Its argument `reach` is `connect` with what they say, and takes an address."""
    asked = inspect.signature(_reaching).parameters
    own = inspect.signature(command)
    parameters = [*(each for name, each in own.parameters.items() if name != "reach"), *asked.values()]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        options = {name: given.pop(name) for name in asked}
        command(**given, reach=_reaching(**options))

    # What typer makes options of.
    with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def _reaching(
    *,
    connect_timeout: Annotated[
        float, typer.Option(help="Seconds to wait for a server that is not there yet.")
    ] = CONNECT_TIMEOUT_S,
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS, and trust whom the system trusts.")] = False,
    ca: Annotated[Path | None, _file(help="Speak TLS, and trust the authorities in this PEM file.")] = None,
    certificate: Annotated[Path | None, _file(help="With TLS: a PEM file of this client's own certificate.")] = None,
    key: Annotated[Path | None, _file(help="The PEM file of that certificate's key.")] = None,
    server_name: Annotated[
        str | None, typer.Option(help="With TLS: the name in the server's certificate, where the address has another.")
    ] = None,
    token_file: Annotated[Path | None, _file(help=TOKEN_HELP)] = None,
) -> Reach:
    """Return `connect` with what the options say. A wrong option is a usage error."""
    speaks = tls or any((ca, certificate, key, server_name))
    access = TLS(ca=ca, certificate=certificate, key=key, server_name=server_name) if speaks else None

    def reach(address: str, **options: Any) -> Client:
        try:
            return connect(address, connect_timeout=connect_timeout, tls=access, token=token_file, **options)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return reach
