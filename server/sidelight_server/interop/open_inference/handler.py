"""The handler of inference requests: translates a message and hands it to the `RequestHandler`."""

import asyncio
import contextlib

from ...engine.engine import Engine
from ...errors import InvalidArgument, NotFound
from ...rpc.execution import MANY_BYTES
from ...rpc.request_handler import RequestHandler
from ...rpc.shared_memory import span, to_thread_uncancelled
from ...rpc.validated_request import ValidatedRequest
from ...telemetry.call_record import CallRecord
from ...wire.codec import Received, decoder
from . import inference_pb2 as oip
from . import tensors
from .requests import InferRequest, Shared, translate
from .responses import encoder
from .shared_memory import CallerRegions, SystemSharedMemory

decode = decoder(oip.ModelInferRequest, (oip.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER,))


class InferHandler:
    """Validates inference requests, of unary calls and of streams."""

    def __init__(self, engine: Engine, handler: RequestHandler, shared: SystemSharedMemory) -> None:
        self._engine = engine
        self._handler = handler
        self._shared = shared

    async def validate(
        self, received: Received[oip.ModelInferRequest], call_record: CallRecord, *, on_stream: bool = False
    ) -> ValidatedRequest:
        """Validate a message. Raises a `SidelightError`, which names the field."""
        with self._handler.hide_internal_errors(received.message.id):
            return await self._validate(received, call_record, on_stream=on_stream)

    def check_version(self, name: str, version: str) -> None:
        """Raise `NotFound` for an unknown model, or a version other than the one that serves. Empty: that one."""
        models = self._engine.registry.find(name).models
        if version and models and version != str(models[0].version):
            raise NotFound(f'model_version: "{version[:32]}" is not served; version {models[0].version} is')

    async def _validate(
        self, received: Received[oip.ModelInferRequest], call_record: CallRecord, *, on_stream: bool
    ) -> ValidatedRequest:
        message, regions = received.message, self._shared.of(call_record.caller)
        self.check_version(message.model_name, message.model_version)
        copies = received.data is None or any(each.datatype == tensors.FILES for each in message.inputs)
        request = (
            await asyncio.to_thread(translate, message, received.data)
            if copies and received.n_bytes > MANY_BYTES
            else translate(message, received.data)
        )
        # `RequestHandler` counts a second copy of the message where there is no `data`.
        n_bytes = received.n_bytes * (2 if received.data is None and request.data is not None else 1)
        with contextlib.ExitStack() as waiting:
            if request.files:
                n_bytes += request.files.n_bytes
                waiting.enter_context(self._handler.acquire_waiting_permit(request.files.n_bytes, call_record.caller))
                request = await _read_files(request, request.files, regions)
            return await self._validated(request, n_bytes, call_record, regions, on_stream=on_stream)

    async def _validated(
        self,
        request: InferRequest,
        n_bytes: int,
        call_record: CallRecord,
        regions: CallerRegions,
        *,
        on_stream: bool,
    ) -> ValidatedRequest:
        validated = await self._handler.validate(
            request.message,
            n_bytes=n_bytes,
            data=request.data,
            call_record=call_record,
            regions=regions,
            encode=encoder(request, regions, on_stream=on_stream),
            writes_regions=any(each.shared for each in request.outputs),
        )
        if (images := request.images) and validated.source and images.n_bytes != validated.source.n_bytes:
            raise InvalidArgument(
                f"{images.field}.shared_memory_byte_size: {images.n_bytes}, but the tensor of this shape has "
                f"{validated.source.n_bytes}"
            )
        if (maps := request.maps) and validated.sink and maps.n_bytes < validated.sink.n_bytes:
            raise InvalidArgument(
                f"{maps.field}.shared_memory_byte_size: {maps.n_bytes}, the maps need {validated.sink.n_bytes}"
            )
        return validated


async def _read_files(request: InferRequest, files: Shared, regions: CallerRegions) -> InferRequest:
    at = span(regions.find(files.region, field=files.field), files.offset, files.n_bytes, field=files.field)
    return await to_thread_uncancelled(lambda: request.with_files(at.read()))
