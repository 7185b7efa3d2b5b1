"""A device of the engine: the torch device, and the one thread that owns it."""

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..active_request import ActiveRequest
from .device_worker import DeviceWorker

IDLE_S = 1.0  # without requests: callers that send one after the other leave shorter pauses
POLL_S = 0.05
REST = 3.0  # pause after a background task, as a multiple of its time: requests keep three quarters of the device

_Value = TypeVar("_Value")


class NeverIdle(Exception):
    """A device was not idle in time."""


class Device:
    """A device that runs requests, with its own worker thread and its own replicas of all models.

    `on_end` is called when the thread has ended, for whatever reason. `n_rows` is changed on the event loop only.
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
        self.n_rows = 0  # upper bound of the rows of the requests on this device
        self._idle_since_s = -math.inf

    @property
    def is_responsive(self) -> bool:
        """Whether the worker thread runs and is not stuck."""
        return self.worker.is_alive and not self.worker.heartbeat.is_stuck

    @property
    def backlog_s(self) -> float:
        """Seconds of work that wait or run here: the rows of all requests ÷ the rows per second."""
        return self.worker.row_rate.seconds(self.n_rows)

    def add(self, active: ActiveRequest) -> None:
        """Submit a request. Raises `Unavailable` if the worker has ended."""
        self.worker.submit(active)
        self.n_rows += active.max_rows

    def remove(self, active: ActiveRequest) -> None:
        self._idle_since_s = time.monotonic()  # first: another thread reads both
        self.n_rows -= active.max_rows
        if not active.is_done:
            self.worker.withdraw(active)

    @property
    def is_idle(self) -> bool:
        """Whether there has been no request for `IDLE_S`."""
        return not self.n_rows and time.monotonic() - self._idle_since_s >= IDLE_S

    def when_idle(self, task: Callable[[], _Value], *, until_s: float) -> _Value:
        """Run a function on the device's thread once the device is idle, and wait for its result.

        For background threads. Raises `NeverIdle` if it is busy until `until_s`, and `Unavailable` as `submit` does.
        """
        while not self.is_idle:
            if time.monotonic() > until_s:
                raise NeverIdle
            time.sleep(POLL_S)
        return self.worker.call(task).result()

    def in_turn(self, task: Callable[[], _Value]) -> _Value:
        """Run a function on the device's thread, between two chunks, and wait for its result.

        For background threads: while requests are active, it then sleeps for `REST` times the task's duration. Raises
        `Unavailable` as `submit` does.
        """

        def timed() -> tuple[_Value, float]:
            began = time.monotonic()
            return task(), time.monotonic() - began

        value, took_s = self.worker.call(timed).result()
        if self.n_rows:
            time.sleep(REST * took_s)
        return value


def least_busy(devices: Sequence[Device]) -> Device:
    """Return the responsive device with the fewest rows; if all are stuck, one whose thread is alive."""
    if len(devices) == 1:
        return devices[0]
    return min(devices, key=lambda device: (not device.is_responsive, not device.worker.is_alive, device.n_rows))
