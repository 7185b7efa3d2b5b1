"""Which layers can be explained, and the layout of their positions, compared with pytorch-grad-cam. In float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from sidelight_server import Channels, Engine, GradCAM, LayerGradientXActivation, ModelSpec, Settings
from sidelight_server.compute.passes.layers import Layers, Layout
from sidelight_server.errors import ConfigurationError, InvalidArgument, NotFound
from torch import Tensor, nn

from support.engines import ask, assert_close, explaining

SIZE = (3, 32, 32)
ENCODER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def hugging_face(name: str, **config: object) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")(num_labels=5, **config)
    module = getattr(transformers, f"{name}ForImageClassification")(kind).double().eval()
    with torch.no_grad():  # what begins at zero, or as good as that, would hide what depends on it
        for each in module.parameters():
            if each.ndim < 2:
                each.uniform_(0.5, 1.5)
    return module


def tokens(prefix: int, h: int, w: int) -> Callable[[Tensor], Tensor]:
    """Return pytorch-grad-cam's `reshape_transform` of its examples for ViT and, without a prefix, Swin."""
    return lambda values: values[:, prefix:].reshape(len(values), h, w, -1).transpose(2, 3).transpose(1, 2)


def nhwc(values: Tensor) -> Tensor:
    return values.transpose(2, 3).transpose(1, 2)


def nchw(values: Tensor) -> Tensor:
    return values


def by_hand(module: nn.Module, layer: str, x: Tensor, arranged: Callable[[Tensor], Tensor], target: int) -> Tensor:
    """Return Grad-CAM's maps, [n, H, W], as pytorch-grad-cam computes them before it scales them to 0…1."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = module.get_submodule(layer).register_forward_hook(keep)
    returned = module(x)
    handle.remove()
    logits = returned if isinstance(returned, Tensor) else returned.logits
    (gradient,) = torch.autograd.grad(logits[:, target].sum(), seen[0])
    weights = arranged(gradient).mean(dim=(2, 3), keepdim=True)
    cam = (weights * arranged(seen[0])).sum(dim=1, keepdim=True).relu()
    return nn.functional.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0].detach()


def x(n: int = 3, size: tuple[int, int, int] = SIZE) -> Tensor:
    return torch.rand(n, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1, 2],
    "num_heads": [2, 2, 4],
    "window_size": 4,
}
STAGES = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 2]}
PVT = STAGES | {"image_size": 64, "num_attention_heads": [1, 2, 2, 4]}

# A network, how its tokens are read by hand, its default layer, and the first norm of its last block.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], str, str]] = {
    "ViT": (lambda: hugging_face("ViT", **ENCODER), tokens(1, 4, 4), "vit.layers.1", "vit.layers.2.layernorm_before"),
    "DeiT": (
        lambda: hugging_face("DeiT", **ENCODER),
        tokens(2, 4, 4),
        "deit.layers.1",
        "deit.layers.2.layernorm_before",
    ),
    "BEiT": (
        lambda: hugging_face("Beit", use_mean_pooling=True, use_relative_position_bias=True, **ENCODER),
        tokens(1, 4, 4),
        "beit.layernorm",
        "beit.layers.2.layernorm_before",
    ),
    "Swin": (
        lambda: hugging_face("Swin", **SWIN),
        tokens(0, 4, 4),
        "swin.layernorm",
        "swin.encoder.layers.2.blocks.1.layernorm_before",
    ),
    "PVT": (
        lambda: hugging_face("Pvt", sequence_reduction_ratios=[4, 2, 1, 1], **PVT),
        tokens(1, 2, 2),
        "pvt.encoder.block.3.0",
        "pvt.encoder.block.3.1.layer_norm_1",
    ),
    "ConvNeXt": (
        lambda: hugging_face("ConvNext", image_size=32, patch_size=2, **STAGES),
        lambda values: values,
        "convnext.encoder.stages.3",
        "convnext.encoder.stages.3",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_cam_of_the_default_and_of_the_last_blocks_first_norm(name: str) -> None:
    make, arranged, default, norm = NETWORKS[name]
    module = make()
    size = (3, 64, 64) if name == "PVT" else SIZE
    with explaining(module, input_size=size) as explain:
        for layer in ("", norm):
            answer = explain(x(size=size), GradCAM(layer), target=2, channels=Channels.SUM)
            assert answer.request.method.layer == (layer or default)
            assert_close(answer.maps, by_hand(module, layer or default, x(size=size), arranged, 2))


class ByPixel(nn.Module):
    """Lays positions out before channels, as Swin, NesT and MambaOut do. All its layers have equal sides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.turned = nn.Identity()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x).permute(0, 2, 3, 1))  # [n, 8, 8, 8]
        y = y + self.mix(y).relu()
        y = self.turned(y.permute(0, 3, 1, 2))
        return self.head(y.mean(dim=(2, 3)))


