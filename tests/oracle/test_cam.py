"""Layer methods compared with Captum's and with a network that is cut at the layer by hand. In float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from captum.attr import LayerGradientXActivation as CaptumLayerGradientXActivation
from sidelight_server import Channels, GradCAM, GuidedBackpropagation, LayerGradientXActivation, Score
from torch import Tensor, nn

from support.engines import Explain, assert_close, explaining
from support.models import small_cnn

CLASS = 2
SHAPE = (2, 10, 14)  # unequal sides: an exchange of rows and columns would show
DEFAULT = "6"  # the last layer with spatial extent: what comes after it is 1 × 1


@pytest.fixture(scope="module")
def module() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.Softplus(),
        nn.Conv2d(8, 7, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 5),
    ).double()


@pytest.fixture(scope="module")
def explain(module: nn.Module) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def enlarged(layer_map: Tensor) -> Tensor:
    """Resize a layer's maps, [n, 1, h, w], to the input's size, [n, H, W], as Captum does."""
    return LayerAttribution.interpolate(layer_map, SHAPE[1:], interpolate_mode="bilinear")[:, 0]


def cut(module: nn.Sequential, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return the activations after a layer and the gradients there, both [n, c, h, w], by splitting the network."""
    activation = module[: layer + 1](x).detach().clone().requires_grad_()
    score = module[layer + 1 :](activation.clone())[:, CLASS].sum()
    return activation.detach(), torch.autograd.grad(score, activation)[0]


@pytest.mark.parametrize("layer", ["0", "2", "3", "4", DEFAULT, ""], ids=lambda layer: layer or "default")
@pytest.mark.parametrize("keep_negative", [False, True], ids=["rectified", "signed"])
@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY], ids=lambda score: score.value)
def test_grad_cam_is_captums(
    layer: str, keep_negative: bool, score: Score, module: nn.Sequential, explain: Explain, x: Tensor
) -> None:
    def forward(x: Tensor) -> Tensor:
        return module(x) if score is Score.LOGIT else module(x).softmax(dim=1)

    module.eval()
    cam = LayerGradCam(forward, module[int(layer or DEFAULT)])
    expected = enlarged(cam.attribute(x, target=CLASS, relu_attributions=not keep_negative))
    method = GradCAM(layer, keep_negative=keep_negative)
    answer = explain(x, method, target=CLASS, score=score, channels=Channels.SUM)
    assert_close(answer.maps, expected)
    assert answer.request.method.layer == (layer or DEFAULT)  # the answer names what was chosen
    # One number for each pixel stands in every channel.
    whole = explain(x, method, target=CLASS, score=score).maps
    np.testing.assert_array_equal(whole, np.repeat(answer.maps[:, None], SHAPE[0], axis=1))


@pytest.mark.parametrize("layer", ["0", "3", "5", ""], ids=lambda layer: layer or "default")
def test_layer_gradient_x_activation_is_captums(layer: str, module: nn.Sequential, explain: Explain, x: Tensor) -> None:
    product = CaptumLayerGradientXActivation(module.eval(), module[int(layer or DEFAULT)])
    raw = product.attribute(x, target=CLASS).detach()
    method = LayerGradientXActivation(layer)
    reduced = {
        Channels.SUM: raw.sum(dim=1, keepdim=True),
        Channels.MAX_ABS: raw.abs().amax(dim=1, keepdim=True),
        Channels.MEAN_ABS: raw.abs().mean(dim=1, keepdim=True),
        Channels.L2: raw.square().sum(dim=1, keepdim=True).sqrt(),
    }
    for channels, expected in reduced.items():
        assert_close(explain(x, method, target=CLASS, channels=channels).maps, enlarged(expected))
    signed = explain(x, method, target=CLASS, channels=Channels.SUM).maps
    whole = explain(x, method, target=CLASS).maps
    np.testing.assert_array_equal(whole, np.repeat(signed[:, None], SHAPE[0], axis=1))


@pytest.mark.parametrize("layer", range(7))
def test_the_maps_of_a_layer_equal_those_of_a_network_cut_there(layer: int, x: Tensor) -> None:
    """The CNN's rectifier works in place: what it is given, the layer before it, must be read before that."""
    module = small_cnn(2, size=12).double().eval()
    x = torch.nn.functional.pad(x, (0, -2, 0, 2))  # [3, 2, 12, 12]
    activation, gradient = cut(module, x, layer)
    with explaining(module, input_size=(2, 12, 12)) as explain:
        cam = explain(x, GradCAM(str(layer), keep_negative=True), target=CLASS, channels=Channels.SUM).maps
        product = explain(x, LayerGradientXActivation(str(layer)), target=CLASS, channels=Channels.SUM).maps
    weighted = (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1, keepdim=True)
    for maps, expected in ((cam, weighted), (product, (gradient * activation).sum(dim=1, keepdim=True))):
        sized = nn.functional.interpolate(expected, size=(12, 12), mode="bilinear", align_corners=False)[:, 0]
        assert_close(maps, sized)


def test_before_global_pooling_gradient_times_activation_adds_up_to_the_logit_without_its_bias(
    module: nn.Sequential, x: Tensor
) -> None:
    """There, the gradient at each position is the class's weights divided by the number of positions."""
    activation = module.eval()[:7](x).detach()  # [n, 7, h, w]
    places = activation.shape[2] * activation.shape[3]
    exact = torch.einsum("c,nchw->nhw", module[9].weight[CLASS].detach(), activation)[:, None] / places
    logits = module(x)[:, CLASS].detach() - module[9].bias[CLASS].detach()
    torch.testing.assert_close(exact.sum(dim=(1, 2, 3)), logits, rtol=1e-12, atol=1e-12)
    with explaining(module) as explain:  # where the input size is not fixed, a layer can be named as well
        maps = explain(x, LayerGradientXActivation(DEFAULT), target=CLASS, channels=Channels.SUM).maps
    assert_close(maps, enlarged(exact))


class Statement(nn.Module):
    """Rectifies in place in a statement of its own, whose return value is not used."""

    def __init__(self, inner: nn.Module, *, in_place: bool) -> None:
        super().__init__()
        self.first, self.rest = inner[0], inner[4:]
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.in_place:
            nn.functional.relu(y, inplace=True)
        else:
            y = nn.functional.relu(input=y)
        return self.rest(nn.functional.max_pool2d(y, 2))


def test_a_rectifier_that_works_in_place_is_guided_in_place() -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    maps = []
    for in_place in (True, False):
        with explaining(Statement(small_cnn(), in_place=in_place).eval(), input_size=(3, 32, 32)) as explain:
            maps.append(explain(x, GuidedBackpropagation(), target=3).maps)
    np.testing.assert_array_equal(*maps)
