"""`Method`, any of the methods, and which of them take one row for each example.

A class holds what was asked for; `message()` says it on the wire with every default filled in, and raises
`InvalidArgument` for what the wire cannot hold. Whether a number is within its range, the server says.
"""

from .gradient import GradCam, Gradient, GuidedBackpropagation, LayerGradientTimesActivation
from .path import ExpectedGradients, IntegratedGradients, SmoothGrad
from .perturbation import Occlusion, Rise

Method = (
    Gradient
    | SmoothGrad
    | IntegratedGradients
    | ExpectedGradients
    | GradCam
    | LayerGradientTimesActivation
    | Occlusion
    | Rise
    | GuidedBackpropagation
)


def is_one_row(method: Method) -> bool:
    """Say whether a method runs each example once."""
    return isinstance(method, Gradient | GradCam | LayerGradientTimesActivation | GuidedBackpropagation)
