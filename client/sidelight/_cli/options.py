"""Groups of options that several commands share. Each is declared once, and read into one value.

A group is a function: its parameters are the options, and it returns the value. An invalid option is a usage error.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .._clients.client import connect
from .._clients.core import CONNECT_TIMEOUT_S
from .._inputs.enums import Channels, MapDtype, Score
from .._transport.credentials import TLS, TOKEN_VARIABLE
from .._transport.pool import ADDRESS_VARIABLE
from ..methods.parsing import METHODS
from .arguments import REGION, method_names, method_of, target_of

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_HELP = 'The server: "host:port" or "unix:/path"; separate several servers with commas.'
METHOD_HELP = f"One of {', '.join(METHODS)}; options as in 'integrated_gradients(steps=20, baseline=black)'."
TOKEN_HELP = f"A file whose first line is the token. Default: ${TOKEN_VARIABLE}, if set."

Address = Annotated[str, typer.Option(help=ADDRESS_HELP, envvar=ADDRESS_VARIABLE)]
ModelName = Annotated[str | None, typer.Option(help="The model's name. Default: the server's default model.")]
Timeout = Annotated[float, typer.Option(help="Timeout for one request, in seconds.")]
_file = functools.partial(typer.Option, exists=True, dir_okay=False)
Explanation = dict[str, Any]  # arguments of `Client.attribute`: target, method, score, channels and map_dtype
Connector = Callable[..., Any]  # returns a `Client`, or what its `factory` makes


def with_options(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameters that are named here by the options of their group."""
    options = {name: inspect.signature(group).parameters for name, group in groups.items()}

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command)
        parameters = [
            each
            for name, parameter in own.parameters.items()
            for each in (options[name].values() if name in options else (parameter,))
        ]

        @functools.wraps(command)
        def with_groups(**given: Any) -> None:
            values = {name: groups[name](**{each: given.pop(each) for each in options[name]}) for name in options}
            command(**given, **values)

        # typer reads these to build the options.
        with_groups.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_groups.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_groups

    return decorated


def connection(
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
    """Return `connect` with the options applied."""
    uses_tls = tls or any((ca, certificate, key, server_name))
    access = TLS(ca=ca, certificate=certificate, key=key, server_name=server_name) if uses_tls else None

    def connect_to(address: str, *, factory: Callable[..., Any] = connect, **options: Any) -> Any:
        options = {"connect_timeout": connect_timeout, "tls": access, "token": token_file} | options
        try:
            return factory(address, **options)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return connect_to


def explanation(
    *,
    target: Annotated[str | None, typer.Option(help="A class index or label. Default: the predicted class.")] = None,
    against: Annotated[str | None, typer.Option(help="With --target: subtract the score of this class.")] = None,
    region: Annotated[
        str | None, typer.Option(help=f"With --target and a dense output: {REGION} in output pixels.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Explain the K most probable classes.")] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP, autocompletion=method_names)] = "gradient",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the --method; repeatable.")
    ] = None,
    score: Annotated[Score, typer.Option(help="The score to explain.")] = "probability",
    channels: Annotated[Channels, typer.Option(help="How to reduce the channels of a map to one.")] = "max_abs",
    signed: Annotated[bool, typer.Option("--signed", help="Short for gradient(signed=True).")] = False,
    times_input: Annotated[bool, typer.Option("--times-input", help="Short for gradient(times_input=True).")] = False,
    map_dtype: Annotated[
        MapDtype, typer.Option(help="Data type of the maps in responses; the smaller ones round.")
    ] = "float32",
) -> Explanation:
    return {
        "target": target_of(target, against=against, region=region, top_k=top_k),
        "method": method_of(method, option, signed=signed, times_input=times_input),
        "score": score,
        "channels": channels,
        "map_dtype": map_dtype,
    }
