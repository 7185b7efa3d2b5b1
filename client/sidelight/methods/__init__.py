"""Attribution methods and their baselines, as dataclasses and as text.

May import `_inputs` and everything below.
"""

from .baselines import Blurred
from .gradient import GradCAM, Gradient, GuidedBackpropagation, LayerGradientXActivation
from .method import Method
from .path import ExpectedGradients, IntegratedGradients, SmoothGrad
from .perturbation import RISE, Occlusion

__all__ = [
    "RISE",
    "Blurred",
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
