"""A stream's configuration: the options of every batch, and how its parts become requests."""

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
from ..results import attribution
from ..results.attribution import Attribution
from ..results.types import seconds
from .unanswered import Part

_SHORTEST_S = 0.001  # a time of 0 would be refused


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """What is asked of every batch, and how far the client goes to have it answered."""

    template: pb.AttributeRequest  # all of a request but id, images and what is left of its time
    spans: Callable[[EncodedBatch], Sequence[range]]  # the parts in which a batch is sent
    map_bytes: Callable[[EncodedBatch], int]  # how many bytes a batch's maps take
    timeout_s: float
    patience_s: float  # how long there may be no server while nothing is unanswered
    max_message_bytes: int
    allow_model_change: bool
    baseline: Array | None  # that was given with the method
    retry: bool = True  # whether what was not answered is sent again
    metadata: Headers = ()  # that each call brings
    make_regions: Callable[[Connection], Regions] | None = None  # makes a call's regions of shared memory

    def shared_bytes(self, batch: EncodedBatch) -> int:
        """Return how many bytes a batch and its maps take in shared memory: files travel inside their messages."""
        return _array_bytes(batch) + self.map_bytes(batch)

    def request(self, part: Part, regions: Regions | None) -> Outgoing:
        """Return a part's message, its array written into its place in shared memory where there is any."""
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
        if served := part.batch.served:
            request.served.CopyFrom(served)
        if part.batch.target is not None:
            request.target.CopyFrom(part.batch.target)
        elif request.target.WhichOneof("target") == "per_example":  # a stream's last batch may be shorter than the list
            classes = request.target.per_example.classes
            del classes[part.start + len(part.batch) :], classes[: part.start]
        request.timeout.CopyFrom(duration(max(_SHORTEST_S, part.entry.deadline_s - time.monotonic())))
        return Outgoing(message, array if apart else None)

    def answer(self, incoming: Incoming, part: Part, regions: Regions | None) -> Attribution:
        """Return a part's answer, which may not be final, or its failure."""
        response = incoming.message
        index, id_, result = part.entry.index, part.entry.id, response.result
        if response.WhichOneof("outcome") == "result":
            maps = None
            if incoming.maps is not None:
                maps = array_of(result.maps, incoming.maps)
            elif regions and regions.has(part.id) and not result.maps.data:
                maps = regions.read(part.id, result.maps, skip=_array_bytes(part.batch))
            return attribution.read(result, part.batch, index=index, baseline=self.baseline, maps=maps)
        failure = response.failure
        delay_s = seconds(failure.retry_delay) if failure.HasField("retry_delay") else None
        return attribution.failed(from_code(failure.code, failure.message, retry_delay_s=delay_s), index=index, id_=id_)


def _array_bytes(batch: EncodedBatch) -> int:
    return 0 if batch.array is None else batch.array.nbytes
