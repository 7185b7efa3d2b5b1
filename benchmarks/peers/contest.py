"""The contest: every rival at its best settings, in turns; ours at settings whose p99 is no worse.

The CPUs are shared by clients and servers, so each server sleeps while another is measured.
"""

import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sidelight_server.compute.torch_device import cpu_quota

from ..support.measure import Line
from ..support.nets import SIZE, resnet18
from .field import FAST, OURS, PEERS
from .record import Record, Round
from .rival import Flags, NotRun, Rival, Setting
from .running import Running
from .saliency import IMAGES, MODEL, InputOnly

RESULTS = Path(__file__).parent.parent / "results"

N_IMAGES = 16  # different ones
TYPICAL = 8  # asked at once, where flags are compared
SWEEP_IMAGES, ROUND_IMAGES, ROUND_S, ROUNDS = 32, 80, 5.0, 3
EQUAL = 1e-5  # of the map's maximum: a chunk of another size moves last bits
ALIKE = 0.9  # rank correlation of maps in bfloat16
FAST_GOAL = 2.0


@dataclass(frozen=True, slots=True)
class Contestant:
    """A rival that runs, under the flags that suit it best."""

    rival: Rival
    running: Running
    at_once: tuple[int, ...]
    n_images: int
    record: Record = field(default_factory=Record)


class Contest:
    """One contest in one folder, where the model, the images and the exact maps lie."""

    def __init__(self, folder: Path, *, hurry: bool) -> None:
        self.folder = folder
        self.swept: dict[str, dict[str, Round]] = {}
        self.absent: dict[str, str] = {}  # reason, by the name of a peer that cannot run
        self.fidelity = float("nan")
        self._hurry = hurry
        self._exact = _lay_out(folder)

    def run(self, rivals: Sequence[Rival]) -> dict[str, Contestant]:
        """Measure the peers. Those that cannot run are in `absent`, with the reason."""
        with contextlib.ExitStack() as stack:
            contestants = {}
            for rival in rivals:
                with self._excusing(rival):
                    contestants[rival.name] = self._enter(stack, rival)
            for _ in range(ROUNDS):
                for name in list(contestants):
                    with self._excusing(contestants[name].rival):
                        self._turn(contestants[name])
                    if name in self.absent:
                        contestants.pop(name).running.stop()
        return contestants

    def _enter(self, stack: contextlib.ExitStack, rival: Rival) -> Contestant:
        """Start a rival under its best flags, and leave it asleep."""
        flags, record = self._best_flags(rival), Record()
        with contextlib.ExitStack() as own:
            running = own.enter_context(Running(rival, flags, self.folder))
            self._check(running)
            for n in rival.at_once:
                record.add(n, self._try(running, n))
            running.pause()
            stack.push(own.pop_all())
        # What ours has to offer is chosen for each peer, when all is measured.
        at_once = rival.at_once if rival.is_ours else (record.best(),)
        many = round(max(map(record.rate, rival.at_once)) * ROUND_S / 16) * 16
        return Contestant(rival, running, at_once, SWEEP_IMAGES if self._hurry else max(ROUND_IMAGES, many))

    def _best_flags(self, rival: Rival) -> Flags:
        rates = {}
        for flags in rival.flags if len(rival.flags) > 1 else ():
            with Running(rival, flags, self.folder) as running:
                running.measure(TYPICAL, N_IMAGES)  # to warm up
                rates[flags] = self._try(running, TYPICAL).rate
        return max(rates, key=rates.__getitem__, default=rival.flags[0])

    def _try(self, running: Running, at_once: int) -> Round:
        round_ = running.measure(at_once, SWEEP_IMAGES)
        _report(running, at_once, round_)
        self.swept.setdefault(running.rival.name, {})[str(Setting(running.flags, at_once))] = round_
        return round_

    def _check(self, running: Running) -> None:
        """Raise `NotRun` if a rival's maps are not the exact ones."""
        path = self.folder / "answers.npz"
        running.measure(TYPICAL, N_IMAGES, answers=path)
        answers = np.load(path)
        same = answers["predicted"] == self._exact["predicted"]
        if running.rival.exact:
            apart = max(_apart(*each) for each in zip(answers["maps"], self._exact["maps"], strict=True))
            if apart > EQUAL or not same.all():
                raise NotRun(f"its maps are off by {apart:.1e} of their maximum, {(~same).sum()} predictions differ")
        else:
            pairs = zip(answers["maps"][same], self._exact["maps"][same], strict=True)
            self.fidelity = statistics.mean(_rank_correlation(*each) for each in pairs)
            if self.fidelity < ALIKE:
                raise NotRun(f"its maps have rank correlation {self.fidelity:.2f} with the exact ones")

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


def run(rivals: Sequence[Rival] = (*PEERS, OURS, FAST), *, hurry: bool = False) -> list[Line]:
    """Hold the contest. `hurry` is to see that it works: too few images to count."""
    with tempfile.TemporaryDirectory(prefix="contest-") as folder:
        contest = Contest(Path(folder), hurry=hurry)
        contestants = contest.run(rivals)
    lines = []
    for peer in (each for each in rivals if not each.is_ours):
        for us, goal in ((OURS, peer.goal), (FAST, FAST_GOAL)):
            if us in rivals:
                lines.append(_line(contest, contestants, us, peer, goal))
    _write(contest, contestants, lines)
    return lines


def _line(contest: Contest, contestants: dict[str, Contestant], us: Rival, peer: Rival, goal: float) -> Line:
    what = f"{us.name}, over {peer.name}, at no worse p99"
    for each in (us, peer):
        if each.name not in contestants:
            reason = f"not run: {each.name}: {contest.absent[each.name]}"
            return Line(what=what, figure=0.0, unit="×", goal=f"≥ {goal:g}", met=False, detail=reason)
    ours, theirs = contestants[us.name], contestants[peer.name]
    (n_theirs,) = theirs.at_once
    within = ours.record.fastest_within(theirs.record.p99_s(n_theirs))
    n_ours = ours.record.best() if within is None else within
    times = ours.record.times(n_ours, theirs.record, n_theirs)
    detail = f"{_summary(ours, n_ours)}; peer {_summary(theirs, n_theirs)}"
    if not us.exact:
        detail += f"; rank correlation of its maps with the exact ones {contest.fidelity:.3f}"
    met = times >= goal and within is not None
    return Line(what=what, figure=times, unit="×", goal=f"≥ {goal:g}", met=met, detail=detail)


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
