"""`AttributeStream`: batches, cancels and shared memory regions on one call. Answers are written when ready."""

import functools

from sidelight.v1 import attribution_pb2 as pb

from ...errors import InvalidArgument, SidelightError
from ...telemetry.call_record import CallRecord
from ...wire import responses
from ...wire.codec import Received
from ..request_handler import RequestHandler, deadline_of
from ..shared_memory import Regions
from ..validated_request import ValidatedRequest
from .batch import Unloaded
from .stream import Context, Stream, StreamOptions


class AttributionStream(Stream[pb.AttributeStreamRequest]):
    """One call of `AttributeStream`. Batches have ids of the caller's, by which it may cancel them."""

    call = "AttributeStream"

    def __init__(self, context: Context, handler: RequestHandler, options: StreamOptions, *, regions: Regions) -> None:
        super().__init__(context, handler, options)
        self._regions = regions

    def _close(self) -> None:
        self._regions.close()

    async def _receive(self, received: Received[pb.AttributeStreamRequest]) -> None:
        message = received.message
        match message.WhichOneof("request"):
            case "attribute":
                id_ = message.attribute.id
                fail = functools.partial(self._failed, id_)
                await self._begin(id_, received, functools.partial(self._validate, received), fail)
            case "cancel":
                if batch := self._unanswered.get(message.cancel.id):
                    batch.cancel()
            case "register_region":
                await self._register(message.register_region)
            case _:
                await self._refuse(InvalidArgument("request: unset; expected attribute, cancel or register_region"))

    async def _validate(
        self, received: Received[pb.AttributeStreamRequest], call_record: CallRecord
    ) -> ValidatedRequest | Unloaded:
        """Validate a batch, unless its model is not loaded yet."""
        request = received.message.attribute
        self._check_id(request.id)
        validate = functools.partial(
            self._handler.validate,
            request,
            n_bytes=received.n_bytes,
            data=received.data,
            regions=self._regions,
            call_record=call_record,
        )
        if self._handler.must_load(request):
            return Unloaded(validate, deadline_of(request, call_record))
        return await validate()

    def _check_id(self, id_: str) -> None:
        if not id_:
            raise InvalidArgument("id: empty; on a stream it is required, to match the answer")
        if id_ in self._unanswered:
            raise InvalidArgument(f'id: "{id_}" is used by a batch that is not answered yet')

    async def _register(self, request: pb.RegisterRegionRequest) -> None:
        try:
            if not request.id:
                raise InvalidArgument("id: empty; it is required, to match the answer")
            await self._regions.register(request.region, request.size_bytes)
        except SidelightError as error:
            await self._writer.write(self._failed(request.id, error))
            return
        registered = pb.RegionRegistered(region=request.region)
        response = pb.AttributeStreamResponse(id=request.id, region_registered=registered)
        await self._writer.write(response.SerializeToString())

    def _failed(self, id_: str, error: SidelightError) -> bytes:
        return pb.AttributeStreamResponse(id=id_, failure=responses.failure(error)).SerializeToString()
