"""The connection options that all commands share: timeout, TLS and token."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .._clients.client import connect
from .._clients.core import CONNECT_TIMEOUT_S
from .._transport.credentials import TLS
from .._transport.environment import ADDRESS_VARIABLE, TOKEN_VARIABLE

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_HELP = 'The server: "host:port" or "unix:/path"; separate several servers with commas.'
TOKEN_HELP = f"A file whose first line is the token. Default: ${TOKEN_VARIABLE}, if set."

Address = Annotated[str, typer.Option(help=ADDRESS_HELP, envvar=ADDRESS_VARIABLE)]
_file = functools.partial(typer.Option, exists=True, dir_okay=False)
Connector = Callable[..., Any]  # returns a `Client`, or what its `factory` makes


def with_connection_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the connection options to a command. Its `connect_to` is `connect` with these options applied."""
    asked = inspect.signature(_connector).parameters
    own = inspect.signature(command)
    parameters = [*(each for name, each in own.parameters.items() if name != "connect_to"), *asked.values()]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        options = {name: given.pop(name) for name in asked}
        command(**given, connect_to=_connector(**options))

    # typer reads these to build the options.
    with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def _connector(
    *,
    connect_timeout: Annotated[
        float, typer.Option(help="Seconds to wait until a server can be reached.")
    ] = CONNECT_TIMEOUT_S,
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS, with the system's certificate authorities.")] = False,
    ca: Annotated[Path | None, _file(help="Use TLS, with the certificate authorities in this PEM file.")] = None,
    certificate: Annotated[Path | None, _file(help="With TLS: the client certificate, a PEM file.")] = None,
    key: Annotated[Path | None, _file(help="The key of the client certificate, a PEM file.")] = None,
    server_name: Annotated[
        str | None,
        typer.Option(help="With TLS: the name in the server's certificate, if it is not that of the address."),
    ] = None,
    token_file: Annotated[Path | None, _file(help=TOKEN_HELP)] = None,
) -> Connector:
    """Return `connect` with the options applied. An invalid option is a usage error."""
    uses_tls = tls or any((ca, certificate, key, server_name))
    access = TLS(ca=ca, certificate=certificate, key=key, server_name=server_name) if uses_tls else None

    def connect_to(address: str, *, factory: Callable[..., Any] = connect, **options: Any) -> Any:
        options = {"connect_timeout": connect_timeout, "tls": access, "token": token_file} | options
        try:
            return factory(address, **options)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return connect_to
