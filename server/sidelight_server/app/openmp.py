"""OpenMP: how long its threads spin while they wait for work.

GNU OpenMP, which torch uses on Linux, spins for milliseconds. On dedicated cores that is fastest. On cores that are
shared with other processes, as for a sidecar, spinning threads take CPU time from the threads that they wait for:
computation took 5 to 20 times as long. `benchmarks/speed/contention.py` measures it.
"""

import os

SPIN_COUNT = 1000  # iterations, a few microseconds: longer than a barrier between two running threads
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # if one is set, the environment decides


def limit_spinning() -> None:
    """Make OpenMP threads spin only briefly before they sleep, unless the environment sets it.

    Call it before torch is imported: the library reads the variable once, when it is loaded.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
