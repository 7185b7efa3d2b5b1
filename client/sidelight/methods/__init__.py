"""Attribution methods and their baselines, as a caller writes them and as text.

May import `_inputs` and everything below.
"""

from .baselines import Blurred
from .gradient import GradCam, Gradient, GuidedBackpropagation, LayerGradientTimesActivation
from .method import Method
from .path import ExpectedGradients, IntegratedGradients, SmoothGrad
from .perturbation import Occlusion, Rise

__all__ = [
    "Blurred",
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
