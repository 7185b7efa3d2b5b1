"""The stream: a window of unanswered batches on one call, answers matched by id.

Three threads meet here. gRPC's own reads the caller's batches, as far as the window allows; a receiver takes the
answers in; the caller takes them out. What they share is under one lock, in `_Window`.
"""

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import grpc

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc

from . import _attribution
from ._attribution import Attribution
from ._errors import DeadlineExceeded, InvalidArgument, SidelightError, Unavailable, from_code, from_rpc
from ._images import Batch, Images

MIN_BATCHES = 2  # one at the device, one on its way
# The server ends a batch at its timeout and says so; only if that word does not come either, the client ends it.
GRACE_S = 5.0


class Ask(Protocol):
    """Makes a batch's request. A `SidelightError` says why it cannot be sent."""

    def __call__(self, batch: Batch, *, id_: str) -> pb.AttributeRequest: ...


@dataclass(frozen=True, slots=True)
class _Sent:
    """A batch that is not answered yet."""

    index: int
    batch: Batch
    deadline_s: float  # on the monotonic clock


_Answered = tuple[_Sent, Attribution]


class _Window:
    """The unanswered batches of a stream."""

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._unanswered: dict[str, _Sent] = {}
        self._n_examples = 0
        self._n_untaken = 0  # answered, but not taken by the caller yet: these too hold the window
        self._closed = False

    def wait_for_room(self) -> bool:
        """Wait until there is room for a batch. False once the stream is closed."""
        with self._changed:
            self._changed.wait_for(self._has_room_or_closed)
            return not self._closed

    def add(self, id_: str, index: int, batch: Batch) -> None:
        """Count a batch that is about to be sent."""
        with self._changed:
            self._unanswered[id_] = _Sent(index, batch, time.monotonic() + self._timeout_s + GRACE_S)
            self._n_examples += len(batch)

    def pop(self, id_: str) -> _Sent | None:
        """Take an answered batch out. Its room is free only once `taken` is called."""
        with self._changed:
            sent = self._unanswered.pop(id_, None)
            self._n_untaken += sent is not None
            return sent

    def taken(self, batch_size: int) -> None:
        """Free the room of an answer that the caller has taken."""
        with self._changed:
            self._n_untaken -= 1
            self._n_examples -= batch_size
            self._changed.notify_all()

    def overdue(self) -> _Sent | None:
        """Return the oldest unanswered batch if the server has not kept its time."""
        with self._changed:
            oldest = next(iter(self._unanswered.values()), None)
            return oldest if oldest and time.monotonic() > oldest.deadline_s else None

    def __len__(self) -> int:
        with self._changed:
            return len(self._unanswered)

    def close(self) -> None:
        """Let the reading thread go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room_or_closed(self) -> bool:
        n_batches = len(self._unanswered) + self._n_untaken
        return self._closed or n_batches < MIN_BATCHES or self._n_examples < self._limit


@dataclass(frozen=True, slots=True)
class _End:
    """Why nothing more comes: an exception, or None where all is answered."""

    error: BaseException | None


class Stream:
    """One call of `AttributeStream`."""

    def __init__(
        self,
        stub: attribution_pb2_grpc.AttributionServiceStub,
        batches: Iterable[Images],
        *,
        ask: Ask,
        window: int,
        timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        self._stub = stub
        self._batches = batches
        self._ask = ask
        self._max_message_bytes = max_message_bytes
        self._window = _Window(window, timeout_s)
        self._arrived: queue.SimpleQueue[_Answered | _End] = queue.SimpleQueue()

    def answers(self, *, ordered: bool) -> Iterator[Attribution]:
        """Yield the answers as they come, or in order. A batch that failed is yielded with `error` set."""
        call = self._stub.AttributeStream(self._requests())
        receiver = threading.Thread(target=self._receive, args=(call,), name="sidelight-receive", daemon=True)
        receiver.start()
        try:
            for sent, answer in self._in_order() if ordered else self._as_ready():
                self._window.taken(len(sent.batch))
                yield answer
        finally:
            self._window.close()
            call.cancel()
            receiver.join()

    def _as_ready(self) -> Iterator[_Answered]:
        while not isinstance(answered := self._next(), _End):
            yield answered
        if answered.error is not None:
            raise answered.error

    def _in_order(self) -> Iterator[_Answered]:
        early: dict[int, _Answered] = {}  # bounded: an answer holds its room in the window until it is yielded
        due = 0
        for sent, answer in self._as_ready():
            early[sent.index] = sent, answer
            while due in early:
                yield early.pop(due)
                due += 1

    def _next(self) -> _Answered | _End:
        while True:
            try:
                return self._arrived.get(timeout=GRACE_S)
            except queue.Empty:
                if late := self._window.overdue():
                    return _End(DeadlineExceeded(f"batch {late.index}: the server did not answer in its time"))

    def _requests(self) -> Iterator[pb.AttributeStreamRequest]:
        """Read the caller's batches as far as the window allows. Runs in gRPC's thread."""
        try:
            batches = iter(self._batches)
            for index in itertools.count():
                if not self._window.wait_for_room():
                    return
                try:
                    images = next(batches)
                except StopIteration:
                    return
                yield from self._request(index, images)
        except Exception as error:  # the caller's iterator raised: the caller hears of it
            self._arrived.put(_End(error))

    def _request(self, index: int, images: Images) -> Iterator[pb.AttributeStreamRequest]:
        """Yield a batch's request; a batch that cannot be sent is answered with its error at once."""
        batch, id_ = Batch([]), str(index)
        try:
            batch = Batch(images)
            request = pb.AttributeStreamRequest(attribute=self._ask(batch, id_=id_))
        except (SidelightError, OSError) as error:
            refused = error if isinstance(error, SidelightError) else InvalidArgument(f"images: {error}")
            self._window.add(id_, index, batch)
            self._answered(id_, lambda _: _attribution.failed(refused, index=index))
            return
        self._window.add(id_, index, batch)
        yield request

    def _receive(self, call: Iterator[pb.AttributeStreamResponse]) -> None:
        """Take answers in. Runs in a thread of its own, which ends with the call."""
        try:
            for response in call:
                self._answered(response.id, functools.partial(_read, response))
            unanswered = len(self._window)
            lost = Unavailable(f"the server ended the stream with {unanswered} batches unanswered")
            self._arrived.put(_End(lost if unanswered else None))
        except grpc.RpcError as error:
            self._arrived.put(_End(from_rpc(error, max_message_bytes=self._max_message_bytes)))

    def _answered(self, id_: str, answer: Callable[[_Sent], Attribution]) -> None:
        """Hand an answer to the caller. An id that is not unanswered is passed over."""
        if sent := self._window.pop(id_):
            self._arrived.put((sent, answer(sent)))


def _read(response: pb.AttributeStreamResponse, sent: _Sent) -> Attribution:
    if response.WhichOneof("outcome") == "result":
        return _attribution.read(response.result, sent.batch, index=sent.index)
    failure = response.failure
    delay_s = failure.retry_delay.seconds + failure.retry_delay.nanos / 1e9 if failure.HasField("retry_delay") else None
    return _attribution.failed(from_code(failure.code, failure.message, retry_delay_s=delay_s), index=sent.index)
