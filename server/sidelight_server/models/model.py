"""A model that serves: its kernel, its preprocessing, its labels, and its digest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from .. import scores
from ..attribution import Choice, Score
from ..errors import ConfigurationError, InvalidArgument, NotFound, near
from ..kernel import Kernel
from ..staging import normalise
from .preprocessing import Preprocessing
from .spec import ModelSpec

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
        self.digest = _digest(spec.module, self.preprocessing, self.outputs, self.labels)
        self.kernel = Kernel(spec.module, device=device, outputs=self.outputs)
        # Pixels are normalised, and floats staged, in no less than float32; a half-precision model rounds after that.
        self._exact = torch.float64 if self.kernel.dtype == torch.float64 else torch.float32
        self.class_count = len(self.labels)  # without labels and input size, unknown until the first rows ran: 0
        self.layers = tuple(name for name, _ in spec.module.named_modules() if name)
        if self.preprocessing is not None:
            self._try(self.preprocessing)
            self._mean, self._std = (
                torch.tensor(each, dtype=torch.float64)[:, None, None].mul(255).to(device, self._exact)
                for each in (self.preprocessing.mean, self.preprocessing.std)
            )

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

    def label_of(self, index: int) -> str:
        """Return a class's name, empty where there is none."""
        return self.labels[index] if index < len(self.labels) else ""

    def _labelled(self, label: str) -> int:
        named = [index for index, each in enumerate(self.labels) if each == label]
        if not named:
            raise NotFound(f'target: model "{self.name}" has no label "{label}"; {near(label, self.labels)}')
        if len(named) > 1:
            classes = ", ".join(map(str, named))
            raise InvalidArgument(f'target: label "{label}" names the classes {classes}; give one of these indices')
        return named[0]

    def _try(self, preprocessing: Preprocessing) -> None:
        shape = (1, preprocessing.channels, preprocessing.height, preprocessing.width)
        inputs = torch.zeros(shape, dtype=self.kernel.dtype, device=self.kernel.device)
        try:
            answer = self.kernel.run(inputs, [None], [self.scores[0]])
        except Exception as error:
            raise ConfigurationError(
                f'model "{self.name}": failed on an input of {list(shape)}: {type(error).__name__}: {error}'
            ) from error
        n_classes = answer.probabilities.shape[1]
        if n_classes < 2:
            raise ConfigurationError(
                f'model "{self.name}": returned [1, {n_classes}]; models of a single output are not served yet'
            )
        if self.labels and len(self.labels) != n_classes:
            raise ConfigurationError(f'labels: got {len(self.labels)}, model "{self.name}" has {n_classes} classes')
        self.class_count = n_classes


def _preprocessing(spec: ModelSpec) -> Preprocessing | None:
    if spec.input_size is None:
        given = [name for name in ("mean", "std", "resize", "interpolation") if getattr(spec, name) is not None]
        if given:
            raise ConfigurationError(f"{given[0]}: is set, but input_size is not; set input_size to C, H, W")
        return None
    channels, height, width = spec.input_size
    try:
        return Preprocessing(
            channels=channels,
            height=height,
            width=width,
            mean=_for_each_channel(spec.mean, channels, default=0.0),
            std=_for_each_channel(spec.std, channels, default=1.0),
            resize=spec.resize if spec.resize is not None else max(height, width),
            interpolation=spec.interpolation or "bilinear",
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def _for_each_channel(values: Sequence[float] | None, channels: int, *, default: float) -> tuple[float, ...]:
    return (default,) * channels if values is None else tuple(values)


def _digest(module: nn.Module, preprocessing: Preprocessing | None, outputs: str, labels: tuple[str, ...]) -> str:
    """Return the SHA-256 of weights, preprocessing, outputs and labels, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    facts = {"preprocessing": preprocessing and asdict(preprocessing), "outputs": outputs, "labels": labels}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()
