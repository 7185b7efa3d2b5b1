"""Integrated gradients and SmoothGrad against Captum doing the same work: rate, maps, peak memory.

Both run alternately on the engine's own thread, so that they have the same threads and allocator.
`python -m benchmarks.speed.captum --peak ours|captum` prints the peak memory of one of them.
"""

import argparse
import asyncio
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from numpy.typing import NDArray
from sidelight_server import Channels, Engine, ModelSpec, Request, Settings
from sidelight_server import IntegratedGradients as OurIntegratedGradients
from sidelight_server import SmoothGrad as OurSmoothGrad
from sidelight_server.compute.replica.replica import replicate
from torch import Tensor, nn

from ..support.measure import Line, in_turns, ratio
from ..support.nets import SIZE, resnet18

BATCH, STEPS, SAMPLES, NOISE = 8, 50, 25, 0.15
INTERNAL_BATCH_SIZES = (8, 16, 50)
EQUAL = 1e-4  # relative L2: another chunk size rounds differently, which may switch a ReLU whose input is close to 0
ROUNDS = 2  # of twenty seconds each, so no warm-up is needed
GOALS = {"float32": 0.95, "float32+fold+channels_last": 1.1, "bfloat16+fold+channels_last": 1.9}
STATUS = Path("/proc/self/status")

OurMethod = OurIntegratedGradients | OurSmoothGrad
Maps = dict[str, NDArray[np.float32]]


def images() -> Tensor:
    """Return the batch, [8, 3, 224, 224]."""
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class Captum:
    """Compute with Captum: the prediction, the map, and for integrated gradients the completeness error."""

    def __init__(self, module: nn.Module) -> None:
        self.module = replicate(module)
        self.internal_batch_size = INTERNAL_BATCH_SIZES[0]

    def probability(self, x: Tensor) -> Tensor:
        return self.module(x).softmax(dim=1)

    def integrated_gradients(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.module(x).argmax(dim=1)
        maps, _ = IntegratedGradients(self.probability).attribute(
            x,
            target=target,
            n_steps=STEPS,
            internal_batch_size=self.internal_batch_size,
            return_convergence_delta=True,
        )
        return maps.detach()

    def smoothgrad(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.module(x).argmax(dim=1)
        spread = float(NOISE * (x.amax() - x.amin()))
        tunnel = NoiseTunnel(Saliency(self.probability))
        maps = tunnel.attribute(
            x.clone().requires_grad_(),
            nt_samples=SAMPLES,
            nt_samples_batch_size=max(1, self.internal_batch_size // BATCH),
            stdevs=spread,
            target=target,
            abs=False,
        )
        return maps.detach()


def ours(engine: Engine, name: str, method: OurMethod, x: Tensor) -> NDArray[np.float32]:
    """Return the engine's maps, [N, C, H, W]."""
    request = Request(x.numpy(), model=name, method=method, channels=Channels.NONE)
    answer = asyncio.run(engine.attribute(request))
    assert not answer.failures
    return answer.maps


def run() -> list[Line]:
    """Measure both methods with the default precision, folded and channels-last, and in bfloat16."""
    x = images()
    base = resnet18().module
    exact = ModelSpec(base, input_size=(3, SIZE, SIZE), name="float32")
    folded = exact.replace(name="float32+fold+channels_last", fold=True, channels_last=True)
    half = folded.replace(name="bfloat16+fold+channels_last", precision="bfloat16")
    specs = [exact, folded, half]
    captum = Captum(base)
    with Engine(specs, Settings(device="cpu")) as engine:
        asyncio.run(engine.warm_up())

        def on_its_thread(work: Callable[[Tensor], Tensor]) -> Tensor:
            return engine._devices[0].worker.call(lambda: work(x)).result()

        captum.internal_batch_size = _best(captum, on_its_thread)
        lines = []
        for what, method, theirs in (
            (f"IG-{STEPS}", OurIntegratedGradients(steps=STEPS), captum.integrated_gradients),
            (f"SmoothGrad-{SAMPLES}", OurSmoothGrad(samples=SAMPLES, noise_level=NOISE), captum.smoothgrad),
        ):
            maps: dict[str, NDArray[np.float32]] = {}

            def run_captum(theirs: Callable[[Tensor], Tensor] = theirs, maps: Maps = maps) -> None:
                maps["captum"] = on_its_thread(theirs).numpy()

            def run_ours(name: str, method: OurMethod = method, maps: Maps = maps) -> None:
                maps[name] = ours(engine, name, method, x)

            rivals = {"captum": run_captum} | {name: functools.partial(run_ours, name) for name in GOALS}
            seconds = in_turns(rivals, rounds=ROUNDS, warm_up=False)
            apart = _distance(maps["float32"], maps["captum"])
            method_draws = isinstance(method, OurSmoothGrad)  # not Captum's maps: tests check that those are equal
            for name in GOALS:
                times = ratio(seconds["captum"], seconds[name])
                lines.append(
                    Line(
                        what=f"{what} over Captum's, ResNet-18, batch {BATCH}, {name}",
                        figure=times,
                        unit="×",
                        goal=f"≥ {GOALS[name]}",
                        met=times >= GOALS[name] and (apart <= EQUAL or method_draws),
                        detail=f"Captum's internal_batch_size {captum.internal_batch_size}; "
                        f"distance of the float32 maps {apart:.1e}"
                        + (", its draws are others" if what.startswith("Smooth") else ""),
                    )
                )
    return [*lines, _peak_line()]


def _best(captum: Captum, on_its_thread: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> int:
    """Return the internal batch size at which Captum is fastest."""

    def with_size(size: int) -> None:
        captum.internal_batch_size = size
        on_its_thread(captum.integrated_gradients)

    seconds = in_turns(
        {str(size): lambda size=size: with_size(size) for size in INTERNAL_BATCH_SIZES}, rounds=1, warm_up=False
    )
    return int(min(seconds, key=lambda size: seconds[size][0]))


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _peak_line() -> Line:
    command = [sys.executable, "-m", "benchmarks.speed.captum", "--peak"]
    peaks = {
        who: float(subprocess.run([*command, who], check=True, capture_output=True, text=True).stdout)
        for who in ("ours", "captum")
    }
    share = peaks["ours"] / peaks["captum"]
    return Line(
        what=f"peak memory of IG-{STEPS}, batch {BATCH}, over Captum's",
        figure=share,
        unit="×",
        goal="< 1",
        met=share < 1,
        detail=f"{peaks['ours']:.0f} MiB and {peaks['captum']:.0f} MiB more than before the first map",
    )


def _peak(who: str) -> float:
    """Return by how much one batch raises the process's peak memory, in MiB."""
    x, module = images(), resnet18().module
    method = OurIntegratedGradients(steps=STEPS)
    spec = ModelSpec(module, input_size=(3, SIZE, SIZE), name="float32")
    # Captum runs with the engine's number of threads and, like the engine, after a first pass.
    with Engine([spec], Settings(device="cpu", max_chunk_rows=8)) as engine:
        captum = Captum(module)
        engine._devices[0].worker.call(lambda: captum.module(x[:1])).result()
        before = _status("VmRSS")
        if who == "ours":
            ours(engine, "float32", method, x)
        else:
            engine._devices[0].worker.call(lambda: captum.integrated_gradients(x)).result()
        return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", choices=("ours", "captum"), required=True)
    print(_peak(parser.parse_args().peak))
