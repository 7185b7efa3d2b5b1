"""Malformed inputs and failing models while good requests run, a drain, and servers that die.

`python -m benchmarks.soak.faults` prints figures of `docs/explanation/reliability.md`.
"""

import resource
import signal
from collections.abc import Iterator

from ...support.measure import Line
from .ends import death, drain
from .storm import storm

SECONDS = 60.0


def run(seconds: float = SECONDS) -> Iterator[Line]:
    """Run everything. Takes 4/3 of `seconds` and about 90 s."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))
    try:
        yield from storm(seconds)
        yield drain()
        yield death(signal.SIGKILL)
        yield death(signal.SIGSTOP)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
