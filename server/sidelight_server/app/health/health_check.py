"""The health check `sidelight-server --check`, for container probes and manual use.

It must start quickly, so nothing here imports torch, directly or indirectly.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...security.pem import check_authority, check_pair

if TYPE_CHECKING:
    import grpc

FLAG = "--check"
DEFAULT_ADDRESS = "127.0.0.1:50051"


def is_health_check(arguments: Sequence[str]) -> bool:
    """Return whether a command line requests a health check instead of a server."""
    return any(each == FLAG or each.startswith(FLAG + "=") for each in arguments)


def check_health(arguments: Sequence[str]) -> int:
    """Check a server's health and print its status. Return 0 if it is SERVING, else 1.

    The address defaults to the first of `SIDELIGHT_LISTEN`, or else to the server's default address.
    """
    parser = argparse.ArgumentParser(prog="sidelight-server", description="Checks the health of a server.")
    parser.add_argument(FLAG, nargs="?", metavar="ADDRESS", help='"host:port" or "unix:/path"')
    parser.add_argument("--service", default="", help='"model/NAME" for one model; unset: the server')
    parser.add_argument("--ca", type=Path, help="PEM file of the authority that signed the server's certificate")
    parser.add_argument("--certificate", type=Path, help="PEM file of the client certificate, if one is required")
    parser.add_argument("--key", type=Path, help="PEM file of the certificate's key")
    parser.add_argument("--server-name", help="the name in the server's certificate, if it differs from the address")
    parser.add_argument("--timeout-s", type=float, default=2.0, help="seconds to wait for the answer")
    chosen = parser.parse_args(arguments)
    if bool(chosen.certificate) != bool(chosen.key):
        parser.error("--certificate and --key go together")
    if chosen.server_name and not (chosen.ca or chosen.certificate):
        parser.error("--server-name is for TLS: expected --ca too")
    status, detail = _query(chosen.check or _first(os.environ.get("SIDELIGHT_LISTEN", "")) or DEFAULT_ADDRESS, chosen)
    print(status + (f": {detail}" if detail else ""), file=sys.stderr)
    return 0 if status == "SERVING" else 1


def _first(addresses: str) -> str:
    """Return the first address of a variable, comma-separated or JSON. Parsing all settings would be slow."""
    if addresses.startswith("[") and addresses.endswith("]"):  # unlike "[::]:50051"
        with contextlib.suppress(ValueError, LookupError):
            return str(json.loads(addresses)[0])
    return addresses.partition(",")[0].strip()


def _query(address: str, chosen: argparse.Namespace) -> tuple[str, str]:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    request = health_pb2.HealthCheckRequest(service=chosen.service)
    try:
        channel = _channel(address, chosen)
    except OSError as error:  # a file is missing or not a PEM file
        return "UNKNOWN", str(error)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=chosen.timeout_s)
        except grpc.RpcError as error:
            is_plain = not (chosen.ca or chosen.certificate)
            hint = (
                "; if the server uses TLS, pass --ca" if is_plain and "Socket closed" in (error.details() or "") else ""
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
