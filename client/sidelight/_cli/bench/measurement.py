"""The measurement: one load after another, each in windows until three in a row agree."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..._clients.client import Client, connect
from .load import Arrivals, Load, arrivals
from .recorder import Recorder, Window
from .statistics import STABLE_WINDOWS, Figures, Histogram, histogram, is_stable, joined
from .traffic import Traffic

N_OUTSTANDING = 512  # twice the server's default limit in flight, so that it has to reject some


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of a measurement: the loads and how long to measure each."""

    address: str
    callers: tuple[int, ...] = ()  # one closed loop per number
    rates: tuple[float, ...] = ()  # one open loop per rate, in requests per second
    arrivals: Arrivals = "constant"
    n_outstanding: int = N_OUTSTANDING  # maximum unanswered calls of an open loop
    interval_s: float = 5.0  # the length of a window
    max_windows: int = 10
    until_stable: bool = True  # False: measure all windows, whether they agree or not
    stability: float = 0.1  # maximum relative difference of windows that agree
    stable_percentile: int = 95
    seed: int = 0
    shared_memory: bool = False
    connect_to: Callable[..., Client] = field(default=connect, repr=False)  # with timeout, TLS and token applied

    def connect(self) -> Client:
        """Return a new client. Each load has its own."""
        return self.connect_to(self.address, shared_memory=self.shared_memory, retry=False)  # rejections are counted


@dataclass(frozen=True, slots=True)
class Step:
    """One load: a closed loop with a number of callers, or an open loop with a rate in requests per second."""

    name: str
    callers: int | None = None
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """The result of one load. `figures` and `histogram` cover the last three windows."""

    step: Step
    figures: Figures
    histogram: Histogram
    stable: bool
    unanswered: int  # requests in flight when the load ended
    oldest_unanswered_s: float  # since the oldest of them was due
    windows: tuple[Figures, ...]

    @property
    def name(self) -> str:
        """The load's name, with an asterisk if it is not stable."""
        return self.step.name if self.stable else f"{self.step.name} *"


Watch = Callable[[Step, Sequence[Figures]], None]


@dataclass(slots=True)
class Bench:
    """A measurement and its results. After Ctrl-C in `run`, the results so far are kept."""

    plan: Plan
    traffic: Traffic
    results: list[Measured] = field(default_factory=list)
    interrupted: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether every load was measured, has answers, and is stable if the plan asks for it."""
        are_stable = all(each.stable or not self.plan.until_stable for each in self.results)
        return not self.interrupted and are_stable and all(each.figures.requests for each in self.results)

    @property
    def steps(self) -> tuple[Step, ...]:
        noun = "stream" if self.traffic.is_streamed else "caller"
        closed = (Step(f"{n} {noun}{'' if n == 1 else 's'}", callers=n) for n in self.plan.callers)
        opened = (Step(f"{rate:g}/s {self.plan.arrivals}", rate=rate) for rate in self.plan.rates)
        return *closed, *opened

    def run(self, watch: Watch) -> None:
        """Measure every load, and call `watch` after each window."""
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
        last: deque[Window] = deque(maxlen=STABLE_WINDOWS)  # older windows keep only their figures
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
