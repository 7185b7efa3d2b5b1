"""The core of both clients: chooses a server, caches its limits, makes metadata calls and opens streams.

All functions may block, and are thread-safe.
"""

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2

from .._inputs.batch import Batch, Images
from .._inputs.images import EncodedBatch
from .._inputs.validation import counted, span
from .._options import Headers, Metadata, checked_metadata, model_name
from .._streaming.limits import fits, map_bytes, split
from .._streaming.requests import StreamConfig
from .._streaming.scheduling.resend_queue import ResendQueue
from .._streaming.stream import Stream
from .._transport.channel import Connection
from .._transport.credentials import TLS, ChannelSecurity, Token
from .._transport.pool import ConnectionPool
from .._transport.retry_policy import RetryPolicy
from .._transport.shared_memory import Regions, directory_of
from ..exceptions import Unavailable, from_rpc
from ..methods.baselines import given_array
from ..results.server_info import ModelInfo, ServerInfo
from .stream_options import StreamOptions

CONNECT_TIMEOUT_S = 30.0
TIMEOUT_S = 60.0
INFO_TIMEOUT_S = 10.0
RELOAD_TIMEOUT_S = 600.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
CHUNK_ROWS = 32  # assumed for a model that is not loaded yet
N_SLOTS = 8  # a region of shared memory has room for this many batches of the size of its first one


