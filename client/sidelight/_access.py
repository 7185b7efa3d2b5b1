"""The options by which every command reaches its server: address, patience, TLS and token."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ._client import Client, connect
from ._credentials import TLS, Token

ADDRESS_HELP = 'The server: "host:port" or "unix:/path"; of several, with commas between them.'
TOKEN_VARIABLE = "SIDELIGHT_TOKEN"  # noqa: S105  (it is the name of a variable)

Address = Annotated[str, typer.Option(help=ADDRESS_HELP, envvar="SIDELIGHT_ADDRESS")]
Patience = Annotated[float, typer.Option(help="Seconds to wait for a server that is not there yet.")]
Encrypted = Annotated[bool, typer.Option("--tls", help="Speak TLS, and trust public authorities.")]
Authority = Annotated[Path | None, typer.Option(help="Speak TLS, and trust the authorities in this PEM file.")]
Certificate = Annotated[Path | None, typer.Option(help="With TLS: a PEM file of this client's own certificate.")]
Key = Annotated[Path | None, typer.Option(help="The PEM file of that certificate's key.")]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"A file whose first line is the token; unset: ${TOKEN_VARIABLE}, if any.")
]


def reaching(
    *,
    tls: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    token_file: Path | None,
) -> Callable[..., Client]:
    """Return `connect` with what the options say. A wrong option is a usage error."""
    speaks = tls or any((ca, certificate, key))
    access = TLS(ca=ca, certificate=certificate, key=key) if speaks else None
    token: Token | None = token_file or os.environ.get(TOKEN_VARIABLE) or None

    def open_client(address: str, **options: object) -> Client:
        try:
            return connect(address, tls=access, token=token, **options)  # type: ignore[arg-type]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return open_client
