"""The request handler: validates one message and has the engine answer it, for unary calls and streams alike."""

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..compute.torch_device import is_out_of_memory
from ..domain import MANY_EXAMPLES, Answer, Files, Request
from ..engine.engine import BYTES_OF_FLOAT32, Engine, Progress, apart_if_many
from ..engine.registry import Version
from ..errors import DeadlineExceeded, Internal, InvalidArgument, NotFound, ResourceExhausted, SidelightError
from ..telemetry.call_record import CallRecord
from ..telemetry.counters import Tally
from ..telemetry.logs import Event, Throttle
from ..telemetry.recorder import Telemetry
from ..wire import requests, responses
from ..wire.codec import encode_answer
from ..wire.digests import Hashing
from ..wire.tensors import encoded, layout_of, map_itemsize
from .admission import Admission, Permit
from .shared_memory import Regions, Span, span, undisturbed

log = logging.getLogger("sidelight")

# Maps of more are encoded in a worker thread. numpy, the join of large parts and the file system let go of the
# interpreter meanwhile; protobuf never does, so bytes become a message on the event loop.
MANY_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ValidatedRequest:
    """A validated request with its memory cost and its deadline."""

    message: pb.AttributeRequest
    request: Request
    version: Version  # of its model: that which served when it came
    n_bytes: int
    n_rows: int  # that it may take, at most
    deadline_s: float | None  # on the event loop's clock
    source: Span | None  # where the images are, if not in the message
    sink: Span | None  # where the maps go, if not into the answer
    call_record: CallRecord

    @property
    def transport(self) -> pb.Transport.ValueType:
        """How the tensors of the final answer and its images travel."""
        all_shared = self.sink is not None and self.source is not None
        return pb.TRANSPORT_SHARED_MEMORY if all_shared else pb.TRANSPORT_INLINE


