"""The client: connects, asks, and reads answers."""

import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc

from . import _attribution
from ._attribution import Attribution
from ._errors import InvalidArgument, MessageTooLarge, PartialFailure, Unavailable, from_rpc
from ._images import Batch, Images
from ._methods import (
    Channels,
    Gradient,
    Method,
    Score,
    Target,
    channels_message,
    score_message,
    target_message,
)
from ._stream import Stream
from ._types import ModelInfo, ServerInfo

log = logging.getLogger("sidelight")

DEFAULT_ADDRESS = "127.0.0.1:50051"
CONNECT_TIMEOUT_S = 30.0
TIMEOUT_S = 60.0
SILENT_WAIT_S = 1.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
INFO_TIMEOUT_S = 10.0

OnError = Literal["raise", "return"]


def connect(
    address: str = DEFAULT_ADDRESS,
    *,
    connect_timeout: float = CONNECT_TIMEOUT_S,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> "Client":
    """Return a client of the server at an address, "host:port" or "unix:/path". It returns at once.

    Calls wait up to `connect_timeout` seconds for a server that is not there yet, and say so in the log after one.
    `max_message_bytes` bounds each message in both directions, and should be the server's.
    """
    return Client(address, connect_timeout=connect_timeout, max_message_bytes=max_message_bytes)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every batch of a call: all of a request but its images."""

    model: str | None
    target: Target
    method: Method
    score: Score
    channels: Channels
    probabilities: bool
    timeout: float
    partial: bool = False

    def request(self, batch: Batch, *, id_: str = "") -> pb.AttributeRequest:
        """Return the message that asks it of a batch. Every default is filled in."""
        if not self.timeout > 0:
            raise InvalidArgument(f"timeout: got {self.timeout} s, expected a positive time")
        return pb.AttributeRequest(
            id=id_,
            model=self.model or "",
            images=batch.message,
            target=target_message(self.target),
            method=self.method.message(),
            score=score_message(self.score),
            channels=channels_message(self.channels),
            output=pb.Output(probabilities=self.probabilities, partial=self.partial),
            timeout=_duration(self.timeout),
        )


class Client:
    """A connection to one server. Thread-safe; close it, or use `with`.

    Every failed call raises a `SidelightError` with the status's own type.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        if not isinstance(address, str) or not address:
            raise InvalidArgument(f'address: got {address!r}, expected "host:port" or "unix:/path"')
        self.address = address
        self.max_message_bytes = max_message_bytes
        self._connect_timeout_s = connect_timeout
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),  # checked here, with a better message
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                # Otherwise a second client of this process would share, and close, the first one's connection.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._stub = attribution_pb2_grpc.AttributionServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._connection = _Connection(self._channel, address)
        self._info: ServerInfo | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection. Running calls and streams end with `Cancelled`."""
        self._connection.close()
        self._channel.close()

    def attribute(
        self,
        images: Images,
        model: str | None = None,
        *,
        target: Target = None,
        method: Method = Gradient(),  # noqa: B008
        score: Score = "probability",
        channels: Channels = "max_abs",
        probabilities: bool = False,
        timeout: float = TIMEOUT_S,
        on_error: OnError = "raise",
    ) -> Attribution:
        """Return the maps of one batch.

        `images`: a path, encoded bytes, a PIL image, uint8 pixels [H, W, C] or [N, H, W, C], model-ready floats
        [C, H, W] or [N, C, H, W], or a list of them. `target`: None for the predicted class, a class index, a label, or
        a list with one of these for each example. `timeout` is in seconds.

        Where some examples failed, `on_error="raise"` raises `PartialFailure`, which carries the answer, and "return"
        returns the answer, whose `failures` are set. A batch that failed whole raises its error.
        """
        batch = Batch(images)
        question = Question(model, target, method, score, channels, probabilities, timeout)
        request = question.request(batch)
        self._connect()
        self._refuse_large(request.ByteSize())
        try:
            response = self._stub.Attribute(request, timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc(error, max_message_bytes=self.max_message_bytes) from None
        return unless_partial(_attribution.read(response.result, batch), on_error)

    def stream(
        self,
        batches: Iterable[Images],
        model: str | None = None,
        *,
        ordered: bool = False,
        target: Target = None,
        method: Method = Gradient(),  # noqa: B008
        score: Score = "probability",
        channels: Channels = "max_abs",
        probabilities: bool = False,
        timeout: float = TIMEOUT_S,
        on_error: OnError = "raise",
        partial: bool = False,
        window: int | None = None,
    ) -> Iterator[Attribution]:
        """Yield the maps of many batches as they are ready; `answer.index` is the batch's position in `batches`.

        The options are those of `attribute`, asked of every batch; `timeout` is each batch's own. `ordered` yields in
        the batches' order. `window` bounds the unanswered examples (default: twice the server's chunk, and always at
        least two batches); nothing of `batches` is read beyond it, and it is read in a thread of its own.

        With `on_error="return"` a batch that failed is yielded too, with `error` or `failures` set; with "raise" the
        first failure ends the stream. Closing the iterator cancels what is unanswered.
        """
        question = Question(model, target, method, score, channels, probabilities, timeout, partial)
        self._connect()
        info = self._server()
        rows = next((each.chunk_rows for each in info.models if each.name == model), info.models[0].chunk_rows)
        stream = Stream(
            self._stub,
            batches,
            ask=question.request,
            check_size=self._refuse_large,
            window=window or 2 * rows,
            timeout_s=timeout,
            max_message_bytes=self.max_message_bytes,
        )
        for answer in stream.answers(ordered=ordered):
            if answer.error is not None and on_error == "raise":
                raise answer.error
            yield unless_partial(answer, on_error)

    def info(self) -> ServerInfo:
        """Return the server's version, limits, methods and models."""
        self._connect()
        try:
            response = self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=INFO_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc(error, max_message_bytes=self.max_message_bytes) from None
        self._info = ServerInfo.of(response)
        return self._info

    def model(self, name: str | None = None) -> ModelInfo:
        """Return one model with its labels and layers; None is the default model."""
        self._connect()
        try:
            response = self._models.GetModel(model_pb2.GetModelRequest(name=name or ""), timeout=INFO_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc(error, max_message_bytes=self.max_message_bytes) from None
        return ModelInfo.of(response.model)

    def _connect(self) -> None:
        self._connection.wait(self._connect_timeout_s)

    def _server(self) -> ServerInfo:
        return self._info or self.info()

    def _refuse_large(self, n_bytes: int) -> None:
        """Refuse a message that either side would refuse. On a stream, gRPC would end the whole stream for it."""
        if n_bytes > self.max_message_bytes:
            raise MessageTooLarge(
                f"the request takes {n_bytes} bytes; max_message_bytes of this client's connect() is "
                f"{self.max_message_bytes}: send fewer examples, or raise it here and on the server"
            )
        limit = self._server().limits.max_message_bytes
        if n_bytes > limit:
            raise MessageTooLarge(
                f"the request takes {n_bytes} bytes; max_message_bytes of the server is {limit}: "
                "send fewer examples, or start the server with a larger --max-message-bytes"
            )


def unless_partial(answer: Attribution, on_error: OnError) -> Attribution:
    """Return an answer, or raise `PartialFailure` where some of its examples failed and that is to be raised."""
    if answer.failures and on_error == "raise":
        raise PartialFailure(answer)
    return answer


class _Connection:
    """Whether the server is there: follows the channel's state, so that a call need not ask."""

    def __init__(self, channel: grpc.Channel, address: str) -> None:
        self._channel = channel
        self._address = address
        self._changed = threading.Condition()
        self._state: grpc.ChannelConnectivity | None = None
        self._followed = False

    def wait(self, timeout_s: float) -> None:
        """Wait for the server. `Unavailable` when it has not come in time, or the client is closed."""
        with self._changed:
            if not self._followed:
                self._followed = True
                self._channel.subscribe(self._follow, try_to_connect=True)
            if self._settled(min(timeout_s, SILENT_WAIT_S)):
                return
            log.warning("waiting for a server at %s", self._address)
            if not self._settled(timeout_s - SILENT_WAIT_S):
                raise Unavailable(
                    f"no server answers at {self._address} after {timeout_s:g} s; is sidelight-server running there?"
                )

    def close(self) -> None:
        """Stop following, and let those who wait go."""
        self._channel.unsubscribe(self._follow)
        self._follow(grpc.ChannelConnectivity.SHUTDOWN)

    def _settled(self, timeout_s: float) -> bool:
        ends = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.SHUTDOWN)
        if not self._changed.wait_for(lambda: self._state in ends, max(0.0, timeout_s)):
            return False
        if self._state is grpc.ChannelConnectivity.SHUTDOWN:
            raise Unavailable("the client is closed")
        return True

    def _follow(self, state: grpc.ChannelConnectivity) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()


def _duration(seconds: float) -> Duration:
    seconds = min(seconds, 1e9)  # math.inf is for ever, and so is thirty years
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
