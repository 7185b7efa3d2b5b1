"""Methods: how points are chosen and gradients folded, each with its paper."""

from .cam import GradCam, LayerGradientTimesActivation
from .expected import ExpectedGradients
from .gradient import Gradient, GuidedBackpropagation
from .method import Method
from .occlusion import Occlusion, Rise
from .path import IntegratedGradients
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
