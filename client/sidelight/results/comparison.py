"""The comparison of a recomputed answer with the saved one, bit by bit."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import storage
from .attribution import Attribution
from .storage import Record
from .types import Provenance

# Permitted difference, as a share of a map's maximum, if the answer is not reproducible: other rows in the same chunk
# change its rounding.
TOLERANCE = 1e-5
# Added for maps that were sent in a shorter type: their last bit may round the other way.
_STEPS = {"float16": 2.0**-10, "uint8": 1 / 255}


@dataclass(frozen=True, slots=True)
class Replayed:
    """The comparison of one recomputed example."""

    equal: bool  # bit for bit; also if both failed
    difference: float | None  # the largest, as a share of the saved map's maximum; None if there is no saved map


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of provenance that changed."""

    name: str
    then: str
    now: str


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A recomputed answer, and how it differs from the saved one."""

    examples: tuple[Replayed, ...]
    differences: tuple[Difference, ...]
    reproducible: bool  # whether the server guaranteed equal bytes
    tolerance: float  # permitted difference without that guarantee, as a share of each map's maximum
    answer: Attribution = dataclasses.field(repr=False)  # the recomputed one

    @property
    def equal(self) -> bool:
        """Whether every map is equal bit for bit."""
        return all(each.equal for each in self.examples)

    @property
    def within_tolerance(self) -> bool:
        """Whether the difference of every map is known and at most the tolerance."""
        return all(each.difference is not None and each.difference <= self.tolerance for each in self.examples)

    @property
    def kept(self) -> bool:
        """Whether the server kept its guarantee: equal bytes if `reproducible`, else maps within the tolerance."""
        return self.equal or (self.within_tolerance and not self.reproducible)


def compare(record: Record, answer: Attribution) -> Replay:
    """Compare a recomputed answer with the saved one."""
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
    """Return the largest difference as a share of the saved map's maximum; None if shapes differ or a value is NaN."""
    if then.shape != now.shape or not (np.isfinite(then).all() and np.isfinite(now).all()):
        return None
    difference, most = float(np.abs(now - then).max(initial=0)), float(np.abs(then).max(initial=0))
    if not difference:
        return 0.0  # the bytes differ only in the sign of zeros
    return difference / most if most else float("inf")


def _differences(then: Provenance, now: Provenance | None) -> tuple[Difference, ...]:
    before, after = _flat(then), {} if now is None else _flat(now)
    names = [*before, *(name for name in after if name not in before)]
    pairs = ((name, before.get(name, ""), after.get(name, "")) for name in names)
    return tuple(Difference(*each) for each in pairs if each[1] != each[2] and not _is_not_comparable(*each))


def _is_not_comparable(name: str, then: str, now: str) -> bool:
    """Return whether the field is the canary, and the two cannot be compared: one is unknown, or input sizes differ."""
    return name == "model_canary" and (not then or not now or then.partition(":")[0] != now.partition(":")[0])


def _flat(provenance: Provenance) -> dict[str, str]:
    facts = {
        name: str(fact)
        for name, fact in dataclasses.asdict(provenance).items()
        if name not in ("software", "example_digests")
    }
    return facts | provenance.software
