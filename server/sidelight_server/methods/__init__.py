"""Attribution methods: how points are chosen and gradients folded, each with its paper.

May import `errors` alone, and torch. A method knows neither models nor requests.
"""

from .expected_gradients import ExpectedGradients
from .grad_cam import GradCam, LayerGradientTimesActivation
from .gradient import Gradient, GuidedBackpropagation
from .integrated_gradients import IntegratedGradients
from .method import Method
from .occlusion import Occlusion, Rise
from .smoothgrad import SmoothGrad

METHODS: tuple[type[Method], ...] = (
    Gradient,
    SmoothGrad,
    IntegratedGradients,
    ExpectedGradients,
    GradCam,
    LayerGradientTimesActivation,
    Occlusion,
    Rise,
    GuidedBackpropagation,
)

__all__ = [
    "METHODS",
    "ExpectedGradients",
    "GradCam",
    "Gradient",
    "GuidedBackpropagation",
    "IntegratedGradients",
    "LayerGradientTimesActivation",
    "Method",
    "Occlusion",
    "Rise",
    "SmoothGrad",
]
