"""The client: connects, asks, and reads answers."""

import re
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Literal, Self, TypeVar, get_args

import grpc

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc

from . import _attribution
from ._attribution import Attribution
from ._baselines import given_array
from ._connection import Connection
from ._errors import InvalidArgument, PartialFailure, from_rpc
from ._images import Batch, Images
from ._info import ModelInfo, ServerInfo
from ._limits import refuse_large
from ._methods import Gradient, Method, is_one_row
from ._question import FOR_EVER_S, Question
from ._stream import Stream
from ._targets import Target
from ._words import Channels, MapDtype, Score

DEFAULT_ADDRESS = "127.0.0.1:50051"
CONNECT_TIMEOUT_S = 30.0
TIMEOUT_S = 60.0
INFO_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

OnError = Literal["raise", "return"]

_ADDRESS = re.compile(r"unix:.+|(?!\w+://).+:\d+")
_Response = TypeVar("_Response")


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


class Client:
    """A connection to one server. Thread-safe; close it, or use `with`.

    Every failed call raises a `SidelightError` with the status's own type; a file that cannot be read, its `OSError`.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
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
        self._connection = Connection(self._channel, self._stub, address)
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
        map_dtype: MapDtype = "float32",
        timeout: float = TIMEOUT_S,
        on_error: OnError = "raise",
    ) -> Attribution:
        """Return the maps of one batch.

        `images`: a path, encoded bytes, a PIL image, uint8 pixels [H, W, C] or [N, H, W, C], model-ready floats
        [C, H, W] or [N, C, H, W], or a list of them. `target`: None for the predicted class, a class index, a label, a
        list with one of these for each example, or `TopK`, `Contrast`, `Dense`. `map_dtype` is how the maps travel:
        "float16" and "uint8" are shorter and rounded, "uint8" for maps without negative values alone. `timeout` is in
        seconds.

        Where some examples failed, `on_error="raise"` raises `PartialFailure`, which carries the answer, and "return"
        returns the answer, whose `failures` are set. A batch that failed whole raises its error.
        """
        _check_on_error(on_error)
        batch = Batch(images)
        request = Question(model, target, method, score, channels, probabilities, timeout, map_dtype).request(batch)
        return _unless_partial(self._explain(request, batch, timeout_s=timeout), on_error)

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
        map_dtype: MapDtype = "float32",
        timeout: float = TIMEOUT_S,
        on_error: OnError = "raise",
        partial: bool = False,
        window: int | None = None,
    ) -> Iterator[Attribution]:
        """Yield the maps of many batches as they are ready; `answer.index` is the batch's position in `batches`.

        The options are those of `attribute`, asked of every batch; `timeout` is each batch's own. `ordered` yields in
        the batches' order. `window` bounds the unanswered examples, and is always at least two batches (default: twice
        the server's chunk for methods of one row; two batches for others, whose every example fills chunks, and whose
        timeouts would otherwise run while they wait for each other); nothing of `batches` is read beyond it, and it is
        read in a thread of its own.

        With `partial`, a method that refines yields a batch several times, with `final` unset until the last; a caller
        who is slow gets fewer of these, and with `ordered` only the batch whose turn it is has them.

        With `on_error="return"` a batch that failed is yielded too, with `error` or `failures` set; with "raise" the
        first failure ends the stream. Closing the iterator cancels what is unanswered.
        """
        _check_on_error(on_error)
        if isinstance(batches, str | bytes):
            raise InvalidArgument(f"batches: got {type(batches).__name__}, expected an iterable of batches")
        question = Question(model, target, method, score, channels, probabilities, timeout, map_dtype, partial)
        question.request(Batch([]))  # what is wrong with it is said here, not by every batch
        return self._answers(batches, question, ordered=ordered, on_error=on_error, window=window)

    def info(self) -> ServerInfo:
        """Return the server's version, limits, methods and models."""
        self._connect()
        response = self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest(), timeout_s=INFO_TIMEOUT_S)
        self._info = ServerInfo.of(response)
        return self._info

    def model(self, name: str | None = None) -> ModelInfo:
        """Return one model with its labels and layers; None is the default model."""
        self._connect()
        request = model_pb2.GetModelRequest(name=name or "")
        return ModelInfo.of(self._call(self._models.GetModel, request, timeout_s=INFO_TIMEOUT_S).model)

    def _explain(self, request: pb.AttributeRequest, batch: Batch, *, timeout_s: float) -> Attribution:
        """Return the answer to a request for a batch."""
        self._connect()
        self._refuse_large(request, batch)
        response = self._call(self._stub.Attribute, request, timeout_s=min(timeout_s, FOR_EVER_S))
        return _attribution.read(response.result, batch, baseline=given_array(request.method))

    def _answers(
        self, batches: Iterable[Images], question: Question, *, ordered: bool, on_error: OnError, window: int | None
    ) -> Iterator[Attribution]:
        self._connect()
        chunk_rows = self._known(question.model).chunk_rows

        def ask(batch: Batch, *, id_: str) -> pb.AttributeRequest:
            request = question.request(batch, id_=id_)
            self._refuse_large(request, batch)
            return request

        stream = Stream(
            self._stub,
            batches,
            ask=ask,
            window=window or (2 * chunk_rows if is_one_row(question.method) else 1),
            timeout_s=question.timeout,
            max_message_bytes=self.max_message_bytes,
        )
        for answer in stream.answers(ordered=ordered):
            if answer.error is not None and on_error == "raise":
                raise answer.error
            yield _unless_partial(answer, on_error)

    def _connect(self) -> None:
        self._connection.wait(self._connect_timeout_s)

    def _call(self, call: "Callable[..., _Response]", request: object, *, timeout_s: float) -> _Response:
        try:
            return call(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc(error, max_message_bytes=self.max_message_bytes) from None

    def _server(self) -> ServerInfo:
        return self._info or self.info()

    def _known(self, name: str | None) -> ModelInfo:
        """Return what the server said of a model, or of its default where it has no such name: it will say so."""
        models = self._server().models
        return next((model for model in models if model.name == name), models[0])

    def _refuse_large(self, request: pb.AttributeRequest, batch: Batch) -> None:
        input_size, theirs = self._known(request.model).input_size, self._server().limits.max_message_bytes
        refuse_large(request, batch, ours=self.max_message_bytes, theirs=theirs, input_size=input_size)


def _unless_partial(answer: Attribution, on_error: OnError) -> Attribution:
    """Return an answer, or raise `PartialFailure` where it is final, some examples failed, and that is to be raised."""
    if answer.final and answer.failures and on_error == "raise":
        raise PartialFailure(answer)
    return answer


def _check_on_error(on_error: str) -> None:
    if on_error not in get_args(OnError):
        raise InvalidArgument(f"on_error: got {on_error!r}, expected one of {', '.join(get_args(OnError))}")
