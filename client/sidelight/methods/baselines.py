"""Baselines: the reference input of a path method, or the fill of an occluded window, in the model's input space."""

from dataclasses import dataclass

import numpy as np

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from .._inputs.tensors import Array, ArrayLike, TorchTensor, array_of, floats
from .._inputs.validation import did_you_mean, real
from ..exceptions import InvalidArgument

BLUR_SIGMA_PX = 10.0


@dataclass(frozen=True, slots=True)
class Blurred:
    """The example, blurred by a Gaussian with a standard deviation of `sigma` pixels."""

    sigma: float = BLUR_SIGMA_PX

    def message(self) -> pb.Baseline:
        return pb.Baseline(blurred=pb.BlurredBaseline(sigma=real(self.sigma, "method.baseline.sigma")))


_NAMED = {
    "zero": pb.Baseline(constant=0.0),
    "black": pb.Baseline(black=pb.BlackBaseline()),
    "mean_color": pb.Baseline(mean_color=pb.MeanColorBaseline()),
    "blurred": Blurred().message(),
}
NAMES = tuple(_NAMED)
_EXPECTED = f"{', '.join(NAMES)}, a number, Blurred() or a floating array [C, H, W] or [N, C, H, W]"

# One of `NAMES`, one value for all elements, a blur, or an array.
Baseline = str | float | Blurred | Array | TorchTensor | ArrayLike


def baseline_message(baseline: Baseline) -> pb.Baseline:
    """Convert a baseline to its message. `InvalidArgument` for anything else."""
    if isinstance(baseline, str):
        if baseline not in _NAMED:
            raise InvalidArgument(
                f"method.baseline: got {baseline!r}, expected {_EXPECTED}{did_you_mean(baseline, NAMES)}"
            )
        return _NAMED[baseline]
    if isinstance(baseline, Blurred):
        return baseline.message()
    if isinstance(baseline, int | float | np.number):
        return pb.Baseline(constant=real(baseline, "method.baseline"))
    return pb.Baseline(tensor=floats(baseline, "method.baseline", expected=_EXPECTED))


def baseline_text(message: pb.Baseline) -> str:
    """Return a baseline as text; an array is only "tensor"."""
    match message.WhichOneof("baseline"):
        case None:
            return "zero"
        case "constant":
            constant = repr(message.constant)
            return "zero" if constant == "0.0" else constant
        case "blurred":
            return f"blurred(sigma={message.blurred.sigma!r})"
        case name:
            return name


def given_tensor(method: pb.Method) -> tensor_pb2.Tensor | None:
    """Return the caller's array inside a method message, or None. It is not a copy: changes apply to the method."""
    match method.WhichOneof("method"):
        case "smoothgrad":
            return given_tensor(method.smoothgrad.base)
        case "expected_gradients":
            has_any = method.expected_gradients.HasField("baselines")
            return method.expected_gradients.baselines if has_any else None
        case "integrated_gradients":
            baseline = method.integrated_gradients.baseline
        case "occlusion":
            baseline = method.occlusion.baseline
        case _:
            return None
    return baseline.tensor if baseline.HasField("tensor") else None


def given_array(method: pb.Method) -> Array | None:
    """Return a copy of the array that a method was given, or None."""
    tensor = given_tensor(method)
    return None if tensor is None else array_of(tensor)