def test_channels_that_come_last_are_read_as_that_where_all_sides_are_equal() -> None:
    module = ByPixel().double().eval()
    with explaining(module, input_size=SIZE) as explain:
        for layer, arranged in {"stem": nchw, "norm": nhwc, "mix": nhwc, "turned": nchw}.items():
            maps = explain(x(), GradCAM(layer), target=1, channels=Channels.SUM).maps
            assert_close(maps, by_hand(module, layer, x(), arranged, 1))
        product = explain(x(), LayerGradientXActivation("norm"), target=1, channels=Channels.SUM).maps
        assert explain(x(), GradCAM(), target=1).request.method.layer == "turned"
    seen = nhwc(module.norm(module.stem(x()).permute(0, 2, 3, 1))).detach().requires_grad_()
    y = seen + module.mix(seen.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)
    (slope,) = torch.autograd.grad(module.head(y.mean(dim=(2, 3)))[:, 1].sum(), seen)
    expected = nn.functional.interpolate((slope * seen).sum(dim=1, keepdim=True), SIZE[1:], mode="bilinear")[:, 0]
    assert_close(product, expected)


class Traps(nn.Module):
    """A network most of whose layers cannot be explained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.table = nn.Conv2d(1, 4, 1)  # of a bias: [1, 4, 16, 16], whatever the input is
        self.unused = nn.Conv2d(16, 16, 1)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.heads = nn.Identity()
        self.shared = nn.Identity()
        self.turned = nn.Identity()
        self.block = nn.Identity()
        self.pooled = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)  # [n, 16, 4, 4]
        self.unused(y)
        bias = self.table(torch.linspace(0, 1, 256, dtype=x.dtype).view(1, 1, 16, 16))
        t = self.shared(self.shared(y.flatten(2).transpose(1, 2)))  # [n, 16, 16]
        q, k, v = (self.heads_of(each(t)) for each in (self.query, self.key, self.value))  # [n, 4, 16, 4]
        mixed = (q @ self.heads(k).transpose(2, 3) + bias).softmax(dim=3) @ v
        t = t + mixed.transpose(1, 2).flatten(2)
        z = self.turned(t.transpose(1, 2).reshape(y.shape).transpose(2, 3)).transpose(2, 3)
        return self.head(self.pooled(self.block(z * 1)).flatten(1))

    def heads_of(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (4, 4)).transpose(1, 2)


REFUSED = {
    "table": '"table" returns [1, 4, 16, 16], expected the examples first',
    "unused": '"unused" does not influence the outputs',
    "heads": '"heads" returns [2, 4, 16, 4], in which no positions of the input were detected',
    "turned": '"turned" returns [2, 16, 4, 4], in which no positions of the input were detected',
    "shared": '"shared" runs 2 times in a pass',
    "pooled": '"pooled" returns [2, 16, 1, 1], in which no positions of the input were detected',
    "head": '"head" returns [2, 5], expected [n, c, h, w]',
}


@pytest.fixture(scope="module")
def traps() -> Iterator[Engine]:
    with Engine([ModelSpec(Traps().double().eval(), input_size=SIZE)], Settings(device="cpu", threads=1)) as engine:
        yield engine


@pytest.mark.parametrize("layer", REFUSED)
def test_a_layer_that_shows_no_positions_is_refused_with_the_reason_and_others(layer: str, traps: Engine) -> None:
    with pytest.raises(InvalidArgument) as refused:
        ask(traps, x(), method=GradCAM(layer))
    assert REFUSED[layer] in str(refused.value)
    assert 'name one of "stem"' in str(refused.value)
    (model,) = traps.models.values()
    assert layer not in model.layers


def test_the_default_is_what_all_that_reaches_the_outputs_has_passed(traps: Engine) -> None:
    """Not the projection of the values, nor another part of a branch, though they run after the stem."""
    assert ask(traps, x(), method=GradCAM(), target=1).request.method.layer == "block"


class Branches(nn.Module):
    """Two parallel networks: the outputs depend on more than either of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right = (nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left(x) * self.right(x)).mean(dim=(2, 3)))


