"""Channel reduction: the C channels of an attribution become one. With a = a channel's attribution at a pixel."""

import enum

from torch import Tensor


class Magnitude(enum.Enum):
    """What becomes of a gradient's sign when channels are reduced."""

    ABSOLUTE = "absolute"
    SIGNED = "signed"
    SQUARED = "squared"


class Channels(enum.Enum):
    """How the C channels of an attribution become one."""

    MAX_ABS = "max_abs"
    SUM = "sum"
    MEAN_ABS = "mean_abs"
    L2 = "l2"
    NONE = "none"


def reduce(attribution: Tensor, channels: Channels, magnitude: Magnitude | None) -> Tensor:
    """Return the map, [H, W], of an attribution, [C, H, W]; without reduction the attribution itself.

    `magnitude` is that of a gradient. What is not a gradient, None, keeps its sign in a sum and has none in a maximum.
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
    """Say whether a map so reduced may have negative elements."""
    match channels:
        case Channels.NONE:
            return magnitude is not Magnitude.SQUARED
        case Channels.MAX_ABS:
            return magnitude is Magnitude.SIGNED
        case Channels.SUM:
            return magnitude in (Magnitude.SIGNED, None)
        case _:
            return False
