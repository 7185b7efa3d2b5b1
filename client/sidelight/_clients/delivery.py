"""Delivery of a stream's answers to the caller."""

from collections.abc import Iterator

from .._streaming.reorder_buffer import ReorderBuffer
from .._streaming.results_queue import Answered
from .._streaming.stream import Stream
from ..results.attribution import Attribution, lent
from .progress import Progress
from .stream_options import StreamOptions, raise_if_failed


class Delivery:
    """Orders a stream's answers, counts them, and frees their share of the window."""

    def __init__(self, stream: Stream, options: StreamOptions) -> None:
        self.progress = options.progress or Progress()  # to be entered while the stream runs
        self._stream = stream
        self._options = options
        self._order = ReorderBuffer(ordered=options.ordered)

    def answers(self, answered: Answered) -> Iterator[Attribution]:
        """Yield the answers that are due once another one has arrived. With `on_error="raise"`, raise their errors."""
        for entry, answer in self._order.admit(*answered):
            if answer.final:
                self._stream.release(entry)
            self.progress.add(answer, n_retries=self._stream.n_retries)
            answer = raise_if_failed(answer, self._options.on_error)
            yield answer if self._options.keep_images else lent(answer, entry.batch)
