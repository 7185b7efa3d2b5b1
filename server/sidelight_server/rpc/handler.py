"""The request handler: validates a message, admits it and answers it with the engine, for unary calls and streams."""

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..compute.torch_device import is_out_of_memory
from ..domain import MANY_EXAMPLES, Answer, Files, Request
from ..engine.engine import Engine, store_outcome
from ..engine.model_entry import Version
from ..engine.preparation_pool import to_thread_if_many
from ..engine.request_cost import BYTES_OF_FLOAT32, held_bytes, max_rows
from ..engine.submission import Submission
from ..errors import DeadlineExceeded, Internal, InvalidArgument, NotFound, ResourceExhausted, SidelightError
from ..telemetry.call_record import CallRecord
from ..telemetry.counters import Tally
from ..telemetry.logs import Event, Throttle
from ..telemetry.recorder import Telemetry
from ..wire import requests, responses
from ..wire.codec import encode_answer
from ..wire.digests import Hashing
from ..wire.tensors import encoded, layout_of, map_itemsize
from .admission import RETRY_DELAY_S, Admission, Permit
from .shared_memory import RegionLookup, Span, span, to_thread_uncancelled

log = logging.getLogger("sidelight")

WAITING_BYTES = 64 * 1024  # smaller messages of streams are not counted while they wait: there are two per stream
WAITING_SHARE = 4  # they may take max_in_flight_bytes divided by this
MAX_WAITING = 2**31  # by count there is no limit
# Larger maps are encoded in a worker thread. numpy, `bytes.join` and file I/O release the GIL there; protobuf never
# does, so messages are parsed on the event loop.
MANY_BYTES = 1024 * 1024


Encode = Callable[[Answer, "ValidatedRequest"], bytes]


@dataclass(frozen=True, slots=True)
class ValidatedRequest:
    """A validated request with its memory cost and its deadline."""

    message: pb.AttributeRequest
    request: Request
    version: Version  # of its model, as it was when the request arrived
    n_bytes: int
    n_rows: int  # upper bound of the rows that it takes
    deadline_s: float | None  # on the event loop's clock
    source: Span | None  # where the images are, unless in the message
    sink: Span | None  # where the maps are written, unless in the answer
    call_record: CallRecord
    encode: Encode

    @property
    def transport(self) -> pb.Transport.ValueType:
        """How the images and the final maps travel."""
        all_shared = self.sink is not None and self.source is not None
        return pb.TRANSPORT_SHARED_MEMORY if all_shared else pb.TRANSPORT_INLINE


class Progress:
    """Access to the partial answer of a request in progress. Used on the event loop."""

    def __init__(self) -> None:
        self.improved = asyncio.Event()  # set when a newer partial answer exists
        self.submission: Submission | None = None

    async def take(self) -> Answer | None:
        """Return the newest partial answer, once `improved` is set; None if the request has ended."""
        self.improved.clear()
        assert self.submission is not None  # noqa: S101
        return await self.submission.partial()


