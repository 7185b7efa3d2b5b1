"""Memory, descriptors and threads of a process, before and after a load."""

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from .measure import Line

IDLE_S = 30.0  # gRPC ends an additional thread after 20 idle seconds
POOL = "event_engine"  # gRPC's name for the threads of its pool
REST_S = 0.5
GROWTH_GOAL = 0.02  # of the resident memory before
TRIM_S = 0.25
REST_SHARE = 0.1  # of one core's time: a process that used less is at rest


def without_reserve() -> None:
    """Return freed memory to the system whenever this process, a server that is measured, is at rest.

    Otherwise a server keeps it for the next chunk. The amount varies: after the same load, resident memory was 300 to
    450 MiB, in which a leak of a few MiB would not be visible.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library, which keeps none
        trim = ctypes.CDLL("libc.so.6").malloc_trim
        threading.Thread(target=_trim_at_rest, args=(trim,), daemon=True).start()


def _trim_at_rest(trim: Callable[[int], int]) -> None:
    used_s = time.process_time()
    while True:
        time.sleep(TRIM_S)
        before_s, used_s = used_s, time.process_time()
        if used_s - before_s < REST_SHARE * TRIM_S:
            trim(0)


@dataclass(frozen=True, slots=True)
class Held:
    """Counts at one moment; `memory` is the resident memory in bytes.

    gRPC changes the number of threads of its pool at any time, four to six on two cores. They are reported, but
    have no goal.
    """

    memory: int
    descriptors: int
    threads: int
    pool: int

    @classmethod
    def by(cls, process: psutil.Process) -> Self:
        """Return the counts of a process now."""
        names = [_name(thread) for thread in Path(f"/proc/{process.pid}/task").iterdir()]
        n_pool = names.count(POOL)
        return cls(process.memory_info().rss, process.num_fds(), len(names) - n_pool, n_pool)

    def returned(self, before: Self, *, more_threads: int = 0) -> bool:
        """Return whether descriptors are no more than before, and threads at most `more_threads` more."""
        return self.descriptors <= before.descriptors and self.threads <= before.threads + more_threads


def _name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text().strip()
    except OSError:  # the thread has ended
        return ""


def settled(process: psutil.Process, before: Held | None = None) -> Held:
    """Wait until the counts are stable and descriptors and threads no more than before; return the counts.

    A process notices the end of a caller only after a moment, and releases its resources after that.
    """
    until_s = time.monotonic() + IDLE_S
    held = Held.by(process)
    while time.monotonic() < until_s:
        time.sleep(REST_S)
        last, held = held, Held.by(process)
        if held == last and (before is None or held.returned(before)):
            break
    return held


def growth(during: str, before: Held, after: Held, *, more_threads: int = 0, detail: str = "") -> Line:
    """Return the line of the table: memory may grow by less than `GROWTH_GOAL`, descriptors and threads not at all.

    `more_threads`: how many threads a bounded pool may have started meanwhile.
    """
    share = after.memory / before.memory - 1
    counts = f"descriptors {before.descriptors} → {after.descriptors}, threads {before.threads} → {after.threads}"
    pools = f"gRPC's pool {before.pool} → {after.pool}"
    memory = f"{before.memory / 2**20:.1f} → {after.memory / 2**20:.1f} MiB"
    return Line(
        what=f"growth of resident memory {during}",
        figure=100 * share,
        unit="%",
        goal=f"< {100 * GROWTH_GOAL:g}, descriptors and threads as before",
        met=share < GROWTH_GOAL and after.returned(before, more_threads=more_threads),
        detail="; ".join(filter(None, (f"{memory}, {counts}, {pools}", detail))),
    )
