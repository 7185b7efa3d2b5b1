"""The server: its life cycle. start, serve until a signal, drain, stop."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc
from torch import nn

from .config import Settings
from .engine import Engine
from .errors import ConfigurationError
from .explainer import Explainer
from .models import source
from .models.spec import ModelSpec
from .service import AttributionService, ModelService

log = logging.getLogger("sidelight")

START_TIMEOUT_S = 60.0
SERVICES = (
    pb.DESCRIPTOR.services_by_name["AttributionService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)


class Server:
    """An engine on the network. `ConfigurationError` where an address cannot be had."""

    def __init__(self, engine: Engine, *, listen: Sequence[str], plaintext: bool = False) -> None:
        self._engine = engine
        self._listen = listen
        self._plaintext = plaintext
        self._health = health.aio.HealthServicer()
        self.explainer = Explainer(engine)
        self.addresses: list[str] = []

    async def start(self) -> None:
        """Bind, warm up, and begin to answer. `addresses` then says where."""
        limit = self._engine.settings.max_message_bytes
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                # Two servers on one port would each get a share of the calls, and nobody would know.
                ("grpc.so_reuseport", 0),
            ]
        )
        attribution_pb2_grpc.add_AttributionServiceServicer_to_server(
            AttributionService(self._engine, self.explainer), self._server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self._engine), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.addresses = [self._bind(address) for address in self._listen]
        self._engine.start()
        await self._engine.warm_up()
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, *, drain_s: float) -> None:
        """Take nothing new in, let running work end within `drain_s`, and stop."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(drain_s)
        self._engine.close()

    async def _set_health(self, status: Any) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)

    def _bind(self, address: str) -> str:
        path = address.removeprefix("unix:")
        if ":" not in address:
            raise ConfigurationError(f'listen: got "{address}", expected "host:port" or "unix:/path"')
        if path != address:
            _clear_socket(Path(path))
        elif not self._plaintext and not _is_loopback(address):
            raise ConfigurationError(
                f"listen: {address} is not loopback, and nothing would be encrypted; say --plaintext if that is meant"
            )
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigurationError(f"listen: cannot bind {address}: {_cause(error)}") from error
        if path != address:
            return address
        return f"{address.rpartition(':')[0]}:{port}"


async def serve_until_signal(settings: Settings) -> None:
    """Load the model that the settings name, and serve it until SIGTERM or SIGINT. A second signal ends at once."""
    if not settings.model:
        raise ConfigurationError(f"model: not set; say --model {source.FORM}, for example --model python:mine:resnet")
    # Loading must not start OpenMP workers of its own: once a process has more of them than CPUs, GNU's OpenMP sleeps
    # at every barrier instead of spinning, and the thread that owns the device was seen to lose 15 % by it.
    torch.set_num_threads(1)
    engine = Engine([source.load(settings.model, settings.weights)], settings)
    server = Server(engine, listen=settings.listen, plaintext=settings.plaintext)
    await server.start()
    model = next(iter(engine.models.values()))
    log.info(
        'event=serving addresses=%s model="%s" digest=%s device=%s threads=%d chunk_rows=%d',
        ",".join(server.addresses), model.name, model.digest[:12], engine.device, engine.threads, engine.chunk_rows,
    )  # fmt: skip
    name = await _signalled()
    log.info("event=stopping signal=%s unanswered=%d drain_s=%g", name, engine.n_unanswered, settings.drain_s)
    await server.stop(drain_s=settings.drain_s)


@contextlib.contextmanager
def serve(model: nn.Module | ModelSpec | str, **settings: Any) -> Iterator[str]:
    """Run a real server in a thread of its own, on a fresh UNIX socket, and give its address.

    `model` is a module, a `ModelSpec` or a source; `settings` are those of `Settings`. Neither variables nor a file are
    read. The module is neither frozen, moved nor switched.
    """
    chosen = Settings(**settings)
    spec = source.load(model, chosen.weights) if isinstance(model, str) else model
    engine = Engine([ModelSpec(spec) if isinstance(spec, nn.Module) else spec], chosen)
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        listen = chosen.listen if "listen" in settings else (f"unix:{folder}/socket",)
        server = Server(engine, listen=listen, plaintext=chosen.plaintext)
        with _Thread(server, drain_s=chosen.drain_s):
            yield server.addresses[0]


class _Thread:
    """A server's event loop in a thread."""

    def __init__(self, server: Server, *, drain_s: float) -> None:
        self._server = server
        self._drain_s = drain_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sidelight-server", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result(START_TIMEOUT_S)
        except BaseException:
            self._end()
            raise

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(drain_s=self._drain_s), self._loop).result()
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _signalled() -> str:
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    names: list[str] = []

    def handle(name: str, number: int) -> None:
        names.append(name)
        came.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number.name, number)
    await came.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    return names[0]


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _clear_socket(path: Path) -> None:
    """Remove a socket file that a killed server left behind. A live server's, or another kind of file, is refused."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigurationError(f"listen: {path} exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:  # not ours to know, still less to remove
            raise ConfigurationError(f"listen: cannot tell who has {path}: {error.strerror}") from error
    raise ConfigurationError(f"listen: another server answers on {path}")


def _cause(error: Exception) -> str:
    return str(error).partition("; set GRPC_VERBOSITY")[0]
