"""The input of a model: its preprocessing, the shape of its trial input, and the conversion to kernel inputs."""

import numpy as np
import torch
from torch import Tensor

from ..compute.replica.replica import weights_dtype
from ..compute.staging import normalize
from ..config.spec import ModelSpec
from ..errors import ConfigurationError
from ..inputs.preprocessing import Preprocessing
from ..methods.method import Shape
from .trial.checks import noise


def trial_shape_of(spec: ModelSpec) -> Shape | None:
    """Return C, H, W of the trial input: the input size or the trial size. Raises `ConfigurationError` for both."""
    if spec.input_size is not None and spec.trial_size is not None:
        raise ConfigurationError("trial_size: is set, and so is input_size, which is the size to try; leave it unset")
    return spec.trial_size if spec.input_size is None else spec.input_size


def trial_input(spec: ModelSpec, device: torch.device) -> Tensor | None:
    """Return the input of the trial, [n, C, H, W]; None if its shape is not known."""
    shape = trial_shape_of(spec)
    if shape is None:
        return None
    most = spec.batch[1] if spec.batch else 0
    return noise(shape, 1 if most == 1 else 2).to(device, weights_dtype(spec.module))


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


class InputConversion:
    """Converts staged examples to inputs of a kernel with a data type, on a device."""

    def __init__(self, preprocessing: Preprocessing | None, *, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        # Pixels are normalized and floats staged in at least float32; a half-precision model rounds afterwards.
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.staged_dtype = np.dtype(np.float64 if exact == torch.float64 else np.float32)  # of floating arrays
        self.black: Tensor | None = None  # [C, 1, 1], the normalized value of pixel 0
        if preprocessing is not None:
            self._mean, self._std = (
                torch.tensor(each, dtype=torch.float64)[:, None, None].to(device, exact)
                for each in (preprocessing.mean_in_pixels, preprocessing.std_in_pixels)
            )
            self.black = (-self._mean / self._std).to(dtype)

    def __call__(self, staged: Tensor) -> Tensor:
        """Convert staged pixels, uint8 [n, H, W, C], or floating arrays, [n, C, H, W], to inputs, [n, C, H, W]."""
        if staged.dtype == torch.uint8:
            staged = normalize(staged, self._mean, self._std)
        return staged.to(self._dtype)
