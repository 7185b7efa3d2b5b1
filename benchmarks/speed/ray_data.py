"""Ray Data: two actors of one thread each, compared with one process of two threads, on the same folder of pictures."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..support.measure import Line
from ..support.nets import SMALL

N_PICTURES, BATCH = 1024, 32
ROUNDS = 3
GOAL = 0.9
MODEL = "python:benchmarks.support.nets:resnet18_small"

# Both print the pictures per second from their first batch on, so that the start of a process does not count.
COMMON = f"""
import glob, sys, time
from sidelight_server.app.openmp import limit_spinning
limit_spinning()
from sidelight_server.ray import Explainer
paths = sorted(glob.glob(sys.argv[1] + "/*.png"))
options = {{"model": {MODEL!r}, "device": "cpu"}}

def rate(batches):
    sizes = map(len, batches)
    next(sizes)
    began = time.perf_counter()
    print(sum(sizes) / (time.perf_counter() - began))
"""
PLAIN = f"""{COMMON}
from concurrent.futures import ThreadPoolExecutor
import numpy as np
explain = Explainer(**options, threads=2)
batches = [{{"path": np.array(paths[at : at + {BATCH}], object)}} for at in range(0, len(paths), {BATCH})]
with ThreadPoolExecutor(2) as threads:
    rate(rows["map"] for rows in threads.map(explain, batches))
"""
ACTORS = f"""{COMMON}
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
data = ray.data.from_items([{{"path": path}} for path in paths], override_num_blocks={N_PICTURES // BATCH}).map_batches(
    Explainer, fn_constructor_kwargs=options, batch_size={BATCH}, num_cpus=1,
    compute=ray.data.ActorPoolStrategy(size=2, enable_true_multi_threading=True, max_concurrent_calls_per_actor=2),
)
rate(batch["map"] for batch in data.iter_batches(batch_size={BATCH}))
"""


def run() -> list[Line]:
    """Measure both alternately on a ResNet-18 at 64²."""
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        for seed in range(N_PICTURES):
            pixels = np.random.default_rng(seed).integers(0, 256, (SMALL, SMALL, 3), np.uint8)
            Image.fromarray(pixels).save(Path(folder) / f"{seed:05d}.png")
        rates = [(_rate(ACTORS, folder), _rate(PLAIN, folder)) for _ in range(ROUNDS)]
    share = float(np.median([actors / plain for actors, plain in rates]))
    actors, plain = np.median(rates, axis=0)
    return [
        Line(
            what="Ray Data, two actors of one thread, over one process with two threads",
            figure=share,
            unit="×",
            goal=f"≥ {GOAL:g}",
            met=share >= GOAL,
            detail=f"{actors:.1f} and {plain:.1f} pictures/s, ResNet-18 at {SMALL}², {N_PICTURES} files",
        )
    ]


def _rate(program: str, folder: str) -> float:
    root = Path(__file__).parent.parent.parent
    # Ray starts its workers at priority 15, so that other programs would slow down only them.
    environment = os.environ | {"PYTHONPATH": str(root), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", program, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
