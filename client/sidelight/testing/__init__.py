"""A small Sidelight server for tests: without torch or a GPU, it answers in well under a millisecond.

```python
with sidelight.testing.serve(labels=["cat", "dog"]) as server, sidelight.connect(server.address) as client:
    answer = client.attribute(images)
    server.fail_next(sidelight.exceptions.Unavailable("try again"))
```

Its model is linear: the logit of class k is the mean over pixels and channels of x · w_k, with fixed weights w_k, and a
softmax follows. Pixels are scaled to 0…1; files are resized to 32 × 32. A map is the exact gradient of the target's
probability for every method, score and number of samples: methods are not simulated.
"""

import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, Self

import grpc

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc

from .._streaming.worker import BEGIN_HEADER
from ..exceptions import RETRY_TRAILER, NotFound, SidelightError, Unimplemented
from .linear import MAX_EXAMPLES, MODEL, Answer, Linear

__all__ = ["TestServer", "serve"]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_THREADS = 32
_STATUSES: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}


def serve(*, labels: Sequence[str] = (), n_classes: int = 10) -> "TestServer":
    """Start a server on a new UNIX socket. It has one class per label, or `n_classes` without labels."""
    return TestServer(tuple(labels), len(labels) or n_classes)


class TestServer:
    """A running server. `close`, or the end of a `with` block, stops it. Thread-safe."""

    __test__ = False  # the name would make pytest collect it

    def __init__(self, labels: tuple[str, ...], n_classes: int) -> None:
        self._service = _Service(Linear(labels, n_classes))
        self._folder = tempfile.TemporaryDirectory(prefix="sidelight-")
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="sidelight-testing")
        options = [(f"grpc.max_{way}_message_length", MAX_MESSAGE_BYTES) for way in ("receive", "send")]
        self._server = grpc.server(self._threads, options=options)
        attribution_pb2_grpc.add_AttributionServiceServicer_to_server(self._service, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self._service.model), self._server)
        self.address = f"unix:{self._folder.name}/socket"
        self._server.add_insecure_port(self.address)
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server. Running calls end with UNAVAILABLE."""
        self._server.stop(0).wait()
        self._threads.shutdown()
        self._folder.cleanup()

    @property
    def requests(self) -> tuple[pb.AttributeRequest, ...]:
        """The requests received so far, in order: unary calls and batches of streams, also those that failed."""
        return self._service.seen()

    def fail_next(self, error: SidelightError, *, times: int = 1) -> None:
        """Answer the next `times` unary calls or batches of streams with this error."""
        self._service.failures.extend([error] * times)


class _Service(attribution_pb2_grpc.AttributionServiceServicer):
    def __init__(self, model: Linear) -> None:
        self.model = model
        self._requests: list[pb.AttributeRequest] = []
        self.failures: deque[SidelightError] = deque()
        self._lock = threading.Lock()

    def seen(self) -> tuple[pb.AttributeRequest, ...]:
        with self._lock:
            return tuple(self._requests)

    def Attribute(self, request: pb.AttributeRequest, context: grpc.ServicerContext) -> pb.AttributeResponse:  # noqa: N802
        try:
            return pb.AttributeResponse(id=request.id, result=self._answer(request))
        except SidelightError as error:
            _abort(context, error)

    def AttributeStream(  # noqa: N802
        self, request_iterator: Iterator[pb.AttributeStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttributeStreamResponse]:
        context.send_initial_metadata(((BEGIN_HEADER, "1"),))
        for message in request_iterator:
            match message.WhichOneof("request"):
                case "attribute":
                    yield self._respond(message.attribute)
                case "register_region":
                    error = Unimplemented("shared memory: not supported by the test server")
                    yield pb.AttributeStreamResponse(id=message.register_region.id, failure=_failure(error))
                case _:  # a cancellation is read only after the answer was sent
                    pass

    def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        limits = pb.Limits(
            max_message_bytes=MAX_MESSAGE_BYTES, max_in_flight=_THREADS, max_stream_in_flight=_THREADS,
            max_batch_examples=MAX_EXAMPLES,
        )  # fmt: skip
        methods = [field.name for field in pb.Method.DESCRIPTOR.fields]
        return pb.GetServerInfoResponse(version="testing", limits=limits, methods=methods, models=[self.model.info()])

    def _respond(self, request: pb.AttributeRequest) -> pb.AttributeStreamResponse:
        try:
            return pb.AttributeStreamResponse(id=request.id, result=self._answer(request))
        except SidelightError as error:
            return pb.AttributeStreamResponse(id=request.id, failure=_failure(error))

    def _answer(self, request: pb.AttributeRequest) -> pb.Attribution:
        with self._lock:
            self._requests.append(request)
            if self.failures:
                raise self.failures.popleft()
        if request.model not in ("", MODEL):
            raise NotFound(f'model: got "{request.model}", expected "{MODEL}"')
        return Answer(self.model, request).attribution()


class _Models(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, model: Linear) -> None:
        self._model = model

    def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[self._model.info()])

    def GetModel(self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:  # noqa: N802
        if request.name not in ("", MODEL):
            _abort(context, NotFound(f'name: got "{request.name}", expected "{MODEL}"'))
        return model_pb2.GetModelResponse(model=self._model.info())

    def ReloadModel(  # noqa: N802
        self, request: model_pb2.ReloadModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.ReloadModelResponse:
        return model_pb2.ReloadModelResponse(model=self._model.info())


def _failure(error: SidelightError) -> pb.Failure:
    failure = pb.Failure(code=error.code, message=error.message)
    if error.retry_delay_s is not None:
        failure.retry_delay.FromNanoseconds(round(1e9 * error.retry_delay_s))
    return failure


def _abort(context: grpc.ServicerContext, error: SidelightError) -> NoReturn:
    if error.retry_delay_s is not None:
        context.set_trailing_metadata(((RETRY_TRAILER, str(round(1e3 * error.retry_delay_s))),))
    context.abort(_STATUSES[error.code], error.message)
    raise AssertionError("abort always raises")
