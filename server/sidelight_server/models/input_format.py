"""The input of a model: its preprocessing, and the shape of its trial input."""

from ..config.spec import ModelSpec
from ..errors import (
    ConfigurationError,
)
from ..inputs.preprocessing import Preprocessing
from ..methods.method import Shape


def trial_shape_of(spec: ModelSpec) -> Shape | None:
    """Return C, H, W of the trial input: the input size or the trial size. Raises `ConfigurationError` for both."""
    if spec.input_size is not None and spec.trial_size is not None:
        raise ConfigurationError("trial_size: is set, and so is input_size, which is the size to try; leave it unset")
    return spec.trial_size if spec.input_size is None else spec.input_size


def preprocessing_of(spec: ModelSpec) -> Preprocessing | None:
    """Return the preprocessing; None without an input size. Raises `ConfigurationError`."""
    if spec.input_size is None:
        names = ("mean", "std", "pixel_range", "resize", "odd_margin", "interpolation", "window")
        given = [name for name in names if getattr(spec, name) is not None]
        if given:
            raise ConfigurationError(f"{given[0]}: is set, but input_size is not; set input_size to C, H, W")
        return None
    channels, height, width = spec.input_size
    try:
        return Preprocessing(
            channels=channels,
            height=height,
            width=width,
            mean=spec.mean if spec.mean is not None else (0.0,) * channels,
            std=spec.std if spec.std is not None else (1.0,) * channels,
            resize=spec.resize if spec.resize is not None else max(height, width),
            odd_margin=spec.odd_margin or "round",
            interpolation=spec.interpolation or "bilinear",
            pixel_range=spec.pixel_range or (0.0, 1.0),
            window=spec.window,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
