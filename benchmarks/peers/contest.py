"""The comparison of Sidelight with its peers: theirs at their best settings, ours where its p99 is no worse.

The CPUs are shared by clients and servers, so each server sleeps while another is measured.
"""

import contextlib
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sidelight_server.compute.torch_device import cpu_quota

from ..results import RESULTS
from ..support.measure import Line
from ..support.nets import SIZE, resnet18
from .driver import IMAGES
from .field import OURS, PEERS
from .record import Record, Round
from .rival import Flags, NotRun, Rival, Setting
from .running import Running
from .saliency import MODEL, InputOnly

N_IMAGES = 16  # number of different images
TYPICAL = 8  # unanswered images while flags are compared
SWEEP_IMAGES, ROUND_S, ROUNDS = 32, 6.0, 3
EQUAL = 1e-5  # of the map's maximum: another chunk size changes the last bits
TOP = 0.05  # share of a map's pixels whose positions are compared


@dataclass(frozen=True, slots=True)
class Contestant:
    """A running rival with its best flags."""

    rival: Rival
    running: Running
    at_once: tuple[int, ...]
    n_images: int
    record: Record = field(default_factory=Record)  # of the final rounds, without those of the sweep


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Similarity of a rival's maps to the exact ones, as means over the images."""

    rank_correlation: float
    same_top: float

    def __str__(self) -> str:
        return f"rank correlation {self.rank_correlation:.4f}, {self.same_top:.1%} of the top {TOP:.0%} pixels the same"


class Contest:
    """One comparison. Its folder has the model, the images and the exact maps."""

    def __init__(self, folder: Path, *, hurry: bool) -> None:
        self.folder = folder
        self.swept: dict[str, dict[str, Round]] = {}
        self.absent: dict[str, str] = {}  # why a peer cannot run, by its name
        self.fidelity: dict[str, Fidelity] = {}
        self._order = random.Random(0)
        self._sweep_images, self._rounds = (N_IMAGES, 1) if hurry else (SWEEP_IMAGES, ROUNDS)
        self._round_s = 0.0 if hurry else ROUND_S
        self._exact = _lay_out(folder)

    def run(self, rivals: Sequence[Rival]) -> dict[str, Contestant]:
        """Measure the peers. Those that cannot run are in `absent`, with the reason."""
        with contextlib.ExitStack() as stack:
            contestants = {}
            for rival in rivals:
                with self._excusing(rival):
                    contestants[rival.name] = self._enter(stack, rival)
            for _ in range(self._rounds):
                for name in self._order.sample(list(contestants), len(contestants)):
                    with self._excusing(contestants[name].rival):
                        self._turn(contestants[name])
                    if name in self.absent:
                        contestants.pop(name).running.stop()
        return contestants

    def _enter(self, stack: contextlib.ExitStack, rival: Rival) -> Contestant:
        """Start a rival with its best flags, and leave it paused."""
        flags, sweep = self._best_flags(rival), Record()
        with contextlib.ExitStack() as own:
            running = own.enter_context(Running(rival, flags, self.folder))
            self._check(running)
            for n in rival.at_once:
                sweep.add(n, self._try(running, n))
            running.pause()
            stack.push(own.pop_all())
        # Our settings are chosen for each peer, once everything is measured.
        at_once = rival.at_once if rival.is_ours else (sweep.best(),)
        many = round(max(map(sweep.rate, rival.at_once)) * self._round_s / 16) * 16
        return Contestant(rival, running, at_once, max(N_IMAGES, many))

    def _best_flags(self, rival: Rival) -> Flags:
        if len(rival.flags) == 1:
            return rival.flags[0]
        rates: dict[Flags, float] = {}
        for flags in rival.flags:
            try:
                with Running(rival, flags, self.folder) as running:
                    running.measure(TYPICAL, N_IMAGES)  # to warm up
                    rates[flags] = self._try(running, TYPICAL).rate
            except NotRun as error:  # another setting may run
                print(f"{rival.name}: {Setting(flags, TYPICAL)}: not run: {error}")
                if flags == rival.flags[-1] and not rates:
                    raise
        return max(rates, key=rates.__getitem__)

    def _try(self, running: Running, at_once: int) -> Round:
        round_ = running.measure(at_once, self._sweep_images)
        _report(running, at_once, round_)
        self.swept.setdefault(running.rival.name, {})[str(Setting(running.flags, at_once))] = round_
        return round_

    def _check(self, running: Running) -> None:
        """Raise `NotRun` if a rival's maps are not the exact ones."""
        path = self.folder / "answers.npz"
        running.measure(TYPICAL, N_IMAGES, answers=path)
        answers = np.load(path)
        differ = int((answers["predicted"] != self._exact["predicted"]).sum())
        pairs = list(zip(answers["maps"], self._exact["maps"], strict=True))
        apart = max(_apart(*each) for each in pairs)
        fidelity = Fidelity(*(statistics.mean(of(*each) for each in pairs) for of in (_rank_correlation, _same_top)))
        least = running.rival.alike
        if differ or (apart > EQUAL if least is None else fidelity.rank_correlation < least):
            raise NotRun(f"its maps are off by {apart:.1e} of their maximum, {fidelity}, {differ} predictions differ")
        self.fidelity[running.rival.name] = fidelity

    def _turn(self, contestant: Contestant) -> None:
        running = contestant.running
        running.resume()
        for at_once in contestant.at_once:
            round_ = running.measure(at_once, contestant.n_images)
            contestant.record.add(at_once, round_)
            _report(running, at_once, round_)
        running.pause()

    @contextlib.contextmanager
    def _excusing(self, rival: Rival) -> Iterator[None]:
        try:
            yield
        except NotRun as error:
            self.absent[rival.name] = str(error)
            print(f"{rival.name}: not run: {error}")


