"""`Method`, any of the methods, and which of them take one row for each example.

A class holds what was asked for; `message()` says it on the wire with every default filled in, and raises
`InvalidArgument` for what the wire cannot hold. Whether a number is within its range, the server says.
"""

from .gradient import GradCAM, Gradient, GuidedBackpropagation, LayerGradientXActivation
from .path import ExpectedGradients, IntegratedGradients, SmoothGrad
from .perturbation import RISE, Occlusion

Method = (
    Gradient
    | SmoothGrad
    | IntegratedGradients
    | ExpectedGradients
    | GradCAM
    | LayerGradientXActivation
    | Occlusion
    | RISE
    | GuidedBackpropagation
)


def is_one_row(method: Method) -> bool:
    """Say whether a method runs each example once."""
    return isinstance(method, Gradient | GradCAM | LayerGradientXActivation | GuidedBackpropagation)
