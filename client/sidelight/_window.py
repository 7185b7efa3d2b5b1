"""The window: how many batches of a stream may be unanswered, and which they are."""

import threading
import time
from dataclasses import dataclass

from ._images import Batch
from ._tensor import Array

MIN_BATCHES = 2  # one at the device, one on its way
# The server ends a batch at its timeout and says so; only if that word does not come either, the client ends it.
GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch that is not answered yet."""

    index: int
    batch: Batch
    baseline: Array | None  # that was given with the method
    deadline_s: float  # on the monotonic clock


class Window:
    """The unanswered batches of a stream."""

    def __init__(self, limit: int, timeout_s: float) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._unanswered: dict[str, Sent] = {}
        self._n_examples = 0
        self._n_untaken = 0  # answered, but not taken by the caller yet: these too hold the window
        self._closed = False

    def wait_for_room(self) -> bool:
        """Wait until there is room for a batch. False once the stream is closed."""
        with self._changed:
            self._changed.wait_for(self._has_room_or_closed)
            return not self._closed

    def add(self, id_: str, index: int, batch: Batch, *, baseline: Array | None = None) -> None:
        """Count a batch that is about to be sent."""
        with self._changed:
            self._unanswered[id_] = Sent(index, batch, baseline, time.monotonic() + self._timeout_s + GRACE_S)
            self._n_examples += len(batch)

    def get(self, id_: str) -> Sent | None:
        """Return an unanswered batch, and leave it so: what came is not its final answer."""
        with self._changed:
            return self._unanswered.get(id_)

    def pop(self, id_: str) -> Sent | None:
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

    def overdue(self) -> Sent | None:
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
