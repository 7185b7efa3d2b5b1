"""Attribution methods: how points are chosen and gradients folded, each with its paper.

May import `errors` alone, and torch. A method knows neither models nor requests.
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
