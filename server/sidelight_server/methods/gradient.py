"""The gradient and gradient × input: methods of one row.

Simonyan, Vedaldi and Zisserman, 2013, "Deep Inside Convolutional Networks: Visualising Image Classification Models and
Saliency Maps". Shrikumar, Greenside and Kundaje, 2016, "Not Just a Black Box: Learning Important Features Through
Propagating Activation Differences".
"""

from torch import Tensor

from ..attribution import Channels, Gradient
from .channels import reduce


def finish(gradients: Tensor, inputs: Tensor, *, method: Gradient, channels: Channels) -> Tensor:
    """Return the maps, [n, H, W] or [n, C, H, W], of gradients at inputs, both [n, C, H, W]."""
    attributions = gradients * inputs if method.times_input else gradients
    return reduce(attributions, channels, method.magnitude)
