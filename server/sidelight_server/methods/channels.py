"""Channel reduction: the C channels of an attribution become one. With a = a channel's attribution at a pixel."""

from torch import Tensor

from ..attribution import Channels, Magnitude


def reduce(attributions: Tensor, channels: Channels, magnitude: Magnitude) -> Tensor:
    """Return maps, [n, H, W], of attributions, [n, C, H, W]; without reduction the attributions themselves."""
    signed = magnitude is Magnitude.SIGNED
    match channels:
        case Channels.NONE:
            return attributions
        case Channels.MAX_ABS if signed:
            largest = attributions.abs().argmax(dim=1, keepdim=True)  # [n, 1, H, W]
            return attributions.gather(1, largest)[:, 0]
        case Channels.MAX_ABS:
            return attributions.abs().amax(dim=1)
        case Channels.SUM:
            return (attributions if signed else attributions.abs()).sum(dim=1)
        case Channels.MEAN_ABS:
            return attributions.abs().mean(dim=1)
        case Channels.L2:
            return attributions.square().sum(dim=1).sqrt()
