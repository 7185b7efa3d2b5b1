"""A zoo of small networks with random weights, and the results of each method, compared with Captum and with formulas.

`make zoo` runs all of it, and writes the table of docs/reference/models.md; with --check it compares that instead. A
cell is the result of a run: "yes" if the maps equal the oracle's, or why there are none.
"""

import argparse
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from captum.attr import GuidedBackprop, Saliency
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import Occlusion as CaptumOcclusion
from sidelight_server import (
    Channels,
    Engine,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    ModelSpec,
    Occlusion,
    Settings,
)
from sidelight_server.errors import ConfigurationError, SidelightError
from sidelight_server.methods import Method
from torch import Tensor, nn

from support import ROOT
from support.engines import ask
from support.models import small_cnn
from support.tolerances import NEIGHBORS

DOCUMENT = ROOT / "docs" / "reference" / "models.md"
BEGIN, END = "<!-- zoo: begin -->\n", "<!-- zoo: end -->\n"
ORACLE = 1e-6  # of the largest value, in float64: maps are float32, and ours are summed in another order
TARGET = 2
COLUMNS = ("gradient", "integrated gradients", "Grad-CAM", "guided", "occlusion", "neighbors", "reproducible", "fold")


@dataclass(frozen=True)
class Animal:
    """A network: its family, how it is made, the side of its input, and how its default layer is read by hand."""

    family: str
    make: Callable[[], nn.Module]
    side: int = 32
    tokens: int | None = None  # before those of positions, where the default layer returns tokens; None: [n, c, h, w]
    by_pixel: bool = False  # the default layer returns [n, h, w, c]

    def arranged(self, values: Tensor) -> Tensor:
        if self.by_pixel:
            return values.permute(0, 3, 1, 2)
        if self.tokens is None:
            return values
        places = values[:, self.tokens :]  # [n, h × h, c]
        side = round(places.shape[1] ** 0.5)
        return places.transpose(1, 2).reshape(len(values), -1, side, side)


class Logits(nn.Module):
    """A classifier of transformers' that returns its logits alone."""

    def __init__(self, name: str, **config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = getattr(transformers, f"{name}Config")(num_labels=5, **config)
        self.inner = getattr(transformers, f"{name}ForImageClassification")(kind)
        with torch.no_grad():  # what begins at zero, or as good as that, would hide what depends on it
            for each in self.parameters():
                if each.ndim < 2:
                    each.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


class Scan(nn.Module):
    """A block of a selective state space: h ← a(x) h + (1 − a(x)) x along the tokens, there and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.value, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        keep, value = self.gate(z).sigmoid(), self.value(z)
        ways = []
        for order in (range(x.shape[1]), reversed(range(x.shape[1]))):
            state, states = torch.zeros_like(value[:, 0]), {}
            for i in order:
                state = keep[:, i] * state + (1 - keep[:, i]) * value[:, i]
                states[i] = state
            ways.append(torch.stack([states[i] for i in range(x.shape[1])], dim=1))
        return x + self.out(ways[0] + ways[1])


class StateSpace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.Sequential(Scan(16), Scan(16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(dim=1))


class Gated(nn.Module):
    """A block of MambaOut's: a gated convolution by pixel, [n, h, w, c]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.open, self.close = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.open(self.norm(x)).chunk(2, dim=3)
        return x + self.close(nn.functional.silu(gate) * self.conv(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ByPixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.Sequential(Gated(16), Gated(16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).permute(0, 2, 3, 1))).mean(dim=(1, 2)))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.norm = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16)
        self.places, self.channels = (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = y + self.places(self.norm(y).transpose(1, 2)).transpose(1, 2)
        return self.head(self.last(y + self.channels(y)).mean(dim=1))


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = (nn.Sequential(nn.Conv2d(3, 12, k, k), nn.BatchNorm2d(12), nn.ReLU()) for k in (4, 8))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([each(x).mean(dim=(2, 3)) for each in (self.fine, self.coarse)], dim=1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (12, 24, 36)
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.grow = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 12, 3, padding=1)) for w in widths
        )
        self.norm, self.last, self.head = nn.BatchNorm2d(48), nn.ReLU(), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for each in self.grow:
            y = torch.cat([y, each(y)], dim=1)
        return self.head(self.last(self.norm(y)).mean(dim=(2, 3)))


def vgg() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def _hf(name: str, **config: object) -> Callable[[], nn.Module]:
    return lambda: Logits(name, **config)


_VIT = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64,
}  # fmt: skip
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}
_STAGES = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 2]}
_HEADS = {"num_attention_heads": [1, 2, 2, 4]}

