"""Counts of the requests, permits and streams of a server, for metrics, tests and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """The counts of a server at one moment. Those of an idle server are 0, except `shed_streams`."""

    permits: int  # batches that hold a permit
    permit_bytes: int  # of those batches and their answers
    waiting: int  # batches that wait for a permit
    arriving: int  # messages of unary calls that are being received
    unary_calls: int  # that explain a batch
    streams: int
    unanswered: int  # batches that streams have read and not answered
    requests: int  # that run on a device or wait for it
    rows: int  # upper bound of the rows of those requests
    watches: int  # of health
    shed_streams: int  # streams that were ended because memory was short, since the start
