"""A server in a thread of its own, with access to its internals."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import torch
from sidelight.v1 import attribution_pb2_grpc
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.app.metrics.counts import ServerCounts
from sidelight_server.app.server import Server
from torch import Tensor, nn

from support.engines import tried
from support.models import Linear
from support.models.gate import Gate

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

    def counts(self) -> ServerCounts:
        return self.server.counts()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT_S)

    def until_all_permits_are_back(self) -> None:
        """Wait until no request holds bytes: take all of them and give them back."""
        admission, n_bytes = self.server.handler.admission, self.engine.settings.max_in_flight_bytes
        permit = self.run(admission.acquire(n_bytes))
        assert admission.n_requests == 1
        self.loop.call_soon_threadsafe(admission.release, permit)
        assert self.engine.n_unanswered == 0


@contextlib.contextmanager
def serving(engine: Engine, listen: str, *, started: bool = True) -> Iterator[Running]:
    """Serve an engine; with `started` False this does not wait until the server has started."""
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


class GatedLinear(nn.Module):
    """Logits that are linear in [N, 3, 4, 5], behind a gate. It has no input size, so loading it runs no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.linear = Linear()

    def forward(self, x: Tensor) -> Tensor:
        self.gate.wait(len(x))
        return self.linear(x)


@contextlib.contextmanager
def running(module: nn.Module, folder: Path, **settings: object) -> Iterator[Running]:
    with serving(Engine([ModelSpec(module)], Settings(**settings)), f"unix:{folder}/socket") as server:
        yield server


@contextlib.contextmanager
def gated(folder: Path, **settings: object) -> Iterator[tuple[Gate, Running]]:
    module = GatedLinear()
    gate = module.gate
    engine = tried(Engine([ModelSpec(module)], Settings(**settings)), torch.zeros(1, 3, 4, 5))
    gate.shut()
    with serving(engine, f"unix:{folder}/socket") as server:
        try:
            yield gate, server
        finally:
            gate.open()


@dataclass(frozen=True, slots=True)
class Counts:
    """Resources that a server and its process hold."""

    server: ServerCounts
    descriptors: int
    threads: int

    def exceeds(self, other: "Counts") -> bool:
        """Whether there is more of any resource. (There may be less of what the first requests created.)"""
        pairs = zip(astuple(self.server), astuple(other.server), strict=True)
        return any(a > b for a, b in (*pairs, (self.descriptors, other.descriptors), (self.threads, other.threads)))

    @classmethod
    def of(cls, server: Running) -> "Counts":
        return cls(replace(server.counts(), shed_streams=0), len(os.listdir("/proc/self/fd")), threading.active_count())
