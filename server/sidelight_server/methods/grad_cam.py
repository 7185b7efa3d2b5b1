"""Layer methods: Grad-CAM, and gradient × activation. One row each, with the layer as probe."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .channels import Channels, reduce
from .method import ROUNDING_STEPS, Example, Layer, OneRowMethod, Outcome, Probe, Shape, Steps


@dataclass(frozen=True, slots=True)
class LayerMethod(OneRowMethod):
    """Base class of methods whose probe is a layer."""

    layer: str = ""  # empty: the model's default

    @property
    def probe(self) -> Probe:
        return Layer(self.layer)


@dataclass(frozen=True, slots=True)
class GradCAM(LayerMethod):
    """The sum of a layer's activations, weighted by each channel's mean gradient, with negative values set to 0.

    Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, 2017, "Grad-CAM: Visual Explanations from Deep Networks via
    Gradient-Based Localization". The map is resized bilinearly to the input's size.
    """

    name: ClassVar[str] = "grad_cam"
    keep_negative: bool = False

    def run(self, example: Example) -> Steps:
        output = yield from example.evaluate(gradient=True)
        assert output.gradient is not None  # noqa: S101
        assert output.activation is not None  # noqa: S101
        weights = output.gradient.mean(dim=(1, 2), keepdim=True)  # [c, 1, 1]
        added = (weights * output.activation).sum(dim=0)  # [h, w]
        terms = output.gradient.abs().mean(dim=(1, 2), keepdim=True) * output.activation.abs()  # [c, h, w]
        is_negligible = added.abs().amax() <= ROUNDING_STEPS * example.step * terms.sum(dim=0).amax()
        map_ = _resize(added if self.keep_negative else added.relu(), example.x)
        return Outcome(map_, is_negligible=bool(is_negligible))

    def may_be_negative(self, channels: Channels) -> bool:
        return self.keep_negative


@dataclass(frozen=True, slots=True)
class LayerGradientXActivation(LayerMethod):
    """A layer's gradient times its activation, reduced over the layer's channels and resized to the input's size.

    Ancona, Ceolini, Öztireli and Gross, 2018, "Towards better understanding of gradient-based attribution methods for
    Deep Neural Networks".
    """

    name: ClassVar[str] = "layer_gradient_x_activation"

    def run(self, example: Example) -> Steps:
        output = yield from example.evaluate(gradient=True)
        assert output.gradient is not None  # noqa: S101
        assert output.activation is not None  # noqa: S101
        return Outcome(output.gradient * output.activation)  # [c, h, w]

    def finish(self, attribution: Tensor, channels: Channels, shape: Shape) -> Tensor:
        """Reduce the layer's channels, which are not the image's, then resize."""
        reduced = reduce(attribution, Channels.SUM if channels is Channels.NONE else channels, self.magnitude)
        sized = _resize(reduced, attribution.new_empty(shape))
        return sized.expand(shape) if channels is Channels.NONE else sized


def _resize(map_: Tensor, like: Tensor) -> Tensor:
    """Resize a layer's map, [h, w], to the input's size, [H, W]."""
    return nn.functional.interpolate(map_[None, None], size=like.shape[1:], mode="bilinear", align_corners=False)[0, 0]
