"""A model that serves: its kernel, its preprocessing, its labels, and its digest."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from .. import scores
from ..attribution import Choice, Score
from ..errors import ConfigurationError, InvalidArgument, NotFound, near
from ..kernel import Kernel
from ..staging import normalise
from .preprocessing import Preprocessing
from .spec import ModelSpec
from .weights import Weights

log = logging.getLogger("sidelight")

DEFAULT_NAME = "model"


class Model:
    """One version of one model on one device.

    It is made from a whole specification, and tried once: `ConfigurationError` says what does not fit.
    """

    def __init__(self, spec: ModelSpec, *, device: torch.device, version: int = 1) -> None:
        self.name = spec.name or DEFAULT_NAME
        self.version = version
        self.outputs: scores.Outputs = spec.outputs or "logits"
        self.labels = tuple(spec.labels or ())
        self.preprocessing = _preprocessing(spec)
        self.class_count = len(self.labels)  # without labels and input size, unknown until the first rows ran: 0
        self._returned = 0
        self.rows_touch = False  # whether one row's outputs depend on its neighbours: then it runs alone
        self.layers = tuple(name for name, _ in spec.module.named_modules() if name)
        with self._refusing("cannot be replicated and moved to the device"):
            facts = {
                "preprocessing": self.preprocessing and asdict(self.preprocessing),
                "outputs": self.outputs,
                "labels": self.labels,
            }
            self._weights = Weights(spec.module, facts=json.dumps(facts, sort_keys=True))
            self.kernel = Kernel(spec.module, device=device, outputs=self.outputs)
        # Pixels are normalised, and floats staged, in no less than float32; a half-precision model rounds after that.
        self._exact = torch.float64 if self.kernel.dtype == torch.float64 else torch.float32
        if self.preprocessing is not None:
            self._try(self.preprocessing)
            self._mean, self._std = (
                torch.tensor(each, dtype=torch.float64)[:, None, None].mul(255).to(device, self._exact)
                for each in (self.preprocessing.mean, self.preprocessing.std)
            )

    @property
    def digest(self) -> str:
        """The SHA-256 of weights, preprocessing, outputs and labels, in hexadecimal, as they are now."""
        return self._weights.digest

    @property
    def precision(self) -> str:
        """The type that the model computes in: "float32"; "tf32" where a GPU's convolutions may round to that."""
        name = str(self.kernel.dtype).removeprefix("torch.")
        rounds = self.kernel.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return "tf32" if rounds and name == "float32" else name

    @property
    def staged_dtype(self) -> np.dtype[np.generic]:
        """The type in which floating arrays go to the device."""
        return np.dtype(np.float64 if self._exact == torch.float64 else np.float32)

    @property
    def largest(self) -> float:
        """The largest number that the model's type holds."""
        return float(torch.finfo(self.kernel.dtype).max)

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that the model can give."""
        return scores.available(self.outputs)

    def inputs(self, staged: Tensor) -> Tensor:
        """Return the kernel's input, [n, C, H, W], of staged pixels, uint8 [n, H, W, C], or staged floating arrays."""
        if staged.dtype == torch.uint8:
            staged = normalise(staged, self._mean, self._std)
        return staged.to(self.kernel.dtype)

    def class_of(self, choice: Choice) -> int:
        """Return a class's number. `NotFound` for an unknown label, `InvalidArgument` for a number out of range."""
        if isinstance(choice, str):
            return self._labelled(choice)
        if choice < 0 or (self.class_count and choice >= self.class_count):
            bound = str(self.class_count - 1) if self.class_count else "the last class"
            raise InvalidArgument(f'target: class index {choice}, model "{self.name}" has 0 to {bound}')
        return choice

    def learn_class_count(self, n_classes: int) -> None:
        """Take note of how many classes the model returned. `ValueError` if that changes."""
        if self._returned not in (0, n_classes):
            raise ValueError(f"the model returned {n_classes} classes, {self._returned} before")
        self._returned = self.class_count = n_classes

    def _labelled(self, label: str) -> int:
        named = [index for index, each in enumerate(self.labels) if each == label]
        if not named:
            raise NotFound(f'target: model "{self.name}" has no label "{label}"; {near(label, self.labels)}')
        if len(named) > 1:
            classes = ", ".join(map(str, named))
            raise InvalidArgument(f'target: label "{label}" names the classes {classes}; give one of these indices')
        return named[0]

    def _try(self, preprocessing: Preprocessing) -> None:
        shape = (2, preprocessing.channels, preprocessing.height, preprocessing.width)
        inputs = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        inputs = inputs.to(self.kernel.device, self.kernel.dtype)
        with self._refusing(f"failed on an input of {[1, *shape[1:]]}"):
            answer = self.kernel.run(inputs[:1], [None], [self.scores[0]])
        n_classes = answer.probabilities.shape[1]
        if self.labels and len(self.labels) != n_classes:
            raise ConfigurationError(f'labels: got {len(self.labels)}, model "{self.name}" has {n_classes} classes')
        self.learn_class_count(n_classes)
        with self._refusing(f"failed on an input of {list(shape)}"):
            self.rows_touch = self.kernel.rows_touch(inputs)
        if self.rows_touch:
            log.warning('event=rows_touch model="%s" message="examples touch each other: each runs alone"', self.name)

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise ConfigurationError(f'model "{self.name}": {what}: {type(error).__name__}: {error}') from error


def _preprocessing(spec: ModelSpec) -> Preprocessing | None:
    if spec.input_size is None:
        given = [name for name in ("mean", "std", "resize", "interpolation") if getattr(spec, name) is not None]
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
            interpolation=spec.interpolation or "bilinear",
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
