"""Kernels with options, and what they are run on."""

import torch
from sidelight_server import (
    Settings,
)
from sidelight_server.compute.kernel import Kernel
from sidelight_server.config.options import KernelOptions
from sidelight_server.domain import PREDICTED, Score
from torch import Tensor, nn

CPU = torch.device("cpu")
OPTIONS = {
    "fold": KernelOptions(fold=True),
    "channels_last": KernelOptions(channels_last=True),
    "mixed": KernelOptions(precision="mixed"),
    "mixed, folded": KernelOptions(precision="mixed", fold=True, channels_last=True),
    "bfloat16": KernelOptions(precision="bfloat16"),
    "float16": KernelOptions(precision="float16"),
    "all": KernelOptions(precision="bfloat16", fold=True, channels_last=True),
}
# Relative L2, as measured with room: in float32 the order of additions; with 8 and 11 bits of mantissa a ReLU near its
# corner and a near tie of a max-pool go the other way, which moves single elements by up to half of the maximum.
# With "mixed" no ReLU moves, and each of a few products rounds by at most 2^-8.
SHARES = {
    "fold": 4e-6,
    "channels_last": 4e-6,
    "mixed": 0.01,
    "mixed, folded": 0.01,
    "bfloat16": 0.15,
    "float16": 0.04,
    "all": 0.15,
}


def inputs(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def kernel(module: nn.Module, options: KernelOptions) -> Kernel:
    return Kernel(module, device=CPU, options=options, trial=inputs(2))


def run(kernel: Kernel, x: Tensor, score: Score = Score.PROBABILITY) -> Tensor:
    gradients = kernel.run(x, [PREDICTED] * len(x), [score] * len(x)).gradients
    assert gradients.dtype == torch.float32
    return gradients


def settings(name: str) -> Settings:
    options = OPTIONS[name]
    chosen = dict.fromkeys(options.names, True) | {"precision": options.precision}
    return Settings(device="cpu", threads=1, **chosen)
