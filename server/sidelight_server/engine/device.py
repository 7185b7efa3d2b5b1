"""A device of the engine: the torch device, and the one thread that owns it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from .active_request import ActiveRequest
from .device_worker import DeviceWorker

REST = 3.0  # of each task's own time, beside running requests: so those keep three quarters of the device

_Value = TypeVar("_Value")


class Device:
    """A device that answers requests, with its own thread and its own replicas of all models.

    `on_end` is told when the thread has ended, for whatever reason. What is counted here is the event loop's.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        index: int = 0,
        threads: int,
        stuck_s: float = 0.0,
        on_end: "Callable[[Device], None]" = lambda _: None,
    ) -> None:
        self.torch_device = device
        self.index = index
        self.worker = DeviceWorker(device, threads=threads, stuck_s=stuck_s, on_end=lambda: on_end(self))
        self.n_rows = 0  # that the requests here may take, at most

    @property
    def moves(self) -> bool:
        """Whether requests here can expect an answer: the thread runs, and is not stuck."""
        return self.worker.is_alive and not self.worker.heartbeat.is_stuck

    @contextlib.contextmanager
    def holds(self, active: ActiveRequest) -> Iterator[None]:
        """Submit a request; when the context ends, drop what it has not run. `Unavailable` unless the worker runs."""
        n_rows = active.most_rows
        self.n_rows += n_rows
        try:
            self.worker.submit(active)
            yield
        finally:
            self.worker.withdraw(active)
            self.n_rows -= n_rows

    def in_turn(self, task: Callable[[], _Value]) -> _Value:
        """Run a function on the thread that owns the device, between two chunks, and wait for it.

        For a thread that has much to run: while requests are answered, it is held back. `Unavailable` as for `submit`.
        """

        def timed() -> tuple[_Value, float]:
            began = time.monotonic()
            return task(), time.monotonic() - began

        value, took_s = self.worker.call(timed).result()
        if self.n_rows:
            time.sleep(REST * took_s)
        return value


def least_busy(devices: Sequence[Device]) -> Device:
    """Return the device whose requests may take the fewest rows, of those that move; else one whose thread runs."""
    return min(devices, key=lambda device: (not device.moves, not device.worker.is_alive, device.n_rows))
