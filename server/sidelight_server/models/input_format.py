"""The input of a model: its preprocessing, and the shape of its trial input."""

from collections.abc import Sequence

from ..config.spec import ModelSpec
from ..errors import (
    ConfigurationError,
)
from ..inputs.preprocessing import Preprocessing
from ..methods.method import Shape


def trial_shape_of(spec: ModelSpec) -> Shape | None:
    """Return C, H, W that a model is tried with: its input size, or what is to stand for all sizes."""
    if spec.input_size is not None and spec.trial_size is not None:
        raise ConfigurationError("trial_size: is set, and so is input_size, which is the size to try; leave it unset")
    wanted = spec.trial_size if spec.input_size is None else spec.input_size
    if wanted is None:
        return None
    try:
        channels, height, width = wanted
        if min(channels, height, width) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise ConfigurationError(f"trial_size: got {wanted!r}, expected C, H, W, each at least 1") from None
    return channels, height, width


def preprocessing_of(spec: ModelSpec) -> Preprocessing | None:
    """Return how pixels become inputs; None without an input size. Raises `ConfigurationError`."""
    if spec.input_size is None:
        names = ("mean", "std", "pixel_range", "resize", "odd_margin", "interpolation", "window")
        given = [name for name in names if getattr(spec, name) is not None]
        if given:
            raise ConfigurationError(f"{given[0]}: is set, but input_size is not; set input_size to C, H, W")
        return None
    try:
        channels, height, width = spec.input_size
    except (TypeError, ValueError):
        raise ConfigurationError(f"input_size: got {spec.input_size!r}, expected C, H, W") from None
    try:
        return Preprocessing(
            channels=channels,
            height=height,
            width=width,
            mean=_numbers("mean", spec.mean, channels, default=0.0),
            std=_numbers("std", spec.std, channels, default=1.0),
            resize=spec.resize if spec.resize is not None else max(height, width),
            odd_margin=spec.odd_margin or "round",
            interpolation=spec.interpolation or "bilinear",
            pixel_range=_range("pixel_range", spec.pixel_range) or (0.0, 1.0),
            window=_range("window", spec.window),
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _numbers(name: str, values: Sequence[float] | None, channels: int, *, default: float) -> tuple[float, ...]:
    if values is None:
        return (default,) * channels
    try:
        return tuple(float(each) for each in values)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name}: got {values!r}, expected one number for each channel") from None


def _range(name: str, values: Sequence[float] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    try:
        low, high = values
        return float(low), float(high)
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name}: got {values!r}, expected two numbers, the lower one first") from None
