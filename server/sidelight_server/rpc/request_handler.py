"""The request handler, of unary calls and streams: validates a message, takes its permits and has it executed."""

import asyncio
import contextlib
import functools
import math
from collections.abc import Iterator

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..engine.engine import Engine
from ..engine.registry.entry import Version
from ..engine.request_cost import BYTES_OF_FLOAT32, cost_of
from ..engine.submission import Outcome, store_outcome
from ..errors import DeadlineExceeded, InvalidArgument, NotFound, ResourceExhausted
from ..telemetry.call_record import CallRecord
from ..telemetry.logs import Throttle
from ..telemetry.recorder import Telemetry
from ..wire import requests
from ..wire.rendering import parse_rendering
from ..wire.tensors import layout_of, map_itemsize
from .execution import Execution, check_length, encode_own
from .limits.admission import Admission
from .shared_memory import RegionLookup, Span, span
from .status import HideInternalErrors
from .validated_request import Encode, ValidatedRequest

WAITING_BYTES = 64 * 1024  # smaller messages of streams are not counted while they wait: there are two per stream
WAITING_SHARE = 4  # they may take max_in_flight_bytes divided by this
PARSED_EXAMPLE_BYTES = 64  # of Python objects, besides its own bytes
MAX_WAITING = 2**31  # their number is not limited
UNARY_WAIT_S = 0.5  # how long a unary call waits for permits
_NO_DEADLINE = contextlib.nullcontext()


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
        self._max_waiting_bytes = max(settings.max_message_bytes, settings.max_in_flight_bytes // WAITING_SHARE)
        # Messages that were read and wait for a permit.
        self._waiting = Admission(
            max_requests=MAX_WAITING,
            max_bytes=self._max_waiting_bytes,
            limits="messages that wait for a permit (at most a quarter of max_in_flight_bytes)",
        )

    @functools.cached_property
    def _model_admissions(self) -> dict[str, Admission]:
        """Admission by model, for models with `max_model_in_flight`. Lazy: the registry names its models at load."""
        return {
            name: Admission(
                max_requests=entry.settings.max_model_in_flight,
                max_bytes=math.inf,
                limits=f'requests of model "{name}" (max_model_in_flight)',
            )
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
        writes_regions: bool = False,
    ) -> ValidatedRequest:
        """Validate a message of `n_bytes`, waiting for its model to load if necessary.

        `data` holds the images' tensor data if the codec cut it out of the message; `regions` are the shared memory
        regions that it may name, None for a unary call of `sidelight.v1`. `encode` serializes the answer, by default
        for `sidelight.v1`; `writes_regions` says that it writes more than the maps to shared memory. Raises a
        `SidelightError` if the message is invalid.
        """
        with self.hide_internal_errors(message.id):
            deadline_s = deadline_of(message, call_record)
            parse = functools.partial(requests.parse, message, data)
            request = await asyncio.to_thread(parse) if requests.takes_long(message) else parse()
            call_record.id = message.id
            parsed_bytes = n_bytes if data is None else 0
            version = await self._serving_version(request.model, n_bytes + parsed_bytes, deadline_s, call_record.caller)
            call_record.model, call_record.method = version[0].name, request.method.name
            cost = cost_of(request, version[0])
            maps_bytes = cost.maps_bytes * map_itemsize(message.output) // BYTES_OF_FLOAT32
            source = _source(message.images, regions)
            sink = _sink(message.output, maps_bytes, regions)
            rendering, max_pixels = parse_rendering(message.output), self._engine.settings.max_rendered_pixels
            pictures_bytes = rendering.held_bytes(request, version[0], max_pixels=max_pixels) if rendering else 0
        # Parsing copies the message unless `data` was cut out; encoding copies the maps unless they go to a region.
        encoded_bytes = maps_bytes if sink is None else 0
        check_length(encoded_bytes, self._limit_bytes)
        validated = ValidatedRequest(
            message=message,
            request=request,
            version=version,
            n_bytes=n_bytes
            + parsed_bytes
            + (source.n_bytes if source else 0)
            + cost.maps_bytes
            + encoded_bytes
            + cost.state_bytes
            + pictures_bytes,
            waiting_bytes=n_bytes + parsed_bytes + request.n_examples * PARSED_EXAMPLE_BYTES,
            n_rows=cost.n_rows,
            deadline_s=deadline_s,
            source=source,
            sink=sink,
            rendering=rendering,
            call_record=call_record,
            encode=encode or encode_own,
            writes_regions=writes_regions or sink is not None,
        )
        if validated.transport == pb.TRANSPORT_SHARED_MEMORY:
            call_record.transport = "shared_memory"
        return validated

    def hide_internal_errors(self, id_: str) -> HideInternalErrors:
        """Return a context that logs an unexpected exception, and raises `Internal` without its details instead."""
        return HideInternalErrors(id_, self._faults)

    def acquire_waiting_permit(self, n_bytes: int, caller: str) -> contextlib.ExitStack:
        """Count a message that waits to be admitted and holds `n_bytes`, until the result is closed.

        All waiting messages together may take a quarter of `max_in_flight_bytes`, and one caller its share of that.
        Raises `ResourceExhausted` for one too many.
        """
        permits = contextlib.ExitStack()
        if n_bytes >= WAITING_BYTES:
            # A message that is held twice may take more than is allowed, and then is the only one that waits.
            permits.enter_context(self._waiting.acquired(min(n_bytes, self._max_waiting_bytes), caller))
        return permits

    async def acquire_permits(self, validated: ValidatedRequest) -> contextlib.ExitStack:
        """Wait for the permits of a request and acquire them, held until the result is closed."""
        with contextlib.ExitStack() as permits:
            for admission in self._admissions(validated):
                permit = await admission.acquire(
                    validated.n_bytes, validated.call_record.caller, n_rows=validated.n_rows
                )
                permits.callback(admission.release, permit)
            return permits.pop_all()

    async def acquire_unary_permits(self, validated: ValidatedRequest) -> contextlib.ExitStack:
        """Acquire the permits of a unary call, held until the result is closed.

        If none is free, the call waits for up to `UNARY_WAIT_S`, in turn with the batches of streams. Raises
        `ResourceExhausted`, with a retry delay unless the request can never fit, or `DeadlineExceeded`.
        """
        try:
            return self._acquire_permits_now(validated)
        except ResourceExhausted as error:
            if error.retry_delay_s is None:
                raise
        loop, deadline_s = asyncio.get_running_loop(), validated.deadline_s or math.inf
        # Small messages count, too: unlike those of streams, there may be any number of them.
        waiting = self.acquire_waiting_permit(max(validated.waiting_bytes, WAITING_BYTES), validated.call_record.caller)
        with waiting, contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(loop.time() + UNARY_WAIT_S, deadline_s)):
                return await self.acquire_permits(validated)
        if loop.time() >= deadline_s:
            raise DeadlineExceeded("timeout: it passed while the server was full")
        return self._acquire_permits_now(validated)

    def _acquire_permits_now(self, validated: ValidatedRequest) -> contextlib.ExitStack:
        with contextlib.ExitStack() as permits:
            for admission in self._admissions(validated):
                permit = admission.acquire_now(validated.n_bytes, validated.call_record.caller, n_rows=validated.n_rows)
                permits.callback(admission.release, permit)
            return permits.pop_all()

    def _admissions(self, validated: ValidatedRequest) -> Iterator[Admission]:
        """Yield the admissions that apply; the model's own first, because a request waiting there must hold nothing."""
        if own := self._model_admissions.get(validated.version[0].name):
            yield own
        yield self.admission

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
            with self.admission.acquired(n_bytes, caller):
                async with asyncio.timeout_at(deadline_s):
                    return await registry.ready(name)
        except TimeoutError:
            raise DeadlineExceeded(f'timeout: it passed while model "{entry.name}" was being loaded') from None

    def execution(self, validated: ValidatedRequest) -> Execution:
        """Return the execution of an admitted request, not started."""
        return Execution(validated, self._engine, self.telemetry, self._faults, limit_bytes=self._limit_bytes)

    async def explain(self, validated: ValidatedRequest) -> bytes:
        """Run an admitted request and return the encoded answer. Raises only `SidelightError`."""
        answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        execution, deadline_s = self.execution(validated), validated.deadline_s
        try:
            async with _NO_DEADLINE if deadline_s is None else asyncio.timeout_at(deadline_s):
                await execution.start(functools.partial(store_outcome, answered))
                outcome = await answered
            return await execution.reply(outcome)
        except TimeoutError:
            raise DeadlineExceeded("timeout: it passed; rows that had not run were dropped") from None
        finally:
            execution.cancel()


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
