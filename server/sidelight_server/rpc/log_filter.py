"""A log filter: a caller that goes while its response is written is no fault, and is not logged.

gRPC means the same: it says nothing where it knows already that the caller has gone. Where a write fails a moment
before it knows, it logs an error with a traceback, and there is no other way to tell it not to.
"""

import logging

import grpc


class _FailedWrites(logging.Filter):
    """Takes out that something could not be sent. That it was not taken to be sent, which is our fault, stays in."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is worth a line."""
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, grpc.aio.InternalError) and str(error).startswith('Failed "execute_batch"'))


_failed_writes = _FailedWrites()


def hide_failed_writes() -> None:
    """Do not log failed writes to callers that have gone, of any gRPC server in this process."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_failed_writes)  # once, however often it is added
