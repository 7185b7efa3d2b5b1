"""The kernel compared with the original on a batch of 8 at 224²: equality of the maps to the last bit, and speedup."""

import functools

import torch
from scipy.stats import spearmanr
from sidelight_server.compute.kernel import Kernel
from sidelight_server.compute.torch_device import cpu_quota
from sidelight_server.config.options import KernelOptions
from sidelight_server.domain import PREDICTED, Score
from sidelight_server.methods.channels import Channels, Magnitude, reduce
from torch import Tensor, nn

from ..support.measure import Line, in_turns, ratio
from ..support.nets import SIZE, efficientnet_lite0, resnet18
from ..support.original import PyHealthModel, original_class

BATCH = 8
GOAL = 1.4
FAST = {
    1.6: KernelOptions(fold=True, channels_last=True),
    2.8: KernelOptions(precision="bfloat16", fold=True, channels_last=True),
}


def maps(kernel: Kernel, images: Tensor) -> Tensor:
    """Run the kernel as a gradient request does: the largest |d probability of the predicted class|."""
    answer = kernel.run(images, [PREDICTED] * len(images), [Score.PROBABILITY] * len(images))
    assert answer.gradients is not None
    return torch.stack([reduce(each, Channels.MAX_ABS, Magnitude.ABSOLUTE) for each in answer.gradients])


def against_original(name: str, module: nn.Module) -> Line:
    """Measure one model."""
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    kernel = Kernel(module, device=torch.device("cpu"))
    explainer = original_class()(PyHealthModel(module).eval())
    ours, theirs = maps(kernel, images), explainer.attribute(image=images)["image"]
    equal = torch.equal(ours, theirs)
    seconds = in_turns({"original": lambda: explainer.attribute(image=images), "kernel": lambda: maps(kernel, images)})
    times = ratio(seconds["original"], seconds["kernel"])
    rate = BATCH / min(seconds["kernel"])
    return Line(
        what=f"kernel over the original, {name}, batch {BATCH}",
        figure=times,
        unit="×",
        goal=f"≥ {GOAL}, maps bit-equal",
        met=times >= GOAL and equal,
        detail=f"maps {'bit-equal' if equal else 'DIFFER'}; kernel {rate:.1f} images/s at best",
        row=f"kernel over the original, batch {BATCH}, maps bit-equal: EfficientNet-Lite0 / ResNet-18",
    )


def fast_against_original(name: str, module: nn.Module) -> list[Line]:
    """Measure one model alternately with each option."""
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    explainer = original_class()(PyHealthModel(module).eval())
    device, trial = torch.device("cpu"), images[:2]
    kernels = {goal: Kernel(module, device=device, options=each, trial=trial) for goal, each in FAST.items()}
    rivals = {kernel.summary: functools.partial(maps, kernel, images) for kernel in kernels.values()}
    exact = maps(Kernel(module, device=device), images).numpy()
    ranks = {name: spearmanr(rival().numpy().ravel(), exact.ravel()).statistic for name, rival in rivals.items()}
    seconds = in_turns({"original": lambda: explainer.attribute(image=images)} | rivals)
    return [
        Line(
            what=f"kernel over the original, {name}, batch {BATCH}, {kernel.summary}",
            figure=(times := ratio(seconds["original"], seconds[kernel.summary])),
            unit="×",
            goal=f"≥ {goal}",
            met=times >= goal,
            detail=f"{BATCH / min(seconds[kernel.summary]):.1f} images/s at best; "
            f"rank correlation with the exact maps {ranks[kernel.summary]:.4f}",
            row=f"kernel over the original, {name}, batch {BATCH}: folded / bfloat16, folded",
        )
        for goal, kernel in kernels.items()
    ]


def run() -> list[Line]:
    """Measure both models."""
    torch.set_num_threads(cpu_quota())
    return [
        *fast_against_original("ResNet-18", resnet18().module),
        against_original("EfficientNet-Lite0", efficientnet_lite0().module),
        against_original("ResNet-18", resnet18().module),
    ]
