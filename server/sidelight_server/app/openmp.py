"""OpenMP: how long the threads of a CPU operation spin while they wait for the next one.

GNU's OpenMP, which torch for Linux brings, spins for milliseconds. Alone that is fastest. On cores that other processes
use too, which is where a sidecar runs, a spinning thread takes the time that the thread it waits for needs: computing
was seen to take 5 to 20 times as long. `benchmarks/contention.py` measures it.
"""

import os

SPIN_COUNT = 1000  # iterations, some microseconds: a barrier between two busy threads is shorter
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # any of them is somebody's own choice


def sleep_soon() -> None:
    """Let OpenMP's threads spin briefly and then sleep, unless the environment says otherwise.

    To be called before torch is imported: the library reads the variable once, when it is loaded.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