def run(rivals: Sequence[Rival] = (*PEERS, *OURS), *, hurry: bool = False) -> list[Line]:
    """Run the comparison. `hurry` only checks that it works, with too few images for a result."""
    with tempfile.TemporaryDirectory(prefix="contest-") as folder:
        contest = Contest(Path(folder), hurry=hurry)
        contestants = contest.run(rivals)
    lines = []
    for peer in (each for each in rivals if not each.is_ours):
        for us, goal in itertools.zip_longest(OURS, peer.goals):
            if us in rivals:
                lines.append(_line(contest, contestants, us, peer, goal))
    _write(contest, contestants, lines)
    return lines


def _line(contest: Contest, contestants: dict[str, Contestant], us: Rival, peer: Rival, goal: float | None) -> Line:
    what, wanted = f"{us.name}, over {peer.name}, at no worse p99", "stated" if goal is None else f"≥ {goal:g}"
    kinds = " / ".join(each.name.removeprefix("Sidelight, ") for each in OURS)
    row = "" if goal is None else f"images/s at no worse p99 over {peer.name}: {kinds}"
    for each in (us, peer):
        if each.name not in contestants:
            reason = f"not run: {each.name}: {contest.absent[each.name]}"
            return Line(what=what, figure=None, unit="×", goal=wanted, met=False, detail=reason, row=row)
    ours, theirs = contestants[us.name], contestants[peer.name]
    (n_theirs,) = theirs.at_once
    within = ours.record.fastest_within(theirs.record.p99_s(n_theirs))
    n_ours = ours.record.best() if within is None else within
    times = ours.record.times(n_ours, theirs.record, n_theirs)
    detail = f"{_summary(ours, n_ours)}; peer {_summary(theirs, n_theirs)}"
    if us.alike is not None:
        detail += f"; {contest.fidelity[us.name]}"
    met = times >= (goal or 0.0) and within is not None
    return Line(what=what, figure=times, unit="×", goal=wanted, met=met, detail=detail, row=row)


def _summary(contestant: Contestant, at_once: int) -> str:
    rate, p99_ms = contestant.record.rate(at_once), 1e3 * contestant.record.p99_s(at_once)
    return f"{rate:.1f} images/s, p99 {p99_ms:.0f} ms ({Setting(contestant.running.flags, at_once)})"


def _report(running: Running, at_once: int, round_: Round) -> None:
    name, setting = running.rival.name, Setting(running.flags, at_once)
    print(f"{name}: {setting}: {round_.rate:.1f} images/s, p99 {1e3 * round_.p99_s:.0f} ms")


def _lay_out(folder: Path) -> dict[str, NDArray[np.generic]]:
    """Write the model and the images into the folder. Return the exact maps and predictions."""
    torch.set_num_threads(cpu_quota())
    module = resnet18().module.eval()
    rows = torch.export.Dim("rows", min=1, max=1024)
    exported = torch.export.export(module, (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=({0: rows},))
    torch.export.save(exported, folder / MODEL)
    pixels = np.random.default_rng(0).integers(0, 256, (N_IMAGES, SIZE, SIZE, 3), np.uint8)
    np.save(folder / IMAGES, pixels)
    exact = InputOnly(module).explain(pixels)
    return {"maps": exact.maps, "predicted": exact.predicted}


def _apart(map_: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    return float(np.abs(map_ - exact).max() / exact.max())


def _same_top(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the share of one map's largest pixels that are also among the other's."""
    n = round(TOP * a.size)
    tops = [set(np.argpartition(each.ravel(), -n)[-n:].tolist()) for each in (a, b)]
    return len(tops[0] & tops[1]) / n


def _rank_correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    ranks = [np.argsort(np.argsort(each.ravel())) for each in (a, b)]
    return float(np.corrcoef(np.stack(ranks)).min())


def _write(contest: Contest, contestants: dict[str, Contestant], lines: Sequence[Line]) -> None:
    rounds = {
        name: {
            str(Setting(each.running.flags, n)): [asdict(one) for one in all_] for n, all_ in each.record.rounds.items()
        }
        for name, each in contestants.items()
    }
    swept = {name: {setting: asdict(one) for setting, one in each.items()} for name, each in contest.swept.items()}
    words = {"swept": swept, "rounds": rounds, "not_run": contest.absent, "lines": [asdict(each) for each in lines]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "peers.json").write_text(json.dumps(words, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
