"""Scripts and streams for the tests of servers that fail."""

from collections.abc import Iterable, Iterator

import numpy as np
import sidelight
from sidelight.v1 import attribution_pb2 as pb

from support.servers.scripted import answer

ONE = np.zeros((1, 3, 2, 2), np.float32)

Requests = Iterator[pb.AttributeStreamRequest]
Responses = Iterator[pb.AttributeStreamResponse]


def echo(requests: Requests) -> Responses:
    """Answer everything at once."""
    yield from map(answer, requests)


def stream(address: str | list[str], batches: Iterable[object], **options: object) -> list[sidelight.Attribution]:
    options = {"on_error": "return", "ordered": True, "timeout": 30} | options
    with sidelight.connect(address, connect_timeout=10) as client:
        return list(client.stream(batches, **options))


def assert_all_answered(answers: list[sidelight.Attribution], n: int) -> None:
    assert [each.index for each in answers] == list(range(n))
    assert [each.error for each in answers] == [None] * n
