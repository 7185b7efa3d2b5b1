"""Batches of a stream of the client, and the threads that it starts."""

import threading
from collections.abc import Iterable, Iterator

import numpy as np


def client_threads() -> set[threading.Thread]:
    """Return the running threads, without those that the server under test keeps."""
    kept = ("sidelight-prepare", "asyncio_")
    return {thread for thread in threading.enumerate() if not thread.name.startswith(kept)}


def assert_ended(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), thread.name


class Counted:
    """Batches that count how many were read, and notify a test that waits for a number."""

    def __init__(self, batches: Iterable[object]) -> None:
        self._batches = iter(batches)
        self._changed = threading.Condition()
        self.n_read = 0

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        batch = next(self._batches)
        with self._changed:
            self.n_read += 1
            self._changed.notify_all()
        return batch

    def wait_for(self, n: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.n_read >= n, timeout=30)


def tiny(n: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 32, 32)).astype(np.float32)


def one() -> np.ndarray:
    return tiny(1)


class Broken(Exception):
    """An exception of the caller's own code."""
