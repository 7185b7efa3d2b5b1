"""Merging: joins the answers to the parts of a batch into one."""

import dataclasses
from itertools import chain

import numpy as np

from sidelight.v1 import attribution_pb2 as pb

from ..exceptions import ModelChanged
from ..results.attribution import Attribution, failed
from ..results.types import Timing
from .scheduling.parts import Entry


def merge_parts(entry: Entry) -> Attribution:
    """Return the answer to a batch whose parts are all answered. If a part failed, its failure is the batch's.

    Preparation and compute times are added; of admission, queue and total times the longest is taken.
    """
    starts = sorted(entry.answers)
    parts = [entry.answers[start] for start in starts]
    if faulty := next((part for part in parts if part.error is not None), None):
        return faulty
    first = parts[0]
    if len(parts) == 1:
        return first
    provenances = [part._provenance for part in parts if part._provenance is not None]
    if len(models := {each.model_digest for each in provenances}) > 1:
        return failed(ModelChanged(
            f"batch {entry.index}: its parts were answered by {len(models)} models, one after another; send it again"
        ), index=entry.index, id_=entry.id)  # fmt: skip
    provenance = _provenance(provenances)
    failures = (
        dataclasses.replace(failure, example=start + failure.example)
        for start, part in zip(starts, parts, strict=True)
        for failure in part.failures
    )
    return dataclasses.replace(
        first,
        maps=np.concatenate([part.maps for part in parts]),
        predictions=tuple(chain.from_iterable(part.predictions for part in parts)),
        targets=tuple(chain.from_iterable(part.targets for part in parts)),
        geometry=tuple(chain.from_iterable(part.geometry for part in parts)),
        convergence=tuple(chain.from_iterable(part.convergence for part in parts)),
        failures=tuple(failures),
        probabilities=None
        if first.probabilities is None
        else np.concatenate([part.probabilities for part in parts if part.probabilities is not None]),
        timing=_timing([part.timing for part in parts if part.timing is not None]),
        transport=first.transport if len({part.transport for part in parts}) == 1 else "inline",
        names=entry.batch.names,
        _batch=entry.batch,
        _provenance=provenance,
    )


def _provenance(parts: list[pb.Provenance]) -> pb.Provenance:
    """Return the first part's provenance, with the digests and per-example classes of all parts.

    `reproducible` is unset if the parts' provenances differ: no single server would reproduce the bytes.
    """
    whole = pb.Provenance()
    whole.CopyFrom(parts[0])
    whole.reproducible = all(
        _without_examples(part) == _without_examples(parts[0]) and part.reproducible for part in parts
    )
    for part in parts[1:]:
        whole.example_digests.extend(part.example_digests)
    if whole.target.WhichOneof("target") == "per_example":
        for part in parts[1:]:
            whole.target.per_example.classes.extend(part.target.per_example.classes)
    return whole


def _without_examples(part: pb.Provenance) -> pb.Provenance:
    """Return a copy without the fields that belong to single examples."""
    shared = pb.Provenance()
    shared.CopyFrom(part)
    shared.ClearField("example_digests")
    shared.target.ClearField("per_example")
    return shared


def _timing(parts: list[Timing]) -> Timing:
    return Timing(
        prepare_s=sum(part.prepare_s for part in parts),
        queue_s=max(part.queue_s for part in parts),
        compute_s=sum(part.compute_s for part in parts),
        total_s=max(part.total_s for part in parts),
        admission_s=max(part.admission_s for part in parts),
        backlog_s=max(part.backlog_s for part in parts),
    )
