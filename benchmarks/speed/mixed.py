"""Mixed precision: its speedup over the exact kernel and its distance to float64; and SmoothGrad in half precision.

Speed is that of the kernel on batches of 8 at 224², in turns. Fidelity is that of the maps of the demonstration's
photographs, for the logit of the class that float64 predicts.
"""

import asyncio
import copy
import functools
import math
import statistics
from typing import Any

import numpy as np
import torch
from captum.attr import NoiseTunnel, Saliency
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sidelight._cli.demo import photographs
from sidelight_server import (
    Answer,
    Channels,
    Engine,
    Files,
    ModelSpec,
    PerExample,
    Request,
    Score,
    Settings,
    SmoothGrad,
)
from sidelight_server.compute.kernel import Kernel
from sidelight_server.compute.replica.replica import replicate
from sidelight_server.compute.torch_device import cpu_quota
from sidelight_server.config.options import KernelOptions

from ..support.measure import Line, in_turns, ratio
from ..support.nets import SIZE, efficientnet_lite0, resnet18
from .kernel import maps

BATCH = 8
NETWORKS = {"EfficientNet-Lite0": efficientnet_lite0, "ResNet-18": resnet18}
FOLDED = {"fold": True, "channels_last": True}
GOALS = ((0.99, 1.35), (0.95, 1.5))  # goal of the rank correlation at that speed
OWN = ("mixed", "bfloat16")  # precisions of SmoothGrad
SAMPLES, DRAWS, NOISE, N_IMAGES = 25, 600, 0.15, 2


def run() -> list[Line]:
    """Measure both networks, and SmoothGrad on the trained one."""
    torch.set_num_threads(cpu_quota())
    lines = [line for name, factory in NETWORKS.items() for line in _against_exact(name, factory())]
    return [*lines, *_smoothgrad(efficientnet_lite0())]


def _against_exact(name: str, spec: ModelSpec) -> list[Line]:
    likeness = _likeness(spec)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    device, options = torch.device("cpu"), KernelOptions(precision="mixed", **FOLDED)
    kernels = {
        "exact": Kernel(spec.module, device=device),
        "mixed": Kernel(spec.module, device=device, options=options, trial=images[:2]),
    }
    seconds = in_turns({which: functools.partial(maps, kernel, images) for which, kernel in kernels.items()})
    times = ratio(seconds["exact"], seconds["mixed"])
    return [
        Line(
            what=f"mixed+fold+channels_last over exact, {name}, at a rank correlation of at least {least}",
            figure=times,
            unit="×",
            goal=f"≥ {goal}",
            met=times >= goal and likeness >= least,
            detail=f"rank correlation with float64 {likeness:.4f}",
            row=f"mixed+fold+channels_last over exact, rank correlation at least {least}: {' / '.join(NETWORKS)}",
        )
        for least, goal in GOALS
    ]


def _likeness(spec: ModelSpec) -> float:
    """Return the mean rank correlation of the mixed maps of the photographs with those in float64."""
    files = Files(tuple(path.read_bytes() for path in photographs()))
    double = _explained(spec.replace(module=copy.deepcopy(spec.module).double()), files)
    classes = PerExample(tuple(each.predicted for each in double.explanations if each))
    mixed = _explained(spec.replace(precision="mixed", **FOLDED), files, target=classes)
    pairs = zip(mixed.maps, double.maps, strict=True)
    return statistics.mean(float(spearmanr(a.ravel(), b.ravel()).statistic) for a, b in pairs)


def _explained(spec: ModelSpec, images: Files | NDArray[np.float32], **question: Any) -> Answer:
    with Engine([spec], Settings(device="cpu", max_chunk_rows=BATCH)) as engine:
        answer = asyncio.run(engine.attribute(Request(images, score=Score.LOGIT, **question)))
    assert not answer.failures
    return answer


def _smoothgrad(spec: ModelSpec) -> list[Line]:
    """Measure SmoothGrad in precisions of its own against Captum's: speed, and distance to a map of many draws."""
    images = torch.randn(N_IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    question: dict[str, Any] = {"channels": Channels.NONE, "score": Score.LOGIT}
    spec = spec.replace(mean=None, std=None, **FOLDED)
    best = _explained(spec, images.numpy(), method=SmoothGrad(DRAWS, noise_level=NOISE), channels=Channels.NONE)
    target = PerExample(tuple(each.predicted for each in best.explanations if each))
    apart: dict[str, list[float]] = {name: [] for name in ("captum", *OWN)}  # each round draws anew
    tunnel = NoiseTunnel(Saliency(replicate(spec.module)))

    def captum() -> None:
        drawn = [
            tunnel.attribute(
                image[None].clone().requires_grad_(),
                nt_samples=SAMPLES,
                nt_samples_batch_size=BATCH,
                stdevs=float(NOISE * (image.amax() - image.amin())),
                target=class_,
                abs=False,
            )
            for image, class_ in zip(images, target.choices, strict=True)
        ]
        apart["captum"].append(_distance(torch.cat(drawn).detach().numpy(), best.maps))

    def ours(name: str) -> None:
        method = SmoothGrad(SAMPLES, noise_level=NOISE, seed=1 + len(apart[name]))
        asked = Request(images.numpy(), model=name, method=method, target=target, **question)
        apart[name].append(_distance(asyncio.run(engine.attribute(asked)).maps, best.maps))

    models = [spec.replace(name=name, method_precision={"smoothgrad": name}) for name in OWN]
    with Engine(models, Settings(device="cpu")) as engine:
        asyncio.run(engine.warm_up())
        seconds = in_turns({"captum": captum} | {name: functools.partial(ours, name) for name in OWN})
    return [
        Line(
            what=f"SmoothGrad-{SAMPLES} in {name}, in a model of float32, over Captum's, EfficientNet-Lite0",
            figure=(times := ratio(seconds["captum"], seconds[name])),
            unit="×",
            goal=f"≥ 2, no farther from {DRAWS} draws",
            met=times >= 2 and _is_no_farther(apart[name], apart["captum"]),
            detail=f"relative L2 distance to the map of {DRAWS} draws, mean and standard deviation: "
            f"{_spread(apart[name])}, Captum's {_spread(apart['captum'])}",
            row=f"SmoothGrad-{SAMPLES} in its own precision over Captum's, EfficientNet-Lite0: {' / '.join(OWN)}",
        )
        for name in OWN
    ]


def _distance(found: NDArray[np.float32], best: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - best) / np.linalg.norm(best))


def _is_no_farther(ours: list[float], theirs: list[float]) -> bool:
    """Return whether the mean of our distances is no greater than theirs, within two standard errors."""
    error = math.hypot(*(statistics.stdev(each) / math.sqrt(len(each)) for each in (ours, theirs)))
    return statistics.mean(ours) <= statistics.mean(theirs) + 2 * error


def _spread(distances: list[float]) -> str:
    return f"{statistics.mean(distances):.3f} ± {statistics.stdev(distances):.3f}"
