"""Options of gRPC: limits of messages and connections, and keepalive."""

from typing import TYPE_CHECKING

from ..config.settings import Settings

if TYPE_CHECKING:
    pass


# Callers may ping every 10 s. Pings arrive early by a jitter, and the third one that does would end the connection.
MIN_PING_INTERVAL_MS = 5_000


KEEPALIVE_TIMEOUT_S = 10.0  # for an answer to a ping


# Calls of one connection at once; a caller's further ones wait with the caller. It also bounds what a connection costs
# whose calls are begun and reset as fast as can be.
MAX_CONNECTION_CALLS = 100


def channel_options(settings: Settings) -> list[tuple[str, int]]:
    """Return what gRPC is told."""
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Two servers on one port would each get a share of the calls, and nobody would know.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MAX_CONNECTION_CALLS),
        # Otherwise the 64 KiB that come of a message nobody reads become as much as the network holds.
        ("grpc.http2.bdp_probe", 0),
        # With or without a call, to find out whether this server is there.
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if settings.keepalive_s:
        timeout_ms = round(1000 * min(settings.keepalive_s, KEEPALIVE_TIMEOUT_S))
        options += [
            ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", timeout_ms),
            # Without this one a dead caller was seen to be kept for a minute more.
            ("grpc.http2.ping_timeout_ms", timeout_ms),
            ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
        ]
    return options
