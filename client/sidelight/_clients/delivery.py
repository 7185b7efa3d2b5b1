"""Delivery of a stream's answers to the caller, in order if requested."""

from collections.abc import Iterator

from .._streaming.results_queue import Answered
from .._streaming.scheduling.parts import Entry
from .._streaming.stream import Stream
from ..results.attribution import Attribution, with_weak_batch
from .progress import Progress
from .stream_options import StreamOptions, raise_if_failed


class Delivery:
    """Orders a stream's answers, counts them, and frees their share of the window."""

    def __init__(self, stream: Stream, options: StreamOptions) -> None:
        self.progress = options.progress or Progress()  # to be entered while the stream runs
        self._stream = stream
        self._options = options
        self._early: dict[int, Answered] = {}  # bounded by the window: an answer occupies it until it is released
        self._due = 0  # index of the batch that is yielded next, if ordered

    def answers(self, answered: Answered) -> Iterator[Attribution]:
        """Yield the answers that are due once another one has arrived. With `on_error="raise"`, raise their errors."""
        for entry, answer in self._in_order(*answered):
            if answer.final:
                self._stream.release(entry)
            self.progress.add(answer, n_retries=self._stream.n_retries)
            answer = raise_if_failed(answer, self._options.on_error)
            yield answer if self._options.keep_images else with_weak_batch(answer, entry.batch)

    def _in_order(self, entry: Entry, answer: Attribution) -> Iterator[Answered]:
        """Yield what is due. If ordered, only the batch that is due yields answers that are not final."""
        if not self._options.ordered or (not answer.final and entry.index == self._due):
            yield entry, answer
        elif answer.final:
            self._early[entry.index] = entry, answer
            while self._due in self._early:
                yield self._early.pop(self._due)
                self._due += 1
