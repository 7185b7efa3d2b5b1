"""Channel reduction: reduces the C channels of an attribution to one."""

import enum

from torch import Tensor


class Magnitude(enum.Enum):
    """How the sign of a gradient is treated when channels are reduced."""

    ABSOLUTE = "absolute"
    SIGNED = "signed"
    SQUARED = "squared"


class Channels(enum.Enum):
    """How the C channels of an attribution are reduced to one."""

    MAX_ABS = "max_abs"
    SUM = "sum"
    MEAN_ABS = "mean_abs"
    L2 = "l2"
    NONE = "none"


def reduce(attribution: Tensor, channels: Channels, magnitude: Magnitude | None) -> Tensor:
    """Reduce an attribution, [C, H, W], to a map, [H, W]; `NONE` returns it unreduced.

    `magnitude` is None for an attribution that is not a plain gradient: a sum then keeps its sign, a maximum does not.
    """
    if magnitude is Magnitude.SQUARED:
        attribution = attribution.square()
    signed = magnitude is Magnitude.SIGNED
    match channels:
        case Channels.NONE:
            return attribution
        case Channels.MAX_ABS if signed:
            largest = attribution.abs().argmax(dim=0, keepdim=True)  # [1, H, W]
            return attribution.gather(0, largest)[0]
        case Channels.MAX_ABS:
            return attribution.abs().amax(dim=0)
        case Channels.SUM:
            return (attribution.abs() if magnitude is Magnitude.ABSOLUTE else attribution).sum(dim=0)
        case Channels.MEAN_ABS:
            return attribution.abs().mean(dim=0)
        case Channels.L2:
            return attribution.square().sum(dim=0).sqrt()


def may_be_negative(channels: Channels, magnitude: Magnitude | None) -> bool:
    """Return whether a map of this reduction may have negative elements."""
    match channels:
        case Channels.NONE:
            return magnitude is not Magnitude.SQUARED
        case Channels.MAX_ABS:
            return magnitude is Magnitude.SIGNED
        case Channels.SUM:
            return magnitude in (Magnitude.SIGNED, None)
        case _:
            return False
