"""Mixed precision: its speedup over the exact kernel and its distance to float64; and SmoothGrad in half precision.

Speed is that of the kernel on batches of 8 at 224², in turns. Fidelity is that of the maps of the demonstration's
photographs, for the logit of the class that float64 predicts.
"""

import asyncio
import copy
import functools
import itertools
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
SAMPLES, DRAWS, NOISE, N_IMAGES = 25, 600, 0.15, 2


def run() -> list[Line]:
    """Measure both networks, and SmoothGrad on the trained one."""
    torch.set_num_threads(cpu_quota())
    lines = [line for name, factory in NETWORKS.items() for line in _against_exact(name, factory())]
    return [*lines, _smoothgrad(efficientnet_lite0())]


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


def _distance(found: NDArray[np.float32], best: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - best) / np.linalg.norm(best))


def _smoothgrad(spec: ModelSpec) -> Line:
    """Measure SmoothGrad in bfloat16 against Captum's in float32: speed, and distance to a map of many draws."""
    images = torch.randn(N_IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    question: dict[str, Any] = {"channels": Channels.NONE}
    spec = spec.replace(mean=None, std=None)
    many = SmoothGrad(DRAWS, noise_level=NOISE, seed=0)
    best = _explained(spec.replace(**FOLDED), images.numpy(), method=many, **question)
    classes = [each.predicted for each in best.explanations if each]
    half = spec.replace(method_precision={"smoothgrad": "bfloat16"}, **FOLDED)
    apart: dict[str, list[float]] = {"captum": [], "ours": []}  # each round draws anew
    seeds = itertools.count(1)
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
            for image, class_ in zip(images, classes, strict=True)
        ]
        apart["captum"].append(_distance(torch.cat(drawn).detach().numpy(), best.maps))

    with Engine([half], Settings(device="cpu")) as engine:
        asyncio.run(engine.warm_up())

        def ours() -> None:
            method = SmoothGrad(SAMPLES, noise_level=NOISE, seed=next(seeds))
            target = PerExample(tuple(classes))
            asked = Request(images.numpy(), method=method, score=Score.LOGIT, target=target, **question)
            apart["ours"].append(_distance(asyncio.run(engine.attribute(asked)).maps, best.maps))

        seconds = in_turns({"captum": captum, "ours": ours})
    times = ratio(seconds["captum"], seconds["ours"])
    distances = ", Captum's ".join(
        f"{statistics.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in (apart["ours"], apart["captum"])
    )
    return Line(
        what=f"SmoothGrad-{SAMPLES} in its own precision, bfloat16, over Captum's, EfficientNet-Lite0",
        figure=times,
        unit="×",
        goal=f"≥ 2, no farther from {DRAWS} draws",
        met=times >= 2 and statistics.mean(apart["ours"]) <= max(apart["captum"]),
        detail=f"relative L2 distance to the map of {DRAWS} draws {distances}",
        row=f"SmoothGrad-{SAMPLES} in its own precision, bfloat16, over Captum's, EfficientNet-Lite0",
    )
