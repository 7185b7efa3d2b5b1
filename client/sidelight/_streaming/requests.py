"""A stream's configuration, and the conversion of its parts to requests and back."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.images import EncodedBatch
from .._inputs.tensors import Array, array_of
from .._options import Headers, duration
from .._transport.channel import Connection
from .._transport.shared_memory import Regions
from .._transport.wire import Incoming, Outgoing, is_large
from ..exceptions import from_code
from ..results.attribution import Attribution, failed
from ..results.messages import read_answer
from ..results.types import seconds
from .scheduling.parts import Part

_SHORTEST_S = 0.001  # the server rejects a timeout of 0


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """Options of all batches of a stream, and its timeouts, limits and retries."""

    template: pb.AttributeRequest  # the request without id, images and remaining time
    split: Callable[[EncodedBatch], Sequence[range]]  # the ranges of examples into which a batch is split
    map_bytes: Callable[[EncodedBatch], int]  # the size of a batch's maps
    timeout_s: float
    server_wait_s: float  # how long to wait for a server while no batch is unanswered
    max_message_bytes: int
    allow_model_change: bool
    baseline: Array | None  # the array given with the method, if any
    retry: bool = True  # whether unanswered parts are sent again
    metadata: Headers = ()  # of each call
    make_regions: Callable[[Connection], Regions] | None = None  # creates a call's shared memory

    def shared_bytes(self, batch: EncodedBatch) -> int:
        """Return the bytes that a batch and its maps take in shared memory. Encoded files travel in the message."""
        return _array_bytes(batch) + self.map_bytes(batch)

    def request(self, part: Part, regions: Regions | None) -> Outgoing:
        """Return a part's message. With shared memory, the part's array is written there."""
        array = part.batch.array
        message = pb.AttributeStreamRequest()
        request = message.attribute
        request.CopyFrom(self.template)
        request.id = part.id
        if regions and len(part.batch):
            regions.write(part.id, array, request)
        apart = array is not None and is_large(array) and not request.images.HasField("shared")
        if not apart and not request.images.HasField("shared"):
            request.images.CopyFrom(part.batch.message)
        part.batch.set_options(request)
        if part.batch.target is None and request.target.WhichOneof("target") == "per_example":
            # A stream's last batch may be shorter than the list.
            classes = request.target.per_example.classes
            del classes[part.start + len(part.batch) :], classes[: part.start]
        request.timeout.CopyFrom(duration(max(_SHORTEST_S, part.entry.deadline_s - time.monotonic())))
        return Outgoing(message, array if apart else None)

    def answer(self, incoming: Incoming, part: Part, regions: Regions | None) -> Attribution:
        """Return a part's answer, final or not, or its failure."""
        response = incoming.message
        index, id_, result = part.entry.index, part.entry.id, response.result
        if response.WhichOneof("outcome") == "result":
            maps = None
            if incoming.maps is not None:
                maps = array_of(result.maps, incoming.maps)
            elif regions and regions.has_part(part.id) and not result.maps.data:
                maps = regions.read(part.id, result.maps, skip=_array_bytes(part.batch))
            return read_answer(result, part.batch, index=index, baseline=self.baseline, maps=maps)
        failure = response.failure
        delay_s = seconds(failure.retry_delay) if failure.HasField("retry_delay") else None
        return failed(from_code(failure.code, failure.message, retry_delay_s=delay_s), index=index, id_=id_)


def _array_bytes(batch: EncodedBatch) -> int:
    return 0 if batch.array is None else batch.array.nbytes