def test_without_a_layer_that_all_paths_cross_the_layers_to_choose_from_are_reported() -> None:
    module = Branches().double().eval()
    with Engine([ModelSpec(module, input_size=SIZE)], Settings(device="cpu", threads=1)) as engine:
        with pytest.raises(NotFound, match=r'name one of .*"left".*"right"'):
            ask(engine, x(), method=GradCAM())
        answer = ask(engine, x(), method=GradCAM("right"), target=2, channels=Channels.SUM)
    assert_close(answer.maps, by_hand(module, "right", x(), nchw, 2))


def test_a_layout_that_the_operator_sets_is_taken_and_makes_the_layer_the_default() -> None:
    module = Traps().double().eval()
    layouts = {"value": "tokens:0:4x4", "turned": "nchw"}
    with explaining(module, input_size=SIZE, layer_layout=layouts) as explain:
        for layer, arranged in {"value": tokens(0, 4, 4), "turned": nchw}.items():
            maps = explain(x(), GradCAM(layer), target=1, channels=Channels.SUM).maps
            assert_close(maps, by_hand(module, layer, x(), arranged, 1))
        assert explain(x(), GradCAM()).request.method.layer == "turned"


WRONG = {
    "no layout": ({"value": "chw"}, 'layer_layout: got "chw", expected "nchw", "nhwc", or "tokens:P:HxW"'),
    "no layer": ({"values": "nchw"}, 'layer_layout: no layer "values" runs; did you mean "value"?'),
    "not its shape": ({"value": "nchw"}, r'layer_layout: "value": it returns \[2, 16, 16\], which is not nchw'),
    "another grid": (
        {"value": "tokens:1:4x4"},
        r'layer_layout: "value": it returns 16 tokens .* which is not tokens:1:4x4',
    ),
    "no input": ({"table": "nchw"}, 'layer_layout: "table" returns'),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_layout_that_does_not_fit_stops_the_start(wrong: str) -> None:
    layouts, pattern = WRONG[wrong]
    with (
        pytest.raises(ConfigurationError, match=pattern),
        explaining(Traps().double().eval(), input_size=SIZE, layer_layout=layouts),
    ):
        pass


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 32, 64), (3, 48, 32)])
def test_a_model_of_any_size_detects_layouts_with_the_first_rows_and_keeps_them_for_other_sizes(
    size: tuple[int, int, int],
) -> None:
    class AnySize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = hugging_face("ViT", **ENCODER)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, interpolate_pos_encoding=True).logits

    module = AnySize().double().eval()
    with explaining(module) as explain:
        explain(x(), GradCAM(), target=2)
        maps = explain(x(size=size), GradCAM(), target=2, channels=Channels.SUM).maps
    grid = tokens(1, size[1] // 8, size[2] // 8)
    assert_close(maps, by_hand(module, "inner.vit.layers.1", x(size=size), grid, 2))


def test_without_a_similar_name_the_last_layers_are_listed() -> None:
    layers = Layers({f"stage.{n}": Layout("nchw") for n in range(20)}, default="stage.19")
    with pytest.raises(NotFound, match=r'there is no "zzz"; known: "stage.19", "stage.18"'):
        layers.choose("zzz", ())
