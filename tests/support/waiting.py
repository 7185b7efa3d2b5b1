"""Waiting for what a test causes, without sleeping and never for ever."""

import asyncio
import queue
from collections.abc import Iterator

import numpy as np

from support.servers import TIMEOUT_S, Running


def until_no_stream_is_left(server: Running) -> None:
    async def until() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while server.server._service._streams:  # noqa: ASYNC110  (it is the loop that removes them)
                await asyncio.sleep(0)

    server.run(until())


def until_none(batches: queue.Queue[np.ndarray | None]) -> Iterator[np.ndarray]:
    while (batch := batches.get(timeout=TIMEOUT_S)) is not None:
        yield batch
