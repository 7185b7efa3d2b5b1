"""`ModelStreamInfer`: many requests on one call. An error is text in its response and does not end the stream."""

import functools
import itertools

import grpc

from ...errors import SidelightError
from ...rpc.request_handler import RequestHandler
from ...rpc.streaming.stream import Context, Stream, StreamOptions
from ...wire.codec import Received
from . import inference_pb2 as oip
from .handler import InferHandler
from .responses import failed


class InferStream(Stream[oip.ModelInferRequest]):
    """One call of `ModelStreamInfer`.

    Its answers keep the order of the requests, as Triton's do: ids are optional in this protocol, and errors reach the
    callers of its clients without one.
    """

    call = "ModelStreamInfer"
    is_ordered = True

    def __init__(
        self, context: Context, handler: RequestHandler, options: StreamOptions, *, infer_handler: InferHandler
    ) -> None:
        super().__init__(context, handler, options)
        self._infer_handler = infer_handler
        self._numbers = itertools.count()

    async def _receive(self, received: Received[oip.ModelInferRequest]) -> None:
        await self._begin(
            str(next(self._numbers)),
            received,
            functools.partial(self._infer_handler.validate, received, on_stream=True),
            functools.partial(failed, received.message),
        )

    async def _send_age_status(self, trailers: tuple[tuple[str, str], ...]) -> None:
        # After OK, a client of Triton would continue to send requests, which nothing reads.
        message = "the stream has reached its maximum age (the server's max_stream_age_s); start another"
        await self._context.abort(grpc.StatusCode.UNAVAILABLE, message, trailers)

    def _failed(self, id_: str, error: SidelightError) -> bytes:
        return failed(None, error)
