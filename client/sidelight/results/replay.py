"""Replays: an answer that was computed again, compared with the saved one to the last bit."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import storage
from .attribution import Attribution
from .storage import Record
from .types import Provenance

TOLERANCE = 1e-5  # of a map's maximum: what an answer beside other examples, that is not reproducible, may differ by
# Where maps were rounded for their way, a last bit may round the other way: one step of the type more.
_STEPS = {"float16": 2.0**-10, "uint8": 1 / 255}


@dataclass(frozen=True, slots=True)
class Replayed:
    """One example, computed again."""

    equal: bool  # to the last bit; so are two that failed
    difference: float | None  # the largest, as a share of the saved map's maximum; None where that map is not there


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact of the provenance that is not what it was."""

    name: str
    then: str
    now: str


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """How an answer came out the second time."""

    examples: tuple[Replayed, ...]
    differences: tuple[Difference, ...]
    reproducible: bool  # whether equal bytes were promised
    tolerance: float  # what else an example may differ by, as a share of its map's maximum
    answer: Attribution = dataclasses.field(repr=False)  # the second one

    @property
    def equal(self) -> bool:
        """Whether every map is equal to the last bit."""
        return all(each.equal for each in self.examples)

    @property
    def within_tolerance(self) -> bool:
        """Whether every map is known to differ by no more than the tolerance."""
        return all(each.difference is not None and each.difference <= self.tolerance for each in self.examples)

    @property
    def kept(self) -> bool:
        """Whether the answer came out as it was promised: equal, or unless that was promised within the tolerance."""
        return self.equal or (self.within_tolerance and not self.reproducible)


def compare(record: Record, answer: Attribution) -> Replay:
    """Compare an answer with a saved one of the same examples."""
    return Replay(
        examples=tuple(_replayed(record, answer, i) for i in range(len(record.digests))),
        differences=_differences(Provenance.of(record.provenance), answer.provenance),
        reproducible=record.provenance.reproducible,
        tolerance=TOLERANCE + _STEPS.get(record.map_dtype, 0.0),
        answer=answer,
    )


def _replayed(record: Record, answer: Attribution, i: int) -> Replayed:
    then, now = record.digests[i], storage.digests(answer)[i]
    if then == now:
        return Replayed(equal=True, difference=0.0)
    if then is None or now is None or record.maps is None:
        return Replayed(equal=False, difference=None)
    return Replayed(equal=False, difference=_share(record.maps[i], answer.maps[i]))


def _share(then: NDArray[np.float32], now: NDArray[np.float32]) -> float | None:
    """Return the largest difference as a share of the first map's maximum; None where they cannot be compared."""
    if then.shape != now.shape or not (np.isfinite(then).all() and np.isfinite(now).all()):
        return None
    difference, most = float(np.abs(now - then).max(initial=0)), float(np.abs(then).max(initial=0))
    if not difference:
        return 0.0  # a zero has two signs
    return difference / most if most else float("inf")


def _differences(then: Provenance, now: Provenance | None) -> tuple[Difference, ...]:
    before, after = _flat(then), {} if now is None else _flat(now)
    names = [*before, *(name for name in after if name not in before)]
    pairs = ((name, before.get(name, ""), after.get(name, "")) for name in names)
    return tuple(Difference(*each) for each in pairs if each[1] != each[2] and not _says_nothing(*each))


def _says_nothing(name: str, then: str, now: str) -> bool:
    """Say whether two canaries cannot be compared: one is not known, or they are of inputs of other sizes."""
    return name == "model_canary" and (not then or not now or then.partition(":")[0] != now.partition(":")[0])


def _flat(provenance: Provenance) -> dict[str, str]:
    facts = {
        name: str(fact)
        for name, fact in dataclasses.asdict(provenance).items()
        if name not in ("software", "example_digests")
    }
    return facts | provenance.software
