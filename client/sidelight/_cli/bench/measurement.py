"""The measurement: loads one after another, each in windows until three of them agree."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..._client import Client, connect
from .arrivals import Arrivals, arrivals
from .load import Load
from .recorder import Recorder, Window
from .sample import joined
from .statistics import STABLE_WINDOWS, Figures, Histogram, histogram, is_stable
from .traffic import Traffic

N_OUTSTANDING = 512  # twice what a server takes in flight unless it is set: it will have to refuse


@dataclass(frozen=True, slots=True)
class Plan:
    """How a server is to be measured: by so many callers, or at such rates, and for how long."""

    address: str
    callers: tuple[int, ...] = ()  # a closed loop for each number
    rates: tuple[float, ...] = ()  # an open loop for each, in requests a second
    arrivals: Arrivals = "constant"
    n_outstanding: int = N_OUTSTANDING  # calls of an open loop that may be unanswered
    interval_s: float = 5.0  # the length of a window
    max_windows: int = 10
    until_stable: bool = True  # False: all windows are measured, and need not agree
    stability: float = 0.1  # the share by which windows that agree may differ
    stable_percentile: int = 95
    seed: int = 0
    shared_memory: bool = False
    reach: Callable[..., Client] = field(default=connect, repr=False)  # which knows patience, TLS and token

    def connect(self) -> Client:
        """Return a client of the server, as each load has one of its own."""
        return self.reach(self.address, shared_memory=self.shared_memory, retry=False)  # a refusal is a figure here


@dataclass(frozen=True, slots=True)
class Step:
    """One load: a closed loop of so many callers, or an open loop of so many requests a second."""

    name: str
    callers: int | None = None
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What one load came to. `figures` and `histogram` are of the last three windows together."""

    step: Step
    figures: Figures
    histogram: Histogram
    stable: bool
    unanswered: int  # requests that were on their way when the load ended
    oldest_unanswered_s: float  # since the first of them was due
    windows: tuple[Figures, ...]


Watch = Callable[[Step, Sequence[Figures]], None]


@dataclass(slots=True)
class Bench:
    """The loads that were measured. `run` may be ended by Ctrl-C: what came before it stays."""

    plan: Plan
    traffic: Traffic
    results: list[Measured] = field(default_factory=list)
    interrupted: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether every load was measured, was answered, and came to windows that agree if it had to."""
        came_to_rest = all(each.stable or not self.plan.until_stable for each in self.results)
        return not self.interrupted and came_to_rest and all(each.figures.requests for each in self.results)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The loads, in their order."""
        noun = "stream" if self.traffic.is_streamed else "caller"
        closed = (Step(f"{n} {noun}{'' if n == 1 else 's'}", callers=n) for n in self.plan.callers)
        opened = (Step(f"{rate:g}/s {self.plan.arrivals}", rate=rate) for rate in self.plan.rates)
        return *closed, *opened

    def run(self, watch: Watch) -> None:
        """Measure every load. `watch` is told of each window."""
        try:
            for step in self.steps:
                if not self.interrupted:
                    self._measure(step, watch)
        except KeyboardInterrupt:  # before a load's first request
            self.interrupted = True

    def _measure(self, step: Step, watch: Watch) -> None:
        plan = self.plan
        watch(step, [])
        with plan.connect() as client:
            client.info()  # connecting is not measured
            recorder = Recorder(seed=plan.seed)
            with Load(
                client,
                self.traffic,
                recorder,
                n_callers=step.callers or (1 if self.traffic.is_streamed else plan.n_outstanding),
                arrivals=arrivals(plan.arrivals, step.rate, seed=plan.seed) if step.rate is not None else None,
            ) as load:
                self.results.append(self._windows(step, load, recorder, watch))

    def _windows(self, step: Step, load: Load, recorder: Recorder, watch: Watch) -> Measured:
        plan = self.plan
        last: deque[Window] = deque(maxlen=STABLE_WINDOWS)  # of the others the figures are kept alone
        windows: list[Figures] = []

        def cut() -> None:
            last.append(recorder.cut())
            windows.append(Figures.of([last[-1]]))
            watch(step, windows)

        try:
            while len(windows) < plan.max_windows and not (plan.until_stable and self._agree(windows)):
                load.run(self.plan.interval_s)
                cut()
        except KeyboardInterrupt:
            self.interrupted = True
            cut()
        unanswered_s = recorder.unanswered_s()
        return Measured(
            step=step,
            figures=Figures.of(last),
            histogram=histogram(joined(each.latency for each in last)),
            stable=self._agree(windows),
            unanswered=len(unanswered_s),
            oldest_unanswered_s=max(unanswered_s, default=0.0),
            windows=tuple(windows),
        )

    def _agree(self, windows: Sequence[Figures]) -> bool:
        return is_stable(windows, within=self.plan.stability, percent=self.plan.stable_percentile)
