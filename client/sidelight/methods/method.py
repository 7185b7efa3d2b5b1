"""`Method`: the union of all attribution methods.

Each class holds a method's options. `message()` converts them, including defaults, to the wire message. It raises
`InvalidArgument` for values that the schema cannot represent; the server checks ranges.
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
    """Return whether a method computes one row per example."""
    return isinstance(method, Gradient | GradCAM | LayerGradientXActivation | GuidedBackpropagation)