class RequestHandler:
    """Validates and answers messages with an engine, within the limits of `admission`."""

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
        # Messages of streams that were read and wait for a permit.
        self._waiting = Admission(
            max_requests=MAX_WAITING,
            max_bytes=max(settings.max_message_bytes, settings.max_in_flight_bytes // WAITING_SHARE),
        )

    @functools.cached_property
    def _model_admissions(self) -> dict[str, Admission]:
        """Admission by model, for models with `max_model_in_flight`. Lazy: the registry names its models at load."""
        return {
            name: Admission(max_requests=entry.settings.max_model_in_flight, max_bytes=math.inf, model=name)
            for name, entry in self._engine.registry.entries.items()
            if entry.settings.max_model_in_flight
        }

    def must_load(self, message: pb.AttributeRequest) -> bool:
        """Whether `validate` would have to wait for the message's model to load."""
        with contextlib.suppress(NotFound):  # `validate` raises it
            return not self._engine.registry.find(message.model).models
        return False

    async def validate(
        self,
        message: pb.AttributeRequest,
        *,
        n_bytes: int,
        call_record: CallRecord,
        data: memoryview | None = None,
        regions: RegionLookup | None = None,
        encode: Encode | None = None,
    ) -> ValidatedRequest:
        """Validate a message of `n_bytes`, waiting for its model to load if necessary.

        `data` holds the images' tensor data if the codec cut it out of the message; `regions` are the shared memory
        regions that it may name, None for a unary call of `sidelight.v1`. `encode` serializes the answer, by default
        for `sidelight.v1`. Raises a `SidelightError` if the message is invalid.
        """
        with _hide_internal_errors(message.id, self._faults):
            deadline_s = deadline_of(message, call_record)
            request = await _parsed(message, data)
            call_record.id = message.id
            parsed_bytes = n_bytes if data is None else 0
            version = await self._serving_version(request.model, n_bytes + parsed_bytes, deadline_s, call_record.caller)
            call_record.model, call_record.method = version[0].name, request.method.name
            answer_bytes, state_bytes = held_bytes(request, version[0])
            n_rows = max_rows(request, version[0])
            maps_bytes = answer_bytes * map_itemsize(message.output) // BYTES_OF_FLOAT32
            source = _source(message.images, regions)
            sink = _sink(message.output, maps_bytes, regions)
        # Parsing copies the message unless `data` was cut out; encoding copies the maps unless they go to a region.
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
            encode=encode or encode_own,
        )
        if validated.transport == pb.TRANSPORT_SHARED_MEMORY:
            call_record.transport = "shared_memory"
        return validated

    def wait(self, n_bytes: int, caller: str) -> contextlib.ExitStack:
        """Count a message that waits to be admitted, until the returned stack is closed.

        All waiting messages together may take a quarter of `max_in_flight_bytes`, and one caller its share of that.
        Raises `ResourceExhausted` for one too many.
        """
        with contextlib.ExitStack() as waiting:
            if n_bytes >= WAITING_BYTES:
                permit = self._waiting.take(n_bytes, caller)
                if permit is None:
                    raise ResourceExhausted(
                        f"{self._waiting.n_bytes} bytes of messages of streams wait for a permit "
                        "(at most a quarter of max_in_flight_bytes)",
                        retry_delay_s=RETRY_DELAY_S,
                    )
                waiting.callback(self._waiting.release, permit)
            return waiting.pop_all()

    def enter(self, validated: ValidatedRequest) -> contextlib.ExitStack:
        """Take a permit, released when the returned stack is closed. Raises `ResourceExhausted` if none is free."""
        with contextlib.ExitStack() as permit:
            for admission in self._admissions(validated):
                permit.enter_context(
                    admission.enter(validated.n_bytes, validated.call_record.caller, n_rows=validated.n_rows)
                )
            return permit.pop_all()

    async def admit(self, validated: ValidatedRequest) -> contextlib.ExitStack:
        """Wait for a permit and take it. It is released when the returned stack is closed."""
        with contextlib.ExitStack() as permit:
            for admission in self._admissions(validated):
                taken = admission.take(validated.n_bytes, validated.call_record.caller, n_rows=validated.n_rows)
                permit.callback(admission.release, taken or await self._acquire(admission, validated))
            return permit.pop_all()

    def _admissions(self, validated: ValidatedRequest) -> Iterator[Admission]:
        """Yield the admissions that apply; the model's own first, because a request waiting there must hold nothing."""
        if own := self._model_admissions.get(validated.version[0].name):
            yield own
        yield self.admission

    async def _acquire(self, admission: Admission, validated: ValidatedRequest) -> Permit:
        try:
            async with asyncio.timeout_at(validated.deadline_s):
                return await admission.acquire(validated.n_bytes, validated.call_record.caller, n_rows=validated.n_rows)
        except TimeoutError:
            raise DeadlineExceeded("timeout: it passed while the server was full") from None

    async def _serving_version(self, name: str, n_bytes: int, deadline_s: float | None, caller: str) -> Version:
        """Return the serving version of a model, loading a lazy model first.

        While it waits, the request holds a permit for `n_bytes`: loading may take minutes, and many messages may arrive
        in that time.
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
        """Return the encoded answer. Raises only `SidelightError`."""
        with _hide_internal_errors(validated.message.id, self._faults):
            answer = await self._answer(validated, progress)
            reply = await self._reply(answer, validated)
            tally = await to_thread_if_many(len(answer.explanations), Tally.of, answer)
        self.telemetry.answered(validated.call_record, answer, tally)
        return reply

    async def reply(self, answer: Answer, validated: ValidatedRequest) -> bytes:
        """Return an encoded answer, final or partial. Raises `SidelightError` if it cannot be sent."""
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
        validated.call_record.admitted_s = time.monotonic()
        request = await _fetched(validated)
        hashing = Hashing(request.images, dtype=_dtype(validated.message.images))
        try:
            return replace(await self._computed(request, validated, progress), example_digests=await hashing.digests())
        finally:
            hashing.cancel()

    async def _computed(self, request: Request, validated: ValidatedRequest, progress: Progress | None) -> Answer:
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        submission = self._engine.submit(
            request,
            functools.partial(store_outcome, answered),
            version=validated.version,
            on_improved=progress.improved.set if progress else None,
            call_record=validated.call_record,
        )
        if progress:
            progress.submission = submission
        try:
            return await answered
        finally:
            submission.cancel()

    async def _reply(self, answer: Answer, validated: ValidatedRequest) -> bytes:
        is_large = answer.maps.nbytes > MANY_BYTES or len(answer.explanations) > MANY_EXAMPLES
        blocks = is_large or (answer.final and validated.sink is not None)
        encode = validated.encode
        reply = await to_thread_uncancelled(encode, answer, validated) if blocks else encode(answer, validated)
        self._refuse_long_answer(len(reply))
        return reply

    def _refuse_long_answer(self, n_bytes: int) -> None:
        if n_bytes > self._limit_bytes:
            raise ResourceExhausted(
                f"the answer takes {n_bytes} bytes, the server's max_message_bytes is {self._limit_bytes}: "
                "send fewer examples"
            )


def deadline_of(message: pb.AttributeRequest, call_record: CallRecord) -> float | None:
    """Return the deadline that a message's `timeout` sets, on the event loop's clock; None without one.

    Raises `InvalidArgument` if the timeout is not positive.
    """
    timeout_s = requests.timeout_s(message)
    # The event loop's clock is `time.monotonic`.
    return None if timeout_s is None else call_record.arrived_s + timeout_s


def _source(images: tensor_pb2.Images, regions: RegionLookup | None) -> Span | None:
    if images.WhichOneof("source") != "shared":
        return None
    shared, field = images.shared, "images.shared"
    return _span(shared, layout_of(shared, field=field).n_bytes, regions, field=field)


def _sink(output: pb.Output, maps_bytes: int, regions: RegionLookup | None) -> Span | None:
    return _span(output.region, maps_bytes, regions, field="output.region") if output.HasField("region") else None


def _span(shared: tensor_pb2.SharedTensor, n_bytes: int, regions: RegionLookup | None, *, field: str) -> Span:
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
    """Return the request with its images, read from shared memory if they are there."""
    source, request = validated.source, validated.request
    if source is None or isinstance(request.images, Files):
        return request
    data = await to_thread_uncancelled(source.read)
    images = layout_of(validated.message.images.shared, field="images.shared").array(data)
    return replace(request, images=images.reshape(request.images.shape))


def encode_own(answer: Answer, validated: ValidatedRequest) -> bytes:
    """Encode the answer for `sidelight.v1`; write its maps into the output region if there is one."""
    message = validated.message
    maps = encoded(answer.maps, message.output.map_dtype or tensor_pb2.DATA_TYPE_FLOAT32)
    sink = validated.sink if answer.final else None
    if sink:
        sink.write(maps.data)
    result = responses.result(answer, transport=validated.transport if answer.final else pb.TRANSPORT_INLINE)
    return encode_answer(message.id, result, responses.provenance(answer, message), maps, is_inline=sink is None)


class _hide_internal_errors:  # noqa: N801  (named as contextlib's; `@contextmanager` costs more than the body here)
    """Context manager that logs an unexpected exception and raises `Internal` without its details instead."""

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
