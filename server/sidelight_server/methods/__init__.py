"""Attribution methods: each chooses points and folds their gradients into an attribution. Each names its paper.

May import only `errors`, torch and numpy. A method has no access to models or requests.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from .expected_gradients import ExpectedGradients
from .grad_cam import GradCAM, LayerGradientXActivation
from .gradient import Gradient, GuidedBackpropagation
from .integrated_gradients import IntegratedGradients
from .method import Method
from .occlusion import RISE, Occlusion
from .smoothgrad import SmoothGrad


def _methods() -> Iterator[type[Method]]:
    """Yield the methods of all modules of this package, sorted by module."""
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f".{found.name}", __name__)
        for each in vars(module).values():
            is_own = isinstance(each, type) and issubclass(each, Method) and each.__module__ == module.__name__
            if is_own and not inspect.isabstract(each):
                yield each


METHODS = tuple(_methods())

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
