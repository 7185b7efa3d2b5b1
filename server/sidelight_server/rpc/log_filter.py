"""A log filter for gRPC's errors about writes to clients that disconnected.

gRPC logs nothing if it already knows of the disconnect, but an error with a traceback if a write fails just before
that. It has no option for this.
"""

import logging

import grpc


class _FailedWrites(logging.Filter):
    """Drops records of failed sends. Records of writes that gRPC rejected, which are bugs of this server, stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, grpc.aio.InternalError) and str(error).startswith('Failed "execute_batch"'))


_failed_writes = _FailedWrites()


def hide_failed_writes() -> None:
    """Do not log failed writes to disconnected clients, for every gRPC server in this process."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_failed_writes)  # idempotent
