"""Options of gRPC: limits of messages and connections, and keepalive."""

from ..config.settings import Settings

# Clients may ping every 10 s. Pings may arrive a little early, and gRPC closes a connection after the third early one.
MIN_PING_INTERVAL_MS = 5_000

KEEPALIVE_TIMEOUT_S = 10.0  # limit for the answer to a ping

# Concurrent calls of one connection; further calls wait in the client. It also limits the cost of a connection that
# starts and resets calls as fast as possible.
MAX_CONNECTION_CALLS = 100


def channel_options(settings: Settings) -> list[tuple[str, int]]:
    """Return the options of the gRPC server."""
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Otherwise two servers on one port would silently share its calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MAX_CONNECTION_CALLS),
        # Otherwise the 64 KiB that gRPC buffers of an unread message would grow with the bandwidth-delay product.
        ("grpc.http2.bdp_probe", 0),
        # Clients may ping with or without a call, to detect whether the server is alive.
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if settings.keepalive_s:
        timeout_ms = round(1000 * min(settings.keepalive_s, KEEPALIVE_TIMEOUT_S))
        options += [
            ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", timeout_ms),
            # Without this, the connection of a dead client was kept for another minute.
            ("grpc.http2.ping_timeout_ms", timeout_ms),
            ("grpc.http2.max_pings_without_data", 0),  # no limit
        ]
    return options
