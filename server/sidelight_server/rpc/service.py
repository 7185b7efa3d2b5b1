"""The gRPC servicers of `sidelight.v1`: AttributionService and ModelService."""

import asyncio
import time
from importlib import metadata
from typing import Any

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc

from ..engine.engine import Engine
from ..errors import DeadlineExceeded, Internal, PermissionDenied, ResourceExhausted, SidelightError, Unavailable
from ..security.authorization import Callers
from ..security.stream_limit import Peers
from ..wire import responses
from ..wire.codec import Decoded, Unreadable
from ..wire.methods import SERVED_METHODS
from ..wire.requests import MAX_EXAMPLES
from .handler import RequestHandler
from .receive_limit import Pace
from .shared_memory import Regions, SharedMemory
from .status import Context, abort
from .stream import Stream
from .write_timeout import WriteTimeout

DEADLINE_SLACK_S = 0.1
RAN_ERRORS = (DeadlineExceeded, Unavailable, Internal)  # of requests that may have run


class AttributionService(attribution_pb2_grpc.AttributionServiceServicer):
    """`sidelight.v1.AttributionService` on an engine. `MessageInterceptor` decodes and encodes its messages."""

    def __init__(
        self,
        engine: Engine,
        handler: RequestHandler,
        shared: SharedMemory | None,
        *,
        callers: Callers,
        write_timeout: WriteTimeout,
        pace: Pace,
    ) -> None:
        self._engine = engine
        self._handler = handler
        self._shared = shared
        self._streams: set[Stream] = set()
        self.n_shed = 0  # streams that were ended because memory was short
        self._callers = callers
        self._write_timeout = write_timeout
        self._pace = pace
        self._peers = Peers("streams (the server's max_peer_streams)", each=engine.settings.max_peer_streams)
        self._calls: set[asyncio.Task[Any]] = set()
        self._is_draining = False
        self._is_given_up = False

    @property
    def n_streams(self) -> int:
        """Number of open streams."""
        return len(self._streams)

    def end_waiting(self, waited_s: float) -> int:
        """End the streams that have waited longer than this for a message; return how many. Clients open new ones."""
        waiting = [stream for stream in self._streams if stream.waited_s > waited_s]
        for stream in waiting:
            stream.end("age")
        self.n_shed += len(waiting)
        return len(waiting)

    def drain(self) -> None:
        """Stop reading on every stream; batches that were read are still answered."""
        self._is_draining = True
        for stream in self._streams:
            stream.end("shutdown")

    def give_up(self) -> None:
        """Fail every unanswered request with `Unavailable`: the drain time has passed."""
        self._is_given_up = True
        for stream in list(self._streams):
            stream.give_up()
        for call in list(self._calls):
            call.cancel()

    # The generated base class is typed for plain messages; this handler takes a `Decoded` and returns encoded bytes.
    async def Attribute(  # type: ignore[override]  # noqa: N802
        self, received: Decoded[pb.AttributeRequest], context: Context
    ) -> bytes:
        """Explain one batch."""
        call = asyncio.current_task()
        assert call  # noqa: S101
        self._calls.add(call)
        telemetry = self._handler.telemetry
        call_record = telemetry.begin("Attribute", context.invocation_metadata, caller=self._callers.of(context))
        # Not `context.add_done_callback`: it would keep the context, and so the call, in a reference cycle.
        call.add_done_callback(lambda _: telemetry.end(call_record))
        try:
            if isinstance(received, Unreadable):
                raise received.error
            validated = await self._handler.validate(
                received.message, n_bytes=received.n_bytes, data=received.data, call_record=call_record
            )
            permit = self._handler.enter(validated)
            # gRPC runs the handler in this task and ends it after the answer is written, not when it is returned.
            call.add_done_callback(lambda _: permit.close())
            answer = await self._handler.explain(validated)
            call_record.writing_s = time.monotonic()
            self._write_timeout.expect(call_record.cut_off)
            return answer
        except SidelightError as error:
            telemetry.failed(call_record, error)
            if not isinstance(error, RAN_ERRORS):
                self._pace.refuse(call_record.caller, received.n_bytes)
            self._write_timeout.expect()
            await abort(context, error)
        except asyncio.CancelledError:
            if not self._is_given_up or context.cancelled():
                if _is_late(context):  # otherwise the client disconnected, which is the call record's default
                    telemetry.failed(call_record, DeadlineExceeded("the call's deadline passed"))
                raise
            call.uncancel()
            given_up = Unavailable("the server is shutting down, and its drain_s has passed")
            telemetry.failed(call_record, given_up)
            await abort(context, given_up)
        finally:
            self._calls.discard(call)

    # As above; also, it is typed for a handler that yields. Writing to the context allows answers out of order.
    async def AttributeStream(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> None:
        """Explain many batches on one stream."""
        settings = self._engine.settings
        stream = Stream(
            context,
            self._handler,
            Regions(self._shared),
            caller=self._callers.of(context),
            max_in_flight=settings.max_stream_in_flight,
            max_age_s=settings.max_stream_age_s,
            write_timeout=self._write_timeout,
            pace=self._pace,
            stalled_write_s=settings.stalled_write_s,
        )
        if self._is_draining:
            stream.end("shutdown")
        try:
            with self._peers.opens(context.peer()):
                self._streams.add(stream)
                await stream.run()
        except ResourceExhausted as error:
            self._handler.telemetry.refuse("AttributeStream", context.invocation_metadata, error)
            await abort(context, error)
        finally:
            self._streams.discard(stream)
            stream.release()

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """Return version, limits, methods and models."""
        settings, cancelled = self._engine.settings, self._engine.stops
        return pb.GetServerInfoResponse(
            version=metadata.version("sidelight"),
            limits=pb.Limits(
                max_message_bytes=settings.max_message_bytes,
                max_image_pixels=settings.max_image_pixels,
                max_in_flight=settings.max_in_flight,
                max_in_flight_bytes=settings.max_in_flight_bytes,
                max_stream_in_flight=settings.max_stream_in_flight,
                max_example_rows=settings.max_example_rows,
                max_batch_examples=MAX_EXAMPLES,
                max_stream_age=responses.duration(settings.max_stream_age_s) if settings.max_stream_age_s else None,
            ),
            methods=SERVED_METHODS,
            models=_models(self._engine),
            cancellations=pb.CancellationStats(
                count=cancelled.count,
                mean=responses.duration(cancelled.mean_s),
                longest=responses.duration(cancelled.longest_s),
            ),
            shared_memory=_shared_memory(self._shared) if self._shared else None,
        )


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """`sidelight.v1.ModelService` on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        """Return every model, without labels and layers."""
        return model_pb2.ListModelsResponse(models=_models(self._engine))

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        """Return one model with its labels and layers."""
        try:
            entry = self._engine.registry.find(request.name)
        except SidelightError as error:
            await abort(context, error)
        return model_pb2.GetModelResponse(model=responses.model_info(self._engine, entry, whole=True))

    async def ReloadModel(  # noqa: N802
        self, request: model_pb2.ReloadModelRequest, context: Context
    ) -> model_pb2.ReloadModelResponse:
        """Load a model again; answer once the new version serves."""
        try:
            if not self._engine.settings.allow_reload:
                raise PermissionDenied("ReloadModel: the operator of this server does not allow it (allow_reload)")
            entry = await self._engine.registry.reload(request.name)
        except SidelightError as error:
            await abort(context, error)
        return model_pb2.ReloadModelResponse(model=responses.model_info(self._engine, entry, whole=True))


def _is_late(context: Context) -> bool:
    """Whether a cancelled call had reached its deadline, give or take `DEADLINE_SLACK_S` between the two clocks."""
    left_s = context.time_remaining()
    return left_s is not None and left_s < DEADLINE_SLACK_S


def _models(engine: Engine) -> list[model_pb2.ModelInfo]:
    return [responses.model_info(engine, entry, whole=False) for entry in engine.registry.entries.values()]


def _shared_memory(shared: SharedMemory) -> pb.SharedMemory:
    return pb.SharedMemory(
        directory=str(shared.path),
        max_region_bytes=shared.max_region_bytes,
        max_stream_regions=shared.max_stream_regions,
    )
