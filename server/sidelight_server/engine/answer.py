"""The answer to a request, with its provenance and its times."""

import platform
import time
from dataclasses import dataclass, replace
from importlib import metadata

import numpy as np
import torch

from ..domain import Answer, Provenance, Timing
from .active_request import ActiveRequest

Software = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Clock:
    """When a request arrived, was admitted and was prepared, on the monotonic clock."""

    arrived_s: float
    admitted_s: float
    prepared_s: float


def software_versions() -> Software:
    """Return the names and versions of the packages that compute maps."""
    return (
        ("sidelight", metadata.version("sidelight")),
        ("torch", torch.__version__),
        ("numpy", np.__version__),
        ("python", platform.python_version()),
    )


def assemble_answer(
    active: ActiveRequest, clock: Clock, *, backlog_s: float, threads: int, software: Software, final: bool = True
) -> Answer:
    """Return the answer to a request; with `final` unset, the partial answer so far."""
    model, identity, now_s = active.model, active.identity, time.monotonic()
    started_s = active.started_s or now_s
    return Answer(
        request=replace(active.request, images=np.empty(0, np.uint8), model=model.name),
        **active.snapshot(),
        labels=model.labels,
        provenance=Provenance(
            model=model.name,
            model_version=model.version,
            model_digest=identity.digest,
            model_canary=identity.canary,
            precision=model.precision_of(active.kernel),
            head_precision=active.kernel.head_precision(active.request.score, plain_head=active.request.plain_head),
            kernel_options=active.kernel.options.names,
            fidelity=model.fidelity.get(active.kernel.summary),
            device=str(model.kernel.device),
            threads=threads,
            chunk_rows=model.chunk_rows,
            reproducible=model.reproducible,
            baseline_digest=active.prepared.baseline_digest,
            software=software,
        ),
        timing=Timing(
            admission_s=clock.admitted_s - clock.arrived_s,
            prepare_s=clock.prepared_s - clock.admitted_s,
            queue_s=max(0.0, started_s - clock.prepared_s),
            compute_s=max(0.0, (active.ended_s if final else now_s) - started_s),
            total_s=now_s - clock.arrived_s,
            backlog_s=backlog_s,
        ),
        final=final,
    )
