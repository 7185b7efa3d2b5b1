"""The gradient, gradient × input, and guided backpropagation: methods of one row."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .channels import Channels, Magnitude
from .method import Example, OneRowMethod, Outcome, Probe, Rectifiers, RowOutput, Steps


@dataclass(frozen=True, slots=True)
class Gradient(OneRowMethod):
    """The gradient at the example, optionally times the input.

    Simonyan, Vedaldi and Zisserman, 2013, "Deep Inside Convolutional Networks: Visualising Image Classification Models
    and Saliency Maps". Shrikumar, Greenside and Kundaje, 2016, "Not Just a Black Box: Learning Important Features
    Through Propagating Activation Differences".
    """

    name: ClassVar[str] = "gradient"
    magnitude: Magnitude = Magnitude.ABSOLUTE
    times_input: bool = False

    def run(self, example: Example) -> Steps:
        output = yield from example.evaluate(gradient=True)
        return Outcome(self.attribution(output))

    def reduction(self, channels: Channels) -> Channels | None:
        """`NONE` or `MAX_ABS` if the map is the gradient or its max-abs reduction: then a chunk is reduced at once."""
        is_plain = channels is Channels.NONE and self.magnitude is not Magnitude.SQUARED
        is_largest = channels is Channels.MAX_ABS and self.magnitude is Magnitude.ABSOLUTE
        return channels if (is_plain or is_largest) and not self.times_input else None

    def attribution(self, output: RowOutput) -> Tensor:
        """Return the attribution, [C, H, W], from one row's output."""
        assert output.gradient is not None  # noqa: S101
        return output.gradient * output.input if self.times_input else output.gradient


GRADIENT = Gradient()


@dataclass(frozen=True, slots=True)
class GuidedBackpropagation(Gradient):
    """The gradient, where each ReLU or ReLU6 passes only positive gradients of positive inputs.

    Springenberg, Dosovitskiy, Brox and Riedmiller, 2014, "Striving for Simplicity: The All Convolutional Net".
    """

    name: ClassVar[str] = "guided_backpropagation"

    @property
    def probe(self) -> Probe:
        return Rectifiers.GUIDED
