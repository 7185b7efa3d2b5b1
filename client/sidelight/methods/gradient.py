"""Methods that compute one row per example: gradient, layer methods and guided backpropagation."""

from dataclasses import dataclass
from typing import ClassVar

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.validation import flag, text
from ..exceptions import InvalidArgument
from .method import Method


@dataclass(frozen=True, slots=True)
class Gradient(Method):
    """The gradient of the score at the example.

    Simonyan, Vedaldi and Zisserman, 2013, "Deep Inside Convolutional Networks". `signed` keeps the sign when channels
    are reduced, `squared` squares instead; `times_input` multiplies by the model's input (Shrikumar, Greenside and
    Kundaje, 2016, "Not Just a Black Box").
    """

    is_one_row: ClassVar[bool] = True

    signed: bool = False
    times_input: bool = False
    squared: bool = False

    def message(self) -> pb.Method:
        signed, squared = flag(self.signed, "method.signed"), flag(self.squared, "method.squared")
        if signed and squared:
            raise InvalidArgument("method.squared: got True together with signed, expected at most one of the two")
        magnitude = pb.MAGNITUDE_SQUARED if squared else pb.MAGNITUDE_SIGNED if signed else pb.MAGNITUDE_ABSOLUTE
        times_input = flag(self.times_input, "method.times_input")
        return pb.Method(gradient=pb.GradientMethod(magnitude=magnitude, times_input=times_input))


@dataclass(frozen=True, slots=True)
class GradCAM(Method):
    """The sum of a layer's channels, weighted by their mean gradients; one signed value per pixel.

    Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, 2017, "Grad-CAM: Visual Explanations from Deep Networks via
    Gradient-based Localization". `layer` is one of `ModelInfo.layers`; empty is the last layer that every path to the
    output passes through. `keep_negative` omits the final ReLU.
    """

    is_one_row: ClassVar[bool] = True

    layer: str = ""
    keep_negative: bool = False

    def message(self) -> pb.Method:
        keep_negative = flag(self.keep_negative, "method.keep_negative")
        layer = text(self.layer, "method.layer")
        return pb.Method(grad_cam=pb.GradCamMethod(layer=layer, keep_negative=keep_negative))


@dataclass(frozen=True, slots=True)
class LayerGradientXActivation(Method):
    """A layer's gradient times its activation.

    Ancona, Ceolini, Öztireli and Gross, 2018, "Towards better understanding of gradient-based attribution methods for
    Deep Neural Networks". `layer` is one of `ModelInfo.layers`; empty is the last layer that every path to the output
    passes through.
    """

    is_one_row: ClassVar[bool] = True

    layer: str = ""

    def message(self) -> pb.Method:
        layer = text(self.layer, "method.layer")
        return pb.Method(layer_gradient_x_activation=pb.LayerGradientXActivationMethod(layer=layer))


@dataclass(frozen=True, slots=True)
class GuidedBackpropagation(Method):
    """The gradient, where the backward pass through each ReLU keeps only positive gradients.

    Springenberg, Dosovitskiy, Brox and Riedmiller, 2014, "Striving for Simplicity: The All Convolutional Net".
    """

    is_one_row: ClassVar[bool] = True

    def message(self) -> pb.Method:
        return pb.Method(guided_backpropagation=pb.GuidedBackpropagationMethod())


GRADIENT = Gradient()
