"""A validated request: what `RequestHandler.validate` returns and `Execution` runs."""

from collections.abc import Callable
from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from ..domain import Answer, Request
from ..engine.registry.entry import Version
from ..telemetry.call_record import CallRecord
from ..wire.rendering import Rendering
from .shared_memory import Span

Encode = Callable[[Answer, "ValidatedRequest"], bytes]


@dataclass(slots=True)
class ValidatedRequest:
    """A validated request with its memory cost and its deadline."""

    message: pb.AttributeRequest
    request: Request
    version: Version  # of its model, as it was when the request arrived
    n_bytes: int  # that it takes from its admission until its answer is written
    waiting_bytes: int  # that it takes while it waits to be admitted: the message and what was parsed from it
    n_rows: int  # upper bound of the rows that it takes
    deadline_s: float | None  # on the event loop's clock
    source: Span | None  # where the images are, unless in the message
    sink: Span | None  # where the maps are written, unless in the answer
    rendering: Rendering | None  # how the maps are drawn, if they are
    call_record: CallRecord
    encode: Encode
    writes_regions: bool  # whether `encode` writes to shared memory, and so belongs in a worker thread

    @property
    def transport(self) -> pb.Transport.ValueType:
        """How the images and the final maps travel."""
        all_shared = self.sink is not None and self.source is not None
        return pb.TRANSPORT_SHARED_MEMORY if all_shared else pb.TRANSPORT_INLINE