class RequestHandler:
    """Answers messages on an engine, within the permits of `admission`."""

    def __init__(self, engine: Engine, telemetry: Telemetry | None = None) -> None:
        settings = engine.settings
        self._engine = engine
        self.telemetry = telemetry or Telemetry()
        self._faults = Throttle()
        self._limit_bytes = settings.max_message_bytes
        self.admission = Admission(
            max_requests=settings.max_in_flight,
            max_bytes=settings.max_in_flight_bytes,
            max_caller_rows=settings.max_caller_rows,
        )

    @functools.cached_property
    def _of_models(self) -> dict[str, Admission]:
        """The permits of models with a limit of their own. Not before the models have their names."""
        return {
            name: Admission(max_requests=entry.settings.max_model_in_flight, max_bytes=math.inf, model=name)
            for name, entry in self._engine.registry.entries.items()
            if entry.settings.max_model_in_flight
        }

    def must_load(self, message: pb.AttributeRequest) -> bool:
        """Whether the model of a message is not loaded yet, so that `validate` would wait for it."""
        with contextlib.suppress(NotFound):  # which `validate` tells
            return not self._engine.registry.find(message.model).models
        return False

    async def validate(
        self,
        message: pb.AttributeRequest,
        *,
        n_bytes: int,
        call_record: CallRecord,
        data: memoryview | None = None,
        regions: Regions | None = None,
    ) -> ValidatedRequest:
        """Check a message that took so many bytes; its tensor's data may stand beside it. Its model may be loaded yet.

        A `SidelightError` says what is wrong with it. `regions` are those of its stream.
        """
        with _hide_internal_errors(message.id, self._faults):
            deadline_s = deadline_of(message, call_record)
            request = await _parsed(message, data)
            call_record.id = message.id
            parsed_bytes = n_bytes if data is None else 0
            version = await self._ready(request.model, n_bytes + parsed_bytes, deadline_s, call_record.caller)
            call_record.model, call_record.method = version[0].name, request.method.name
            answer_bytes, state_bytes = self._engine.held_bytes(request, version)
            n_rows = self._engine.most_rows(request, version)
            maps_bytes = answer_bytes * map_itemsize(message.output) // BYTES_OF_FLOAT32
            source = _source(message.images, regions)
            sink = _sink(message.output, maps_bytes, regions)
        # What is parsed is a copy of the message, and what is sent one of the maps, if they go that way.
        encoded_bytes = maps_bytes if sink is None else 0
        self._refuse_long_answer(encoded_bytes)
        validated = ValidatedRequest(
            message=message,
            request=request,
            version=version,
            n_bytes=n_bytes
            + parsed_bytes
            + (source.n_bytes if source else 0)
            + answer_bytes
            + encoded_bytes
            + state_bytes,
            n_rows=n_rows,
            deadline_s=deadline_s,
            source=source,
            sink=sink,
            call_record=call_record,
        )
        if validated.transport == pb.TRANSPORT_SHARED_MEMORY:
            call_record.transport = "shared_memory"
        return validated

    def enter(self, validated: ValidatedRequest) -> contextlib.ExitStack:
        """Take a permit, which is given back when it is closed. `ResourceExhausted` where there is none now."""
        with contextlib.ExitStack() as permit:
            for admission in self._admissions(validated):
                permit.enter_context(
                    admission.enter(validated.n_bytes, validated.call_record.caller, n_rows=validated.n_rows)
                )
            return permit.pop_all()

    async def admit(self, validated: ValidatedRequest) -> contextlib.ExitStack:
        """Wait for a permit and take it. It is given back when it is closed."""
        with contextlib.ExitStack() as permit:
            for admission in self._admissions(validated):
                taken = admission.take(validated.n_bytes, validated.call_record.caller, n_rows=validated.n_rows)
                permit.callback(admission.release, taken or await self._waited(admission, validated))
            return permit.pop_all()

    def _admissions(self, validated: ValidatedRequest) -> Iterator[Admission]:
        """Yield those whose permits a request needs; the model's own first, for who waits there must hold nothing."""
        if own := self._of_models.get(validated.version[0].name):
            yield own
        yield self.admission

    async def _waited(self, admission: Admission, validated: ValidatedRequest) -> Permit:
        try:
            async with asyncio.timeout_at(validated.deadline_s):
                return await admission.acquire(validated.n_bytes, validated.call_record.caller, n_rows=validated.n_rows)
        except TimeoutError:
            raise DeadlineExceeded("timeout: it passed while the server was full") from None

    async def _ready(self, name: str, n_bytes: int, deadline_s: float | None, caller: str) -> Version:
        """Return the version of a model that serves, after waiting for it where it is loaded when first asked for.

        What waits holds a permit for so many bytes: loading may take minutes, and many messages may come meanwhile.
        """
        registry = self._engine.registry
        entry = registry.find(name)
        if entry.models:
            return entry.models
        try:
            with self.admission.enter(n_bytes, caller):
                async with asyncio.timeout_at(deadline_s):
                    return await registry.ready(name)
        except TimeoutError:
            raise DeadlineExceeded(f'timeout: it passed while model "{entry.name}" was being loaded') from None

    async def explain(self, validated: ValidatedRequest, progress: Progress | None = None) -> bytes:
        """Return the answer's message. Nothing but a `SidelightError` says why there is none."""
        with _hide_internal_errors(validated.message.id, self._faults):
            answer = await self._answer(validated, progress)
            reply = await self._reply(answer, validated)
            tally = await apart_if_many(len(answer.explanations), Tally.of, answer)
        self.telemetry.answered(validated.call_record, answer, tally)
        return reply

    async def reply(self, answer: Answer, validated: ValidatedRequest) -> bytes:
        """Return the message of an answer, which may not be final. `SidelightError` where it cannot be sent."""
        with _hide_internal_errors(validated.message.id, self._faults):
            return await self._reply(answer, validated)

    async def _answer(self, validated: ValidatedRequest, progress: Progress | None) -> Answer:
        if validated.deadline_s is None:
            return await self._explained(validated, progress)
        try:
            async with asyncio.timeout_at(validated.deadline_s):
                return await self._explained(validated, progress)
        except TimeoutError:
            raise DeadlineExceeded("timeout: it passed; rows that had not run were dropped") from None

    async def _explained(self, validated: ValidatedRequest, progress: Progress | None) -> Answer:
        call_record = validated.call_record
        call_record.admitted_s = time.monotonic()
        request = await _fetched(validated)
        hashing = Hashing(request.images, dtype=_dtype(validated.message.images))
        try:
            answer = await self._engine.attribute(request, progress, validated.version, call_record)
            return replace(answer, example_digests=await hashing.digests())
        finally:
            hashing.cancel()

    async def _reply(self, answer: Answer, validated: ValidatedRequest) -> bytes:
        is_large = answer.maps.nbytes > MANY_BYTES or len(answer.explanations) > MANY_EXAMPLES
        blocks = is_large or (answer.final and validated.sink is not None)
        reply = await undisturbed(_encode, answer, validated) if blocks else _encode(answer, validated)
        self._refuse_long_answer(len(reply))
        return reply

    def _refuse_long_answer(self, n_bytes: int) -> None:
        if n_bytes > self._limit_bytes:
            raise ResourceExhausted(
                f"the answer takes {n_bytes} bytes, the server's max_message_bytes is {self._limit_bytes}: "
                "send fewer examples"
            )