ZOO = {
    "plain": Animal("CNN", small_cnn),
    "VGG": Animal("CNN", vgg),
    "DenseNet": Animal("CNN", Dense),
    "two branches": Animal("CNN", TwoBranches),
    "ResNet": Animal(
        "CNN", _hf("ResNet", depths=[1, 1, 1], hidden_sizes=[16, 32, 32], layer_type="basic", embedding_size=16)
    ),
    "RegNet": Animal(
        "CNN", _hf("RegNet", depths=[1, 1, 1], hidden_sizes=[16, 32, 32], embedding_size=16, groups_width=8)
    ),
    "BiT": Animal("CNN", _hf("Bit", depths=[1, 1, 1], hidden_sizes=[32, 32, 64], embedding_size=16, num_groups=4)),
    "MobileNetV2": Animal("CNN", _hf("MobileNetV2", depth_multiplier=0.35), side=64),
    "ConvNeXt": Animal("CNN", _hf("ConvNext", patch_size=2, **_STAGES)),
    "ConvNeXtV2": Animal("CNN", _hf("ConvNextV2", patch_size=2, **_STAGES)),
    "PoolFormer": Animal("CNN", _hf("PoolFormer", **_STAGES), side=128),
    "ViT": Animal("transformer", _hf("ViT", **_VIT), tokens=1),
    "DeiT": Animal("transformer", _hf("DeiT", **_VIT), tokens=2),
    "BEiT": Animal("transformer", _hf("Beit", use_relative_position_bias=True, **_VIT), tokens=1),
    "DINOv2": Animal("transformer", _hf("Dinov2", **_VIT), tokens=1),
    "Swin": Animal("transformer", _hf("Swin", **_SWIN), tokens=0),
    "SwinV2": Animal("transformer", _hf("Swinv2", **_SWIN), tokens=0),
    "PVT": Animal(
        "transformer", _hf("Pvt", image_size=64, sequence_reduction_ratios=[4, 2, 1, 1], **_STAGES, **_HEADS), 64, 1
    ),
    "PVTv2": Animal("transformer", _hf("PvtV2", image_size=64, **_STAGES, **_HEADS), 64, 0),
    "SegFormer": Animal("hybrid", _hf("Segformer", **_STAGES, **_HEADS), side=64),
    "FocalNet": Animal("hybrid", _hf("FocalNet", image_size=32, embed_dim=16, depths=[1, 1], patch_size=2), tokens=0),
    "MLP-Mixer": Animal("hybrid", Mixer, tokens=0),
    "gated, by pixel": Animal("state space", ByPixel, by_pixel=True),
    "selective scan": Animal("state space", StateSpace, tokens=0),
}

_Oracle = Callable[[nn.Module, Tensor, Animal, str], Tensor]


def grad_cam(module: nn.Module, x: Tensor, animal: Animal, layer: str) -> Tensor:
    """Return Grad-CAM's maps as pytorch-grad-cam computes them before it scales them to 0…1: [n, 1, H, W]."""
    seen: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    logits = module(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, TARGET].sum(), seen[0])
    weights = animal.arranged(gradient).mean(dim=(2, 3), keepdim=True)
    cam = (weights * animal.arranged(seen[0])).sum(dim=1, keepdim=True).relu()
    return nn.functional.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)


METHODS: dict[str, tuple[Method, _Oracle]] = {
    "gradient": (Gradient(), lambda m, x, _a, _l: Saliency(m).attribute(x, target=TARGET, abs=False)),
    "integrated gradients": (
        IntegratedGradients(8),
        lambda m, x, _a, _l: CaptumIntegratedGradients(m).attribute(x, target=TARGET, n_steps=8),
    ),
    "Grad-CAM": (GradCAM(), grad_cam),
    "guided": (GuidedBackpropagation(), lambda m, x, _a, _l: GuidedBackprop(m).attribute(x, target=TARGET)),
    "occlusion": (
        Occlusion((8, 8)),
        lambda m, x, _a, _l: CaptumOcclusion(m).attribute(
            x, (x.shape[1], 8, 8), strides=(x.shape[1], 8, 8), target=TARGET
        ),
    ),
}


