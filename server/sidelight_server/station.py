"""A station: a device, the models that were loaded onto it, and the one thread that owns it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from .models.model import Model
from .runner import Runner
from .work import Work


class Station:
    """Where requests are answered. With several devices each has its own, and its own replicas of all models.

    `on_end` is told when the thread has ended, for whatever reason. What is counted here is the event loop's.
    """

    def __init__(
        self,
        device: torch.device,
        models: Sequence[Model],
        *,
        threads: int,
        on_end: "Callable[[Station], None]" = lambda _: None,
    ) -> None:
        self.device = device
        self.models = {model.name: model for model in models}
        self.runner = Runner(device, threads=threads, on_end=lambda: on_end(self))
        self.n_rows = 0  # that the requests here may take, at most

    @contextlib.contextmanager
    def holds(self, work: Work) -> Iterator[None]:
        """Submit a request; when the context ends, drop what it has not run. `Unavailable` unless the runner runs."""
        n_rows = len(work.prepared.examples) * work.request.method.rows(work.prepared.shape)
        self.n_rows += n_rows
        try:
            self.runner.submit(work)
            yield
        finally:
            self.runner.withdraw(work)
            self.n_rows -= n_rows


def least_busy(stations: Sequence[Station]) -> Station:
    """Return the station whose requests may take the fewest rows, of those whose thread runs."""
    return min(stations, key=lambda station: (not station.runner.is_alive, station.n_rows))
