"""Replay: computes a saved answer again and compares the two, to the last bit."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.batch import Images, single_batch
from .._inputs.enums import map_dtype_number
from .._inputs.images import EncodedBatch
from .._inputs.tensors import Array, floats
from .._options import duration
from ..exceptions import InvalidArgument
from ..methods.baselines import given_tensor
from . import storage
from .attribution import Attribution
from .storage import Record
from .types import Provenance

if TYPE_CHECKING:
    from .._client import Client

TIMEOUT_S = 60.0
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


def replay(
    client: "Client",
    saved: str | os.PathLike[str],
    images: Images,
    *,
    baseline: str | os.PathLike[str] | Array | None = None,
    timeout: float = TIMEOUT_S,
) -> Replay:
    """Compute an answer that `Attribution.save` wrote again, and compare.

    `saved` is the folder or the `answer.json` in it; `images` are the batch that it explained: the same files, byte for
    byte, or the same arrays. Others are refused as another picture. `baseline` is the array that the method was given,
    or its file (None: the saved `baseline.npy`). `timeout` is in seconds. Raises as `Client.attribute` does;
    `UnreadableFile` for a file that cannot be read, and `InvalidArgument` for one that holds something else, or images
    that are others or not as many.
    """
    record, batch = storage.load(Path(saved)), EncodedBatch(single_batch(images))
    if len(batch) != len(record.digests):
        raise InvalidArgument(f"images: got {len(batch)}, expected {len(record.digests)}, as many as the answer has")
    _check_examples(record, batch)
    answer = client._explain(_request(record, baseline, timeout), batch, timeout_s=timeout)
    return Replay(
        examples=tuple(_replayed(record, answer, i) for i in range(len(batch))),
        differences=_differences(Provenance.of(record.provenance), answer.provenance),
        reproducible=record.provenance.reproducible,
        tolerance=TOLERANCE + _STEPS.get(record.map_dtype, 0.0),
        answer=answer,
    )


def _check_examples(record: Record, batch: EncodedBatch) -> None:
    """Refuse examples that are not those that were explained, where the record says which these were."""
    saved = record.provenance.example_digests
    for i, (then, now) in enumerate(zip(saved, batch.digests(), strict=False)):
        if then != now:
            told = f' "{record.names[i]}"' if record.names[i] else ""
            raise InvalidArgument(
                f"images: example {i} is another picture than the one{told} that the answer explains: its SHA-256 is "
                f"{now}, the record has {then}"
            )


def _request(record: Record, baseline: str | os.PathLike[str] | Array | None, timeout: float) -> pb.AttributeRequest:
    """Return the message that asked for the answer, without its images."""
    saved = record.provenance
    return pb.AttributeRequest(
        model=saved.model,
        target=saved.target,
        method=_method(record, baseline),
        score=saved.score,
        channels=saved.channels,
        output=pb.Output(map_dtype=map_dtype_number(record.map_dtype)),
        timeout=duration(timeout),
    )


def _method(record: Record, baseline: str | os.PathLike[str] | Array | None) -> pb.Method:
    """Return the method that was asked for, with the array that it was given: provenance has only its digest."""
    method = pb.Method()
    method.CopyFrom(record.provenance.method)
    tensor = given_tensor(method)
    if tensor is None:
        if baseline is not None:
            raise InvalidArgument("baseline: got one, but the answer's method was not given any")
        return method
    if baseline is None or isinstance(baseline, str | os.PathLike):
        baseline = storage.load_array(Path(baseline or record.folder / storage.BASELINE))
    tensor.CopyFrom(floats(baseline, "baseline", expected="the floating array that the method was given"))
    return method


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