def deadline_of(message: pb.AttributeRequest, call_record: CallRecord) -> float | None:
    """Return when a message's own time is over, on the event loop's clock. `InvalidArgument` where it says nonsense."""
    timeout_s = requests.timeout_s(message)
    # The loop's clock is the monotonic one.
    return None if timeout_s is None else call_record.arrived_s + timeout_s


def _source(images: tensor_pb2.Images, regions: Regions | None) -> Span | None:
    if images.WhichOneof("source") != "shared":
        return None
    shared, field = images.shared, "images.shared"
    return _span(shared, layout_of(shared, field=field).n_bytes, regions, field=field)


def _sink(output: pb.Output, maps_bytes: int, regions: Regions | None) -> Span | None:
    return _span(output.region, maps_bytes, regions, field="output.region") if output.HasField("region") else None


def _span(shared: tensor_pb2.SharedTensor, n_bytes: int, regions: Regions | None, *, field: str) -> Span:
    if regions is None:
        raise InvalidArgument(f"{field}: regions of shared memory belong to streams; a unary call has none")
    return span(regions.find(shared.region, field=field), shared.offset_bytes, n_bytes, field=field)


def _dtype(images: tensor_pb2.Images) -> tensor_pb2.DataType.ValueType:
    return images.shared.dtype if images.WhichOneof("source") == "shared" else images.tensor.dtype


async def _parsed(message: pb.AttributeRequest, data: memoryview | None) -> Request:
    return (
        await asyncio.to_thread(requests.parse, message, data)
        if requests.takes_long(message)
        else requests.parse(message, data)
    )


async def _fetched(validated: ValidatedRequest) -> Request:
    """Return the request with its images, wherever they lie."""
    source, request = validated.source, validated.request
    if source is None or isinstance(request.images, Files):
        return request
    data = await undisturbed(source.read)
    images = layout_of(validated.message.images.shared, field="images.shared").array(data)
    return replace(request, images=images.reshape(request.images.shape))


def _encode(answer: Answer, validated: ValidatedRequest) -> bytes:
    """Return the answer's message; where its maps go elsewhere, write them there."""
    message = validated.message
    maps = encoded(answer.maps, message.output.map_dtype or tensor_pb2.DATA_TYPE_FLOAT32)
    sink = validated.sink if answer.final else None
    if sink:
        sink.write(maps.data)
    result = responses.result(answer, transport=validated.transport if answer.final else pb.TRANSPORT_INLINE)
    return encode_answer(message.id, result, responses.provenance(answer, message), maps, is_inline=sink is None)


class _hide_internal_errors:  # noqa: N801  (as contextlib has them; its own generators take longer than all that is done here)
    """Let nothing but a `SidelightError` out. Of anything else the log has the cause, and the caller no details."""

    def __init__(self, id_: str, faults: Throttle) -> None:
        self._id = id_
        self._faults = faults

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, SidelightError):
            return
        if is_out_of_memory(error):
            self._faults.log(logging.WARNING, Event("out_of_host_memory", id=self._id))
            raise ResourceExhausted(
                "the server has no memory for the batch now; send it later, or fewer examples"
            ) from error
        self._faults.log(logging.ERROR, Event("unexpected", id=self._id), error)
        raise Internal("the server failed; its log has the cause") from error
