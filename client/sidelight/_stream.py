"""The stream: a window of unanswered batches on one call, answers matched by id.

Three threads meet here. gRPC's own reads the caller's batches, as far as the window allows; a receiver takes the
answers in; the caller takes them out. What they share lies in the `Window` and the `Inbox`, each under its own lock.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import grpc

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc

from . import _attribution
from ._attribution import Attribution
from ._baselines import given_array
from ._errors import DeadlineExceeded, InvalidArgument, SidelightError, Unavailable, from_code, from_rpc
from ._images import Batch, Images
from ._inbox import Answered, End, Inbox
from ._types import seconds
from ._window import GRACE_S, Sent, Window


class Ask(Protocol):
    """Makes a batch's request. A `SidelightError` says why it cannot be sent."""

    def __call__(self, batch: Batch, *, id_: str) -> pb.AttributeRequest: ...


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
        self._window = Window(window, timeout_s)
        self._inbox = Inbox()

    def answers(self, *, ordered: bool) -> Iterator[Attribution]:
        """Yield the answers as they come, or in order. A batch that failed is yielded with `error` set.

        Before its final answer a batch may have others, `final` unset. In order, only the batch that is due has them.
        """
        call = self._stub.AttributeStream(self._requests())
        receiver = threading.Thread(target=self._receive, args=(call,), name="sidelight-receive", daemon=True)
        receiver.start()
        try:
            for sent, answer in self._in_order() if ordered else self._as_ready():
                if answer.final:
                    self._window.taken(len(sent.batch))
                yield answer
        finally:
            self._window.close()
            call.cancel()
            receiver.join()

    def _as_ready(self) -> Iterator[Answered]:
        while not isinstance(answered := self._next(), End):
            yield answered
        if answered.error is not None:
            raise answered.error

    def _in_order(self) -> Iterator[Answered]:
        early: dict[int, Answered] = {}  # bounded: an answer holds its room in the window until it is yielded
        due = 0
        for sent, answer in self._as_ready():
            if answer.final:
                early[sent.index] = sent, answer
            elif sent.index == due:
                yield sent, answer
            while due in early:
                yield early.pop(due)
                due += 1

    def _next(self) -> Answered | End:
        while True:
            if answered := self._inbox.take(GRACE_S):
                return answered
            if late := self._window.overdue():
                return End(DeadlineExceeded(f"batch {late.index}: the server did not answer in its time"))

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
            self._inbox.close(End(error))

    def _request(self, index: int, images: Images) -> Iterator[pb.AttributeStreamRequest]:
        """Yield a batch's request; a batch that cannot be sent is answered with its error at once."""
        batch, id_ = Batch([]), str(index)
        try:
            batch = Batch(images)
            request = pb.AttributeStreamRequest(attribute=self._ask(batch, id_=id_))
        except (SidelightError, OSError) as error:
            refused = error if isinstance(error, SidelightError) else InvalidArgument(f"images: {error}")
            self._window.add(id_, index, batch)
            self._answered(self._window.pop(id_), lambda _: _attribution.failed(refused, index=index))
            return
        self._window.add(id_, index, batch, baseline=given_array(request.attribute.method))
        yield request

    def _receive(self, call: Iterator[pb.AttributeStreamResponse]) -> None:
        """Take answers in. Runs in a thread of its own, which ends with the call."""
        try:
            for response in call:
                is_final = response.result.final or response.WhichOneof("outcome") != "result"
                sent = self._window.pop(response.id) if is_final else self._window.get(response.id)
                self._answered(sent, functools.partial(_read, response))
            unanswered = len(self._window)
            lost = Unavailable(f"the server ended the stream with {unanswered} batches unanswered")
            self._inbox.close(End(lost if unanswered else None))
        except grpc.RpcError as error:
            self._inbox.close(End(from_rpc(error, max_message_bytes=self._max_message_bytes)))
        except Exception as error:  # an answer that cannot be read: the caller must not wait for what never comes
            self._inbox.close(End(error))

    def _answered(self, sent: Sent | None, answer: Callable[[Sent], Attribution]) -> None:
        """Hand an answer to the caller. One of a batch that is not unanswered is passed over."""
        if sent is not None:
            self._inbox.put(sent, answer(sent))


def _read(response: pb.AttributeStreamResponse, sent: Sent) -> Attribution:
    if response.WhichOneof("outcome") == "result":
        return _attribution.read(response.result, sent.batch, index=sent.index, baseline=sent.baseline)
    failure = response.failure
    delay_s = seconds(failure.retry_delay) if failure.HasField("retry_delay") else None
    return _attribution.failed(from_code(failure.code, failure.message, retry_delay_s=delay_s), index=sent.index)
