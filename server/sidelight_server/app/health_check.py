"""The health check `sidelight-server --check`: asks a server for its health. For containers and by hand.

It must be quick, so nothing here imports torch, nor what does.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..security.pem import check_authority, check_pair

if TYPE_CHECKING:
    import grpc

FLAG = "--check"
DEFAULT_ADDRESS = "127.0.0.1:50051"


def is_health_check(arguments: Sequence[str]) -> bool:
    """Say whether a command line asks for a probe instead of a server."""
    return any(each == FLAG or each.startswith(FLAG + "=") for each in arguments)


def check_health(arguments: Sequence[str]) -> int:
    """Ask, and return 0 where the answer is SERVING, 1 where it is anything else or none, with a line that says what.

    Without an address it asks the first of `SIDELIGHT_LISTEN`, or where a server listens by default.
    """
    parser = argparse.ArgumentParser(prog="sidelight-server", description="Asks a server for its health.")
    parser.add_argument(FLAG, nargs="?", metavar="ADDRESS", help='"host:port" or "unix:/path"')
    parser.add_argument("--service", default="", help='"model/NAME" for one model; unset: the server')
    parser.add_argument("--ca", type=Path, help="PEM file of the authority that signed the server's certificate")
    parser.add_argument("--certificate", type=Path, help="PEM file of the caller's certificate, where one is wanted")
    parser.add_argument("--key", type=Path, help="PEM file of its key")
    parser.add_argument("--server-name", help="the name in the server's certificate, where it is not the address's")
    parser.add_argument("--timeout-s", type=float, default=2.0, help="seconds that the answer may take")
    chosen = parser.parse_args(arguments)
    if bool(chosen.certificate) != bool(chosen.key):
        parser.error("--certificate and --key go together")
    if chosen.server_name and not (chosen.ca or chosen.certificate):
        parser.error("--server-name is for TLS: expected --ca beside it")
    status, detail = _ask(chosen.check or _first(os.environ.get("SIDELIGHT_LISTEN", "")) or DEFAULT_ADDRESS, chosen)
    print(status + (f": {detail}" if detail else ""), file=sys.stderr)
    return 0 if status == "SERVING" else 1


def _first(addresses: str) -> str:
    """Return the first of a list as a variable holds it, with commas or as JSON: reading all is slow."""
    if addresses.startswith("[") and addresses.endswith("]"):  # unlike "[::]:50051"
        with contextlib.suppress(ValueError, LookupError):
            return str(json.loads(addresses)[0])
    return addresses.partition(",")[0].strip()


def _ask(address: str, chosen: argparse.Namespace) -> tuple[str, str]:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    request = health_pb2.HealthCheckRequest(service=chosen.service)
    try:
        channel = _channel(address, chosen)
    except OSError as error:  # of a file that is not there, or holds no PEM
        return "UNKNOWN", str(error)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=chosen.timeout_s)
        except grpc.RpcError as error:
            is_plain = not (chosen.ca or chosen.certificate)
            hint = (
                "; if the server speaks TLS, say --ca"
                if is_plain and "Socket closed" in (error.details() or "")
                else ""
            )
            return error.code().name, f"{address}: {error.details()}{hint}"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status), ""


def _channel(address: str, chosen: argparse.Namespace) -> "grpc.Channel":
    import grpc

    if not (chosen.ca or chosen.certificate):
        return grpc.insecure_channel(address)
    ca, certificate, key = (path.read_bytes() if path else None for path in (chosen.ca, chosen.certificate, chosen.key))
    if chosen.ca:
        check_authority(chosen.ca)
    if chosen.certificate:
        check_pair(chosen.certificate, chosen.key)
    options = [("grpc.ssl_target_name_override", chosen.server_name)] if chosen.server_name else []
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options)
