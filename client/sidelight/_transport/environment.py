"""Environment variables: the defaults of `connect` for address and token."""

import os
from collections.abc import Sequence

from ..exceptions import InvalidArgument
from .credentials import Token

ADDRESS_VARIABLE = "SIDELIGHT_ADDRESS"
TOKEN_VARIABLE = "SIDELIGHT_TOKEN"  # noqa: S105  (it is the name of a variable)


def address_or_default(address: str | Sequence[str] | None) -> str | Sequence[str]:
    """Return the address, or by default that of the environment. Raises `InvalidArgument` if neither is set."""
    if address is not None:
        return address
    if default := os.environ.get(ADDRESS_VARIABLE):
        return default
    raise InvalidArgument(
        f'address: none was given and {ADDRESS_VARIABLE} is not set; call connect("host:port") or '
        f'connect("unix:/path"), or set {ADDRESS_VARIABLE}'
    )


def token_or_default(token: Token | None) -> Token | None:
    """Return the token, or by default that of the environment, if any."""
    return os.environ.get(TOKEN_VARIABLE) or None if token is None else token
