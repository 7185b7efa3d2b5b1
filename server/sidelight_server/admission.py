"""Admission: permits by count and by bytes. A request holds its permit until its answer is written."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator

from .errors import ResourceExhausted

RETRY_DELAY_S = 0.25


class Admission:
    """The permits of a server, or of one of its models, given first come, first served. The event loop's: no lock."""

    def __init__(self, *, max_requests: int, max_bytes: float, model: str = "") -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._model = model
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.n_requests = 0
        self.n_bytes = 0

    @contextlib.contextmanager
    def enter(self, n_bytes: int) -> Iterator[None]:
        """Hold a permit. `ResourceExhausted`, with a retry delay, where there is none now."""
        self._refuse_impossible(n_bytes)
        if self._waiting or not self._fits(n_bytes):
            raise ResourceExhausted(
                f'model "{self._model}" is at work on {self.n_requests} requests (max_model_in_flight)'
                if self._model
                else f"the server is at work on {self.n_requests} requests of {self.n_bytes} bytes "
                f"(max_in_flight {self._max_requests}, max_in_flight_bytes {self._max_bytes})",
                retry_delay_s=RETRY_DELAY_S,
            )
        self._take(n_bytes)
        try:
            yield
        finally:
            self.release(n_bytes)

    def take(self, n_bytes: int) -> bool:
        """Take a permit if there is one now; `release` gives it back. `ResourceExhausted` where there can never be."""
        self._refuse_impossible(n_bytes)
        if self._waiting or not self._fits(n_bytes):
            return False
        self._take(n_bytes)
        return True

    async def acquire(self, n_bytes: int) -> None:
        """Wait for a permit and take it; `release` gives it back. `ResourceExhausted` where there can never be one."""
        if self.take(n_bytes):
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((n_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the turn came in the same moment: the permit was taken for nobody
                self.release(n_bytes)
            else:
                with contextlib.suppress(ValueError):  # a release in the same moment has passed it over
                    self._waiting.remove((n_bytes, turn))
                self._wake()
            raise

    def release(self, n_bytes: int) -> None:
        """Give a permit back."""
        self.n_requests -= 1
        self.n_bytes -= n_bytes
        self._wake()

    def _wake(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._fits(self._waiting[0][0])):
            n_bytes, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._take(n_bytes)
                turn.set_result(None)

    def _take(self, n_bytes: int) -> None:
        self.n_requests += 1
        self.n_bytes += n_bytes

    def _fits(self, n_bytes: int) -> bool:
        return self.n_requests < self._max_requests and self.n_bytes + n_bytes <= self._max_bytes

    def _refuse_impossible(self, n_bytes: int) -> None:
        if n_bytes < 1:  # a negative one would give room to others
            raise ValueError(f"a permit of {n_bytes} bytes")
        if n_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"the request and its answer take {n_bytes} bytes, the server's max_in_flight_bytes is "
                f"{self._max_bytes}: send fewer examples"
            )
