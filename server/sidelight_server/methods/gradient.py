"""The gradient, gradient × input, and guided backpropagation: methods of one row."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .channels import Channels, Magnitude
from .method import Example, Method, Outcome, Probe, Rectifiers, RowOutput, Shape, Steps


@dataclass(frozen=True, slots=True)
class Gradient(Method):
    """The gradient at the example, or that times the input.

    Simonyan, Vedaldi and Zisserman, 2013, "Deep Inside Convolutional Networks: Visualising Image Classification Models
    and Saliency Maps". Shrikumar, Greenside and Kundaje, 2016, "Not Just a Black Box: Learning Important Features
    Through Propagating Activation Differences".
    """

    name: ClassVar[str] = "gradient"
    magnitude: Magnitude = Magnitude.ABSOLUTE
    times_input: bool = False

    @property
    def begins_with_gradient(self) -> bool:
        """The example itself is all."""
        return True

    @property
    def is_one_row(self) -> bool:
        """The example itself is all."""
        return True

    def rows(self, shape: Shape) -> int:
        """One."""
        return 1

    def run(self, example: Example) -> Steps:
        """Take the gradient where the example is."""
        output = yield from example.read(gradient=True)
        return Outcome(self.attribution(output) if output.map is None else output.map)

    def is_largest_absolute(self, channels: Channels) -> bool:
        """Whether that is all: then a whole chunk of them is reduced at once."""
        return channels is Channels.MAX_ABS and self.magnitude is Magnitude.ABSOLUTE and not self.times_input

    def attribution(self, output: RowOutput) -> Tensor:
        """Return the attribution, [C, H, W], of one row's output."""
        assert output.gradient is not None  # noqa: S101
        return output.gradient * output.input if self.times_input else output.gradient


GRADIENT = Gradient()


@dataclass(frozen=True, slots=True)
class GuidedBackpropagation(Gradient):
    """The gradient where only what is positive, on both ways, passes a rectifier (ReLU, ReLU6).

    Springenberg, Dosovitskiy, Brox and Riedmiller, 2014, "Striving for Simplicity: The All Convolutional Net".
    """

    name: ClassVar[str] = "guided_backpropagation"

    @property
    def probe(self) -> Probe:
        """The input, through guided rectifiers."""
        return Rectifiers.GUIDED
