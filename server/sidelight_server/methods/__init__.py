"""Attribution methods: each chooses points and folds their gradients into an attribution. Each names its paper.

May import only `errors` and torch. A method has no access to models or requests.
"""

from .expected_gradients import ExpectedGradients
from .grad_cam import GradCAM, LayerGradientXActivation
from .gradient import Gradient, GuidedBackpropagation
from .integrated_gradients import IntegratedGradients
from .method import Method
from .occlusion import RISE, Occlusion
from .smoothgrad import SmoothGrad

METHODS: tuple[type[Method], ...] = (
    Gradient,
    SmoothGrad,
    IntegratedGradients,
    ExpectedGradients,
    GradCAM,
    LayerGradientXActivation,
    Occlusion,
    RISE,
    GuidedBackpropagation,
)

__all__ = [
    "METHODS",
    "RISE",
    "ExpectedGradients",
    "GradCAM",
    "Gradient",
    "GuidedBackpropagation",
    "IntegratedGradients",
    "LayerGradientXActivation",
    "Method",
    "Occlusion",
    "SmoothGrad",
]
