"""A server whose streams follow a script, for responses that no real server sends, or not at the right moment."""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from sidelight._streaming.worker import BEGIN_HEADER
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, tensor_pb2

Script = Callable[[Iterator[pb.AttributeStreamRequest]], Iterable[pb.AttributeStreamResponse]]


class Ended(Exception):
    """Raised by a script to end its call with a status and trailers."""

    def __init__(self, status: grpc.StatusCode, details: str = "", trailers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(details)
        self.status, self.details, self.trailers = status, details, trailers


def nobody(requests: Iterator[pb.AttributeStreamRequest]) -> Iterable[pb.AttributeStreamResponse]:
    """Act as a proxy without a server: the call ends before it has begun."""
    raise NotImplementedError


def mute(requests: Iterator[pb.AttributeStreamRequest]) -> Iterable[pb.AttributeStreamResponse]:
    """Act as a server that is too busy to accept the call."""
    raise NotImplementedError


class Scripted(attribution_pb2_grpc.AttributionServiceServicer):
    """Answers the first call by the first script, and so on; every later one by the last."""

    def __init__(self, scripts: tuple[Script, ...], limits: pb.Limits, chunk_rows: int, refused: bool) -> None:
        self._scripts = itertools.chain(scripts[:-1], itertools.repeat(scripts[-1]))
        self._limits = limits
        self._refused = refused
        self._model = model_pb2.ModelInfo(
            name="m",
            chunk_rows=chunk_rows,
            state=model_pb2.MODEL_STATE_SERVING if chunk_rows else model_pb2.MODEL_STATE_UNLOADED,
        )

    def AttributeStream(  # noqa: N802
        self, request_iterator: Iterator[pb.AttributeStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttributeStreamResponse]:
        script = next(self._scripts)
        if script is nobody:
            context.abort(grpc.StatusCode.UNAVAILABLE, "no healthy upstream")
        if script is mute:
            list(request_iterator)
            return
        if not self._refused:
            context.send_initial_metadata(((BEGIN_HEADER, "1"),))
        try:
            yield from script(request_iterator)
        except Ended as ended:
            context.set_trailing_metadata(ended.trailers)
            if ended.status is not grpc.StatusCode.OK:
                context.abort(ended.status, ended.details)

    def Attribute(self, request: pb.AttributeRequest, context: grpc.ServicerContext) -> pb.AttributeResponse:  # noqa: N802
        try:
            response = next(iter(next(self._scripts)(iter([pb.AttributeStreamRequest(attribute=request)]))))
        except Ended as ended:
            context.set_trailing_metadata(ended.trailers)
            context.abort(ended.status, ended.details)
        return pb.AttributeResponse(result=response.result)

    def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(limits=self._limits, models=[self._model])


@contextlib.contextmanager
def scripted(
    *scripts: Script,
    max_message_bytes: int = 2**22,
    max_batch_examples: int = 0,
    chunk_rows: int = 8,
    refused: bool = False,
) -> Iterator[str]:
    """Run a server, and give its address. With chunks of 0 rows its model is not loaded yet.

    `refused` streams end before they have begun.
    """
    limits = pb.Limits(max_message_bytes=max_message_bytes, max_batch_examples=max_batch_examples)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads)
        attribution_pb2_grpc.add_AttributionServiceServicer_to_server(
            Scripted(scripts, limits, chunk_rows, refused), server
        )
        address = f"unix:{folder}/socket"
        server.add_insecure_port(address)
        server.start()
        try:
            yield address
        finally:
            server.stop(0).wait()


def answer(
    request: pb.AttributeStreamRequest, *, value: float = 0.0, final: bool = True, digest: str = "d"
) -> pb.AttributeStreamResponse:
    """Return an answer to a request for model-ready floats: maps of 2 × 2, filled with a number."""
    n = request.attribute.images.tensor.shape[0]
    maps = np.full((n, 2, 2), value, "<f4")
    result = pb.Attribution(
        maps=tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=maps.shape, data=maps.tobytes()),
        examples=[pb.Example(prediction=pb.Prediction(index=1), targets=[pb.ExplainedTarget(index=1)])] * n,
        provenance=pb.Provenance(model_digest=digest, method=request.attribute.method, target=request.attribute.target),
        timing=pb.Timing(),
        transport=pb.TRANSPORT_INLINE,
        final=final,
    )
    return pb.AttributeStreamResponse(id=request.attribute.id, result=result)


def failure(
    request: pb.AttributeStreamRequest, code: int, *, delay_s: float | None = None
) -> pb.AttributeStreamResponse:
    """Return the failure of a request."""
    failed = pb.Failure(code=code, message="as the script says")
    if delay_s is not None:
        failed.retry_delay.FromNanoseconds(int(delay_s * 1e9))
    return pb.AttributeStreamResponse(id=request.attribute.id, failure=failed)