def row(name: str) -> dict[str, str]:
    """Return a network's value in each column."""
    animal = ZOO[name]
    size = (3, animal.side, animal.side)
    x = torch.rand(3, *size, generator=torch.Generator().manual_seed(5))
    module = animal.make().eval()
    settings = Settings(device="cpu", threads=1, max_chunk_rows=4)
    cells = {}
    with _engine(module.double(), size, settings) as engine:
        for column, (method, oracle) in METHODS.items():
            cells[column] = _cell(engine, module, x.double(), animal, method, oracle)
    module.float()
    with _engine(module, size, settings) as engine:
        together = _maps(engine, x)
        alone = np.concatenate([_maps(engine, each[None]) for each in x])
        apart = float(np.abs(together - alone).max() / np.abs(together).max())
        cells["neighbors"] = "yes" if apart <= NEIGHBORS else f"no: {apart:.0e} of the largest value"
    with _engine(module, size, settings.model_copy(update={"reproducible": True})) as engine:
        is_same = np.array_equal(_maps(engine, x)[:1], _maps(engine, x[:1]))
        cells["reproducible"] = "yes" if is_same else "no"
    cells["fold"] = _fold(module, size, settings, x, together)
    return {column: cells[column] for column in COLUMNS}


def _fold(module: nn.Module, size: tuple[int, int, int], settings: Settings, x: Tensor, plain: np.ndarray) -> str:
    try:
        with _engine(module, size, settings, fold=True) as engine:
            (model,) = engine.models.values()
            if not model.kernel.n_folded:
                return "no: nothing to fold"
            return "yes" if np.abs(_maps(engine, x) - plain).max() <= 1e-3 * np.abs(plain).max() else "no: other maps"
    except ConfigurationError:
        return "no: refused when it is loaded"


def _engine(module: nn.Module, size: tuple[int, int, int], settings: Settings, **spec: object) -> Engine:
    return Engine([ModelSpec(module, input_size=size, **spec)], settings)


def _maps(engine: Engine, x: Tensor) -> np.ndarray:
    return ask(engine, x, method=Gradient(), target=TARGET).maps


def _cell(engine: Engine, module: nn.Module, x: Tensor, animal: Animal, method: Method, oracle: _Oracle) -> str:
    try:
        channels = Channels.SUM if isinstance(method, GradCAM) else Channels.NONE
        answer = ask(engine, x, method=method, target=TARGET, channels=channels)
    except SidelightError as error:
        return f"no: {_reason(error.message)}"
    if answer.failures:
        return f"no: {_reason(answer.failures[0].message)}"
    if isinstance(method, GuidedBackpropagation) and any(isinstance(each, nn.ReLU6) for each in module.modules()):
        return "yes, not compared: Captum's has no rule for ReLU6"
    layer = getattr(answer.request.method, "layer", "")
    with warnings.catch_warnings(action="ignore"):  # Captum's, of the gradient that it sets and the hooks
        expected = oracle(module, x.clone().requires_grad_(), animal, layer).detach().numpy()
    expected = expected[:, 0] if isinstance(method, GradCAM) else expected
    worst = np.abs(answer.maps - expected).max() / (np.abs(expected).max() or 1)
    if worst > ORACLE:
        return f"no: {worst:.0e} from the oracle's"
    return f"yes: `{layer.removeprefix('inner.')}`" if layer else "yes"


def _reason(message: str) -> str:
    """Return the reason in an error message, without the field before it and the advice after it."""
    return re.split("; |, expected", message.partition(": ")[2])[0]


def line(name: str, cells: dict[str, str]) -> str:
    """Return a network's line of the table."""
    return f"| {ZOO[name].family} | {name} | " + " | ".join(cells[column] for column in COLUMNS) + " |\n"


HEAD = "| family | network | " + " | ".join(COLUMNS) + " |\n" + "| --- " * (len(COLUMNS) + 2) + "|\n"


def load_ratio(name: str) -> float:
    """Return how long loading takes, in multiples of what torch takes to make and run a network."""
    animal = ZOO[name]
    size = (3, animal.side, animal.side)
    began = time.perf_counter()
    module = animal.make().eval()
    inputs = torch.rand(2, *size).requires_grad_()
    module(inputs).sum().backward()
    ours = time.perf_counter()
    with _engine(module, size, Settings(device="cpu", threads=1, max_chunk_rows=4)):
        return (time.perf_counter() - began) / (ours - began)


def main() -> int:
    """Run the whole zoo, and write or compare the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the table with that of docs/reference/models.md")
    is_check = parser.parse_args().check
    load_ratio("ViT")  # transformers and torch have their own to load the first time
    table = HEAD
    ratios = []
    for name in ZOO:
        table += line(name, row(name))
        ratios.append(load_ratio(name))
        print(f"{name}: loads in {ratios[-1]:.1f} times what torch takes", flush=True)
    print(f"loading takes {statistics.median(ratios):.1f} times what torch takes in the median, goal 2")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    written, after = rest.split(END)
    if is_check:
        found = "the table is as it should be" if written == table else f"the table differs:\n{table}"
        print(f"{DOCUMENT.relative_to(ROOT)}: {found}")
        return written != table
    DOCUMENT.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