class ClientCore:
    """The connections of one client, and the cached server info."""

    def __init__(
        self,
        pool: ConnectionPool,
        *,
        connect_timeout_s: float,
        max_message_bytes: int,
        shared_memory: bool | str | os.PathLike[str],
        retry: bool,
    ) -> None:
        self.pool = pool
        self.connect_timeout_s = connect_timeout_s
        self.max_message_bytes = max_message_bytes
        self.shared_memory = shared_memory
        self.retry = retry
        self.closed = threading.Event()
        self._info: ServerInfo | None = None

    def close(self) -> None:
        """Close the connections. In a forked child it does nothing."""
        if self.pool.is_in_own_process:
            self.closed.set()
            self.pool.close()

    def info(self, *, within_s: float = math.inf, metadata: Metadata = ()) -> ServerInfo:
        """Fetch the info of the next server and its models."""
        request, timeout_s = pb.GetServerInfoRequest(), min(INFO_TIMEOUT_S, within_s)
        wait_s = self.wait_s(within_s)
        info = self._rpc("attribution", "GetServerInfo", request, timeout_s=timeout_s, wait_s=wait_s, metadata=metadata)
        self._info = server = ServerInfo.of(info)
        return server

    def model(self, name: str | None, *, metadata: Metadata) -> ModelInfo:
        response = self._rpc("models", "GetModel", model_pb2.GetModelRequest(name=model_name(name)), metadata=metadata)
        return ModelInfo.of(response.model, is_whole=True)

    def reload(self, name: str | None, *, timeout: float, metadata: Metadata) -> ModelInfo:
        request = model_pb2.ReloadModelRequest(name=model_name(name))
        timeout_s = span(timeout, "timeout")
        wait_s = self.wait_s(timeout_s)
        response = self._rpc("models", "ReloadModel", request, timeout_s=timeout_s, wait_s=wait_s, metadata=metadata)
        return ModelInfo.of(response.model, is_whole=True)

    def find(self, name: str, *, within_s: float) -> tuple[ServerInfo, ModelInfo | None]:
        """Return a server and one of its models, or None if it lacks the model; an empty name is the default model.

        Both are cached, except for a model that is not serving: it may have been loaded since.
        """
        server = self._info
        model = _model_of(server, name) if server else None
        if server is None or model is None or model.state != "serving":
            server = self.info(within_s=within_s)
            model = _model_of(server, name)
        return server, model

    def wait_s(self, limit_s: float) -> float:
        """Return how long a call with a time limit may wait for a server, in seconds."""
        return min(self.connect_timeout_s, limit_s)

    def fits(self, request: pb.AttributeRequest, batch: EncodedBatch, *, within_s: float) -> bool:
        """Return whether a batch fits into one message. Raises `MessageTooLarge` if a single example does not."""
        server, model = self.find(request.model, within_s=within_s)
        input_size = model.input_size if model else None
        return fits(request, batch, client_limit=self.max_message_bytes, server=server, input_size=input_size)

    def options_for_parts(self, template: pb.AttributeRequest, policy: RetryPolicy, metadata: Headers) -> StreamOptions:
        """Return the options of a stream that sends one batch in parts, in the time that is left."""
        left_s = policy.left_s
        return StreamOptions(template, timeout_s=left_s, server_wait_s=self.wait_s(left_s), metadata=metadata)

    def open_stream(
        self,
        batches: Iterator[Images | Batch | EncodedBatch],
        options: StreamOptions,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> Stream:
        """Return a stream to all servers. It is not started yet."""
        template = options.template
        server, model = self.find(template.model, within_s=options.timeout_s)
        input_size = model.input_size if model else None
        config = StreamConfig(
            template=template,
            split=functools.partial(
                split,
                template,
                client_limit=self.max_message_bytes,
                server=server,
                input_size=input_size,
                is_shared=bool(self.shared_memory),
            ),
            timeout_s=options.timeout_s,
            server_wait_s=self.connect_timeout_s if options.server_wait_s is None else options.server_wait_s,
            max_message_bytes=self.max_message_bytes,
            allow_model_change=options.allow_model_change,
            baseline=given_array(template.method),
            retry=self.retry,
            metadata=options.metadata,
            map_bytes=functools.partial(map_bytes, template, input_size=input_size),
            make_regions=self._regions if self.shared_memory else None,
        )
        # One example of a method of many rows fills chunks. A larger window would let batches time out in the queue.
        per_worker = 2 * ((model.chunk_rows if model else 0) or CHUNK_ROWS) if options.is_one_row else 1
        resend_queue = ResendQueue(window=per_worker, total_window=options.window, hedge_after_s=options.hedge_after_s)
        return Stream(self.pool, batches, config=config, resend_queue=resend_queue, on_change=on_change)

    def _rpc(
        self,
        stub: str,
        name: str,
        request: object,
        *,
        timeout_s: float = INFO_TIMEOUT_S,
        wait_s: float | None = None,
        metadata: Metadata,
    ) -> Any:
        """Make a metadata call. Waits up to `wait_s` for a server that is starting or still loading its models."""
        metadata = checked_metadata(metadata)
        wait_s = self.connect_timeout_s if wait_s is None else wait_s
        policy = RetryPolicy(wait_s, retry=True)
        while True:
            connection = self.pool.ready(wait_s)
            try:
                with translate_errors(self.max_message_bytes), connection.used():
                    call = getattr(getattr(connection, stub), name)
                    return call(request, timeout=timeout_s, metadata=metadata)
            except Unavailable as error:
                if error.retry_delay_s is None:
                    raise
                self.closed.wait(policy.delay_after(error))

    def _regions(self, connection: Connection) -> Regions:
        """Return the shared memory of a call, without regions yet. Each server reports its own folder."""
        with translate_errors(self.max_message_bytes):
            request = pb.GetServerInfoRequest()
            server = ServerInfo.of(connection.attribution.GetServerInfo(request, timeout=INFO_TIMEOUT_S))
        directory = directory_of(server, self.shared_memory)
        assert server.shared_memory is not None  # noqa: S101
        return Regions(directory, max_region_bytes=server.shared_memory.max_region_bytes, n_slots=N_SLOTS)


class ClientBase:
    """The base class of both clients: their constructor and address."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        shared_memory: bool | str | os.PathLike[str] = False,
        retry: bool = True,
        tls: bool | str | os.PathLike[str] | TLS | None = None,
        token: Token | None = None,
    ) -> None:
        counted(max_message_bytes, "max_message_bytes")
        connect_timeout_s = span(connect_timeout, "connect_timeout", is_zero_allowed=True)
        self._core = ClientCore(
            ConnectionPool(address, max_message_bytes=max_message_bytes, security=ChannelSecurity.of(tls, token)),
            connect_timeout_s=connect_timeout_s,
            max_message_bytes=max_message_bytes,
            shared_memory=shared_memory,
            retry=retry,
        )

    @property
    def address(self) -> str:
        """The server's address; of several servers, all addresses with commas between them."""
        return self._core.pool.addresses


def _model_of(server: ServerInfo, name: str) -> ModelInfo | None:
    return next((model for model in server.models if name in ("", model.name)), None)


def unary_request(template: pb.AttributeRequest, batch: EncodedBatch) -> pb.AttributeRequest:
    request = pb.AttributeRequest()
    request.CopyFrom(template)
    request.images.CopyFrom(batch.message)
    request.id = batch.id or ""
    batch.set_options(request)
    return request


@contextlib.contextmanager
def translate_errors(max_message_bytes: int) -> Iterator[None]:
    """Raise a failed call as the exception for its status."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error, max_message_bytes=max_message_bytes) from None
