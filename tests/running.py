"""A server in a thread of its own, with its inside in reach."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from sidelight.v1 import attribution_pb2_grpc
from sidelight_server import Engine
from sidelight_server.server import Server

TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Running:
    """A server, the loop that it runs on, and a connection to it."""

    server: Server
    engine: Engine
    loop: asyncio.AbstractEventLoop
    channel: grpc.Channel

    @property
    def stub(self) -> attribution_pb2_grpc.AttributionServiceStub:
        return attribution_pb2_grpc.AttributionServiceStub(self.channel)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT_S)

    def until_all_permits_are_back(self) -> None:
        """Take all the bytes there are, which waits until no request holds any, and give them back."""
        admission, n_bytes = self.server.explainer.admission, self.engine.settings.max_in_flight_bytes
        permit = self.run(admission.acquire(n_bytes))
        assert admission.n_requests == 1
        self.loop.call_soon_threadsafe(admission.release, permit)
        assert self.engine.n_unanswered == 0


@contextlib.contextmanager
def serving(engine: Engine, listen: str, *, started: bool = True) -> Iterator[Running]:
    """Serve an engine; with `started` False the server is told to start and may take its time."""
    server, loop = Server(engine, listen=[listen]), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    starting = asyncio.run_coroutine_threadsafe(server.start(), loop)
    try:
        if started:
            starting.result(TIMEOUT_S)
        with grpc.insecure_channel(server.addresses[0] if started else listen) as channel:
            yield Running(server, engine, loop, channel)
    finally:
        starting.result(TIMEOUT_S)
        asyncio.run_coroutine_threadsafe(server.stop(drain_s=0), loop).result(TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
