"""The stream: many batches in flight, to all servers at once, whatever becomes of one of them.

The caller's batches are read by whichever thread of gRPC's has nothing to send and room for more; each server has a
lane, whose thread takes answers in; a keeper sees to it that no batch waits longer than its time; the caller takes the
answers out. What they share is the ledger, under one lock, and the inbox.
"""

import enum
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from . import _attribution
from ._attribution import Attribution
from ._connection import Connection
from ._errors import (
    DeadlineExceeded,
    InvalidArgument,
    ModelChanged,
    ResourceExhausted,
    ServerDied,
    SidelightError,
    Unavailable,
    from_code,
)
from ._images import Batch, Images
from ._inbox import End, Inbox
from ._join import join
from ._lane import Lane
from ._ledger import Entry, Ledger, Part
from ._question import duration
from ._shared_memory import Regions
from ._tensor import Array
from ._types import seconds

log = logging.getLogger("sidelight")

SILENT_WAIT_S = 1.0
UNAVAILABLE_DELAY_S = 0.1  # before a batch is sent again that a server refused on its way out
_SHORTEST_S = 0.001  # a time of 0 would be refused


class Step(enum.Enum):
    """What a thread of gRPC's does where it has no part to send."""

    READ = "the caller's next batch"
    REGISTER = "a region of shared memory"
    END = "the call"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of every batch, and how far the client goes to have it answered."""

    template: pb.AttributeRequest
    spans: Callable[[Batch], Sequence[range]]  # the parts in which a batch is sent
    timeout_s: float
    patience_s: float  # how long there may be no server while nothing is unanswered
    max_message_bytes: int
    allow_model_change: bool
    baseline: Array | None  # that was given with the method
    map_bytes: Callable[[Batch], int]  # how many bytes a batch's maps take
    share: Callable[[Connection], Regions] | None = None  # makes a call's regions of shared memory


class Stream:
    """The desk between a caller and the lanes. `end` is final: the first word counts."""

    def __init__(
        self,
        connections: Sequence[Connection],
        batches: Iterator[Images | Batch],
        *,
        plan: Plan,
        ledger: Ledger,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.inbox = Inbox(on_change=on_change)
        self._batches = batches
        self._plan = plan
        self._ledger = ledger
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._keep = threading.Condition(self._lock)  # what wakes the keeper: few things, and rarely
        self._lanes = [
            Lane(each, self, max_message_bytes=plan.max_message_bytes, share=plan.share) for each in connections
        ]
        self._live: set[Lane] = set()
        self._deserted_s = time.monotonic()  # since when no server has a call
        self._cause: SidelightError | None = None  # why the last call ended
        self._digest = ""
        self._n_read = 0
        self._is_reading = False
        self._is_over = False
        self._keeper = threading.Thread(target=self._watch, name="sidelight-keep", daemon=True)

    def start(self) -> None:
        """Begin to read, send and receive."""
        for lane in self._lanes:
            lane.connection.listen(self._wake)
            lane.start()
        self._keeper.start()

    def close(self) -> None:
        """End it, cancel what is unanswered, and wait for its threads."""
        self.end(None)
        for lane in self._lanes:
            lane.cut()
        for lane in self._lanes:
            lane.join()
            lane.connection.unlisten(self._wake)
        self._keeper.join()

    def taken(self, entry: Entry) -> None:
        """Free the room of an answer that the caller has taken."""
        with self._lock:
            self._ledger.taken(entry)
            self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """End the stream: with an error, or because nothing is left."""
        with self._lock:
            self._end(error)

    # What the lanes ask for and tell.

    def wait_for(self, connection: Connection, not_before_s: float) -> bool:
        """Wait for a server, and for a time. False once the stream is over."""
        sought: object = self  # the state in which the channel was told to look for its server
        with self._lock:
            while not self._is_over:
                left_s, state = not_before_s - time.monotonic(), connection.state
                if connection.is_closed:
                    self._end(Unavailable("the client is closed"))
                elif left_s > 0:
                    self._changed.wait(left_s)
                elif connection.is_ready:
                    return True
                elif state is not sought:
                    connection.seek()
                    sought = state
                else:
                    self._changed.wait()
        return False

    def open(self, lane: Lane) -> None:
        """Say that the server has taken the call."""
        with self._lock:
            self._live.add(lane)
            self._changed.notify_all()

    def next_request(self, lane: Lane, call: object) -> pb.AttributeStreamRequest | None:
        """Wait for the next message to send; None once the call, or the stream, is over."""
        while True:
            with self._lock:
                step = self._next(lane, call)
            match step:
                case Part() as part:
                    return self._request(part, lane.regions)
                case Step.READ:
                    self._read()
                case Step.REGISTER if lane.regions:
                    return lane.regions.make()
                case _:
                    return None

    def received(self, lane: Lane, response: pb.AttributeStreamResponse) -> None:
        """Take an answer in. One of a part that is not unanswered is passed over."""
        regions = lane.regions
        with self._lock:
            part = self._ledger.get(response.id)
            if part is None or self._has_changed(response):
                if regions:
                    self._heard(regions, response)
                return
            if response.WhichOneof("outcome") == "failure" and self._is_tried_again(part, response.failure):
                if regions:
                    regions.free(response.id)
                self._changed.notify_all()
                return
        answer = _read(response, part, self._plan.baseline, regions)
        if not answer.final:
            if part.is_whole:  # of a part the others' maps would be missing
                self.inbox.put(part.entry, answer)
            return
        with self._lock:
            if regions:
                regions.free(response.id)
            if self._ledger.answered(response.id) is part:
                self._settle(part, answer)
                self._changed.notify_all()

    def lost(self, lane: Lane, cause: SidelightError, *, died: bool) -> None:
        """Say that the call has ended, and whether the server may have died of what it held."""
        with self._lock:
            self._live.discard(lane)
            if self._is_over:
                return
            self._cause = cause
            for part in self._ledger.lost(lane, died=died):
                self._fail(part, ServerDied(
                    f"{_told(part)}: it was alone at work when its server ended, twice ({cause}); it is not sent again"
                ))  # fmt: skip
            if not self._live:
                self._deserted_s = time.monotonic()
                self._keep.notify()
            self._changed.notify_all()

    # What happens under the lock.

    def _next(self, lane: Lane, call: object) -> "Part | Step":
        """Wait until there is something to do for a call."""
        while not self._is_over and lane.call is call:
            now_s = time.monotonic()
            wait_s = None
            if lane in self._live:
                if part := self._ledger.send(lane, now_s, fits=functools.partial(self._fits, lane)):
                    return part
                if lane.regions and lane.regions.is_missing:
                    return Step.REGISTER
                if not self._is_reading and self._ledger.may_read(lane):
                    self._is_reading = True
                    return Step.READ
                again_s = self._ledger.next_sending_s(now_s)
                wait_s = None if again_s is None else again_s - now_s
            self._changed.wait(wait_s)
        return Step.END

    def _fits(self, lane: Lane, part: Part) -> bool:
        """Take room for a part in shared memory, where the lane has any."""
        if lane.regions is None or not len(part.batch):
            return True
        array = part.batch.array
        n_bytes = (0 if array is None else array.nbytes) + self._plan.map_bytes(part.batch)
        return lane.regions.place(part.id, n_bytes)

    def _is_tried_again(self, part: Part, failure: pb.Failure) -> bool:
        """Send a part again where that may go well: it was too large, or its server was full, or on its way out."""
        delay_s = seconds(failure.retry_delay) if failure.HasField("retry_delay") else None
        if failure.code == ResourceExhausted.code and delay_s is None and len(part.batch) > 1:
            self._ledger.halve(part)
            return True
        if failure.code == Unavailable.code:
            delay_s = delay_s or UNAVAILABLE_DELAY_S
        elif failure.code != ResourceExhausted.code:
            return False
        not_before_s = time.monotonic() + (delay_s or 0.0)
        if delay_s is None or not_before_s >= part.entry.deadline_s:
            return False
        self._ledger.again(part, not_before_s=not_before_s)
        return True

    def _heard(self, regions: Regions, response: pb.AttributeStreamResponse) -> None:
        """Take note of a region that the server has open. One that it refuses ends the stream: nothing goes inline."""
        if response.WhichOneof("outcome") == "region_registered":
            regions.registered(response.region_registered.region)
            self._changed.notify_all()
        elif regions.holds(response.id):
            self._end(from_code(response.failure.code, response.failure.message))

    def _has_changed(self, response: pb.AttributeStreamResponse) -> bool:
        """Say whether another model answers than the first time; then the stream ends."""
        digest = response.result.provenance.model_digest
        if digest and self._digest and digest != self._digest and not self._plan.allow_model_change:
            self._end(ModelChanged(
                f"the model that answers is {digest[:12]}…, the stream began with {self._digest[:12]}…; "
                "allow_model_change=True lets that be"
            ))  # fmt: skip
            return True
        self._digest = self._digest or digest
        return False

    def _settle(self, part: Part, answer: Attribution) -> None:
        if part.entry.settle(part.start, answer):
            self._deliver(part.entry, join(part.entry))

    def _fail(self, part: Part, error: SidelightError) -> None:
        self._settle(part, _attribution.failed(error, index=part.entry.index))

    def _deliver(self, entry: Entry, answer: Attribution) -> None:
        self.inbox.put(entry, answer)
        self._ledger.delivered()
        if self._ledger.is_done:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._is_over = True
        self.inbox.close(End(error))
        self._changed.notify_all()
        self._keep.notify()

    def _wake(self) -> None:
        with self._lock:
            self._changed.notify_all()

    # What reads and sends: in gRPC's threads, one at a time in the first, without the lock.

    def _read(self) -> None:
        """Read the caller's next batch into the ledger. One that cannot be sent is answered with its error at once."""
        try:
            images = next(self._batches)
        except StopIteration:
            self._exhausted()
            return
        except Exception as error:  # the caller's iterator raised: the caller hears of it
            self.end(error)
            return
        batch, spans, refused = Batch([]), [], None
        try:
            batch = images if isinstance(images, Batch) else Batch(images)
            spans = list(self._plan.spans(batch))
        except (SidelightError, OSError) as error:
            refused = error if isinstance(error, SidelightError) else InvalidArgument(f"images: {error}")
        except Exception as error:
            self.end(error)
            return
        with self._lock:
            entry = Entry(self._n_read, batch, time.monotonic() + self._plan.timeout_s)
            self._n_read += 1
            self._is_reading = False
            self._ledger.add(entry, spans)
            if refused is not None:
                self._deliver(entry, _attribution.failed(refused, index=entry.index))
            elif self._ledger.n_unanswered == len(spans):  # the keeper had nothing to wait for
                self._keep.notify()
            self._changed.notify_all()

    def _exhausted(self) -> None:
        with self._lock:
            self._is_reading = False
            self._ledger.is_exhausted = True
            if self._ledger.is_done:
                self._end(None)

    def _request(self, part: Part, regions: Regions | None) -> pb.AttributeStreamRequest:
        """Return a part's message. Of its batch's time it has what is left."""
        message = pb.AttributeStreamRequest()
        request = message.attribute
        request.CopyFrom(self._plan.template)
        request.id = part.id
        array = part.batch.array
        if regions and len(part.batch):
            regions.write(part.id, array, request)
        if array is None or not request.images.HasField("shared"):
            request.images.CopyFrom(part.batch.message)
        if request.target.WhichOneof("target") == "per_example" and not part.is_whole:
            classes = request.target.per_example.classes
            del classes[part.start + len(part.batch) :], classes[: part.start]
        request.timeout.CopyFrom(duration(max(_SHORTEST_S, part.entry.deadline_s - time.monotonic())))
        return message

    # The keeper.

    def _watch(self) -> None:
        """Fail what is late, and end a stream that has no server any more. Sleeps until the next of these."""
        has_told = False
        with self._lock:
            while not self._is_over:
                now_s = time.monotonic()
                late, silent = self._ledger.overdue(now_s)
                for part in late:
                    self._fail(part, self._lateness(part))
                for lane in self._lanes:
                    if lane in silent:
                        lane.cut()
                if late:
                    self._changed.notify_all()
                wakes_s = [self._ledger.next_deadline_s()]
                if not self._live:
                    away_s = now_s - self._deserted_s
                    if away_s >= SILENT_WAIT_S and not has_told:
                        has_told = True
                        log.warning("waiting for a server at %s", self._names)
                    if not has_told:
                        wakes_s.append(self._deserted_s + SILENT_WAIT_S)
                    if not self._ledger.n_unanswered:
                        if away_s >= self._plan.patience_s:
                            self._end(self._absence())
                            return
                        wakes_s.append(self._deserted_s + self._plan.patience_s)
                else:
                    has_told = False
                left_s = min((each for each in wakes_s if each is not None), default=None)
                self._keep.wait(None if left_s is None else min(max(0.0, left_s - now_s), threading.TIMEOUT_MAX))

    def _lateness(self, part: Part) -> SidelightError:
        if self._live:
            return DeadlineExceeded(f"{_told(part)}: the server did not answer in its time")
        return Unavailable(f"{_told(part)}: its time passed while no server answered at {self._names}{self._because}")

    def _absence(self) -> Unavailable:
        patience_s = self._plan.patience_s
        return Unavailable(f"no server answers at {self._names} for {patience_s:g} s{self._because}")

    @property
    def _because(self) -> str:
        return f" (the last call ended with: {self._cause})" if self._cause else ""

    @property
    def _names(self) -> str:
        return ", ".join(lane.connection.address for lane in self._lanes)


def _told(part: Part) -> str:
    return f"batch {part.entry.index}"


def _read(
    response: pb.AttributeStreamResponse, part: Part, baseline: Array | None, regions: Regions | None
) -> Attribution:
    index, result = part.entry.index, response.result
    if response.WhichOneof("outcome") == "result":
        maps = None
        if regions and regions.has(part.id) and not result.maps.data:
            array = part.batch.array
            maps = regions.read(part.id, result.maps, skip=0 if array is None else array.nbytes)
        return _attribution.read(result, part.batch, index=index, baseline=baseline, maps=maps)
    failure = response.failure
    delay_s = seconds(failure.retry_delay) if failure.HasField("retry_delay") else None
    return _attribution.failed(from_code(failure.code, failure.message, retry_delay_s=delay_s), index=index)
