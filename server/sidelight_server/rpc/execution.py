"""The execution of an admitted request: reads its images, submits it to the engine, encodes its answer."""

import time
from collections.abc import Callable
from dataclasses import replace

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..domain import MANY_EXAMPLES, Answer, Array, Files, Request
from ..engine.engine import Engine
from ..engine.preparation.pool import to_thread_if_many
from ..engine.submission import OnDone, Outcome, Submission
from ..errors import ResourceExhausted
from ..telemetry.counters import Tally
from ..telemetry.logs import Throttle
from ..telemetry.recorder import Telemetry
from ..wire import responses
from ..wire.codec import encode_answer
from ..wire.digests import Hashing
from ..wire.rendering import with_pictures
from ..wire.tensors import encoded, layout_of
from .shared_memory import to_thread_uncancelled
from .status import HideInternalErrors
from .validated_request import ValidatedRequest

# Larger maps are encoded in a worker thread. numpy, `bytes.join` and file I/O release the GIL there; protobuf never
# does, so messages are parsed on the event loop. To join 8 MiB takes 0.3 ms.
MANY_BYTES = 8 * 1024 * 1024


class Execution:
    """The execution of one validated request. Used on the event loop.

    `start` and `reply` wait for nothing unless the request is large, its images are in shared memory, or its maps are
    drawn.
    """

    def __init__(
        self, validated: ValidatedRequest, engine: Engine, telemetry: Telemetry, faults: Throttle, *, limit_bytes: int
    ) -> None:
        """`limit_bytes` limits the encoded answer."""
        self._validated = validated
        self._engine = engine
        self._telemetry = telemetry
        self._faults = faults
        self._limit_bytes = limit_bytes
        self._hashing: Hashing | None = None
        self._images: Files | Array | None = None  # kept for drawing
        self._submission: Submission | None = None

    async def start(self, on_done: OnDone, on_improved: Callable[[], None] | None = None) -> None:
        """Submit the request: see `Engine.submit`. Raises only `SidelightError`."""
        validated = self._validated
        validated.call_record.admitted_s = time.monotonic()
        with self._hiding():
            request = await _fetch(validated)
            self._hashing = Hashing(request.images, dtype=_dtype(validated.message.images))
            self._images = request.images if validated.rendering else None
            self._submission = self._engine.submit(
                request,
                on_done,
                version=validated.version,
                on_improved=on_improved,
                call_record=validated.call_record,
            )

    async def reply(self, outcome: Outcome) -> bytes:
        """Return the encoded answer. Raises only `SidelightError`: of the outcome, or if it cannot be sent."""
        with self._hiding():
            if isinstance(outcome, Exception):
                raise outcome
            assert self._hashing is not None  # noqa: S101
            outcome.example_digests = await self._hashing.digests()
            answer = await self._draw(outcome)
            reply = await self._encode(answer)
            tally = await to_thread_if_many(len(answer.explanations), Tally.of, answer)
        self._telemetry.answered(self._validated.call_record, answer, tally)
        return reply

    async def partial(self) -> bytes | None:
        """Return the encoded answer so far; None if the request has ended. Raises only `SidelightError`."""
        with self._hiding():
            answer = await self._submission.partial() if self._submission else None
            return None if answer is None else await self._encode(answer)

    def cancel(self) -> None:
        """Drop the rows that have not run. No effect once the request is answered."""
        if self._submission:
            self._submission.cancel()
        if self._hashing:
            self._hashing.cancel()

    def _hiding(self) -> HideInternalErrors:
        return HideInternalErrors(self._validated.message.id, self._faults)

    async def _draw(self, answer: Answer) -> Answer:
        validated = self._validated
        if validated.rendering is None or self._images is None:
            return answer
        return await with_pictures(
            answer,
            self._images,
            validated.rendering,
            engine=self._engine,
            model=validated.version[0],
            caller=validated.call_record.caller,
        )

    async def _encode(self, answer: Answer) -> bytes:
        validated = self._validated
        is_large = answer.maps.nbytes > MANY_BYTES or len(answer.explanations) > MANY_EXAMPLES
        blocks = is_large or (answer.final and validated.writes_regions)
        encode = validated.encode
        reply = await to_thread_uncancelled(encode, answer, validated) if blocks else encode(answer, validated)
        check_length(len(reply), self._limit_bytes)
        return reply


def check_length(n_bytes: int, limit_bytes: int) -> None:
    """Raise `ResourceExhausted` if an answer is longer than a message may be."""
    if n_bytes > limit_bytes:
        raise ResourceExhausted(
            f"the answer takes {n_bytes} bytes, the server's max_message_bytes is {limit_bytes}: send fewer examples"
        )


def encode_own(answer: Answer, validated: ValidatedRequest) -> bytes:
    """Encode the answer for `sidelight.v1`; write its maps into the output region if there is one."""
    message = validated.message
    maps = encoded(answer.maps, message.output.map_dtype or tensor_pb2.DATA_TYPE_FLOAT32)
    sink = validated.sink if answer.final else None
    if sink:
        sink.write(maps.data)
    result = responses.result(answer, transport=validated.transport if answer.final else pb.TRANSPORT_INLINE)
    return encode_answer(message.id, result, responses.provenance(answer, message), maps, is_inline=sink is None)


def _dtype(images: tensor_pb2.Images) -> tensor_pb2.DataType.ValueType:
    return images.shared.dtype if images.WhichOneof("source") == "shared" else images.tensor.dtype


async def _fetch(validated: ValidatedRequest) -> Request:
    """Return the request with its images, read from shared memory if they are there."""
    source, request = validated.source, validated.request
    if source is None or isinstance(request.images, Files):
        return request
    data = await to_thread_uncancelled(source.read)
    images = layout_of(validated.message.images.shared, field="images.shared").array(data)
    return replace(request, images=images.reshape(request.images.shape))
