"""The good callers: a streaming and a unary one, whose answers are checked and timed."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import sidelight

from .attacks import pixels

TOLERANCE = 4e-6  # share of a map's maximum: the promise for an example with other neighbors
TIMEOUT_S = 60.0
PAUSE_S = 0.1  # between two calls of a caller; the device is idle most of the time


class Good:
    """A streaming and a unary caller, with the times of their calls and counts of lost and wrong answers."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._done = threading.Event()
        self.counts: Counter[str] = Counter()
        self.unary_s: list[float] = []
        self.stream_s: list[float] = []
        with sidelight.connect(address) as client:
            self._expected = client.attribute(pixels(1)).maps

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run both callers while the block runs."""
        self._done.clear()
        threads = [threading.Thread(target=each) for each in (self._unary, self._stream)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join()

    def _unary(self) -> None:
        with sidelight.connect(self._address) as client:
            while not self._done.wait(PAUSE_S):
                began = time.perf_counter()
                try:
                    self._check(client.attribute(pixels(1), timeout=TIMEOUT_S).maps)
                    self.unary_s.append(time.perf_counter() - began)
                except sidelight.SidelightError as error:
                    self._lost("unary", error)

    def _stream(self) -> None:
        sent_s = 0.0
        answered = threading.Semaphore()

        def batches() -> Iterator[np.ndarray]:
            nonlocal sent_s
            # The next batch follows an answer. At a fixed rate, a caller whose share is less than that rate would wait
            # for its own batches.
            while not self._done.wait(PAUSE_S) and answered.acquire(timeout=TIMEOUT_S):
                sent_s = time.perf_counter()
                yield pixels(1)

        with sidelight.connect(self._address) as client:
            try:
                for answer in client.stream(batches(), timeout=TIMEOUT_S, on_error="return"):
                    if isinstance(answer, sidelight.Attribution):
                        self.stream_s.append(time.perf_counter() - sent_s)
                        self._check(answer.maps)
                    else:
                        self._lost("stream", answer)
                    answered.release()
            except sidelight.SidelightError as error:
                self._lost("stream", error)

    def _lost(self, what: str, error: object) -> None:
        self.counts["lost"] += 1
        print(f"lost ({what}): {error!r}", flush=True)

    def _check(self, maps: np.ndarray) -> None:
        near = np.allclose(maps, self._expected, rtol=0, atol=TOLERANCE * float(self._expected.max()))
        self.counts["served" if near else "wrong"] += 1


def p99(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99)) if seconds else float("inf")
