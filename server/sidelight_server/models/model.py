"""A model that serves: its kernel, its preprocessing, its labels, and its digest."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from ..attribution import PREDICTED, Choice, Score
from ..calibration import DEFAULT_CHUNK_ROWS, Trial
from ..errors import ConfigurationError, InvalidArgument, NotFound, near
from ..kernel import Kernel
from ..probes import chosen_layer
from ..replica import weights_dtype
from ..scores import Head
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
        self._module = spec.module
        self.name = spec.name or DEFAULT_NAME
        self.version = version
        self.head = Head(spec.outputs or "logits", spec.activation or "softmax")
        self.labels = tuple(spec.labels or ())
        self.preprocessing = _preprocessing(spec)
        self.class_count = len(self.labels)  # without labels and input size, unknown until the first rows ran: 0
        self.output_shape: tuple[int, ...] = ()  # K, or K, h, w; as with the classes
        self.chunk_rows = DEFAULT_CHUNK_ROWS
        self.padded_rows = 0  # how many rows a chunk is filled up to, for the same bytes in every company
        self.warm_up: tuple[Trial, ...] = ()
        self.rows_touch = False  # whether one row's outputs depend on its neighbours: then it runs alone
        self.probed: dict[str, tuple[int, int]] = {}  # layers that can be probed, if the input size is fixed
        self._names = [name for name, _ in spec.module.named_modules() if name]
        with self._refusing("cannot be replicated and moved to the device"):
            facts = {
                "preprocessing": self.preprocessing and asdict(self.preprocessing),
                "outputs": self.head.outputs,
                "activation": self.head.activation,
                "labels": self.labels,
            }
            self._weights = Weights(spec.module, facts=json.dumps(facts, sort_keys=True))
            trial = None if self.preprocessing is None else _noise(self.preprocessing, 2)
            self.kernel = Kernel(
                spec.module,
                device=device,
                head=self.head,
                options=spec.options,
                trial=None if trial is None else trial.to(device, weights_dtype(spec.module)),
            )
        if self.kernel.options.fold:
            log.info('event=folded model="%s" norms=%d', self.name, self.kernel.n_folded)
        # Pixels are normalised, and floats staged, in no less than float32; a half-precision model rounds after that.
        self._exact = torch.float64 if self.kernel.dtype == torch.float64 else torch.float32
        self.black: Tensor | None = None  # [C, 1, 1], what pixel 0 becomes
        if self.preprocessing is not None:
            self._try()
            self._mean, self._std = (
                torch.tensor(each, dtype=torch.float64)[:, None, None].mul(255).to(device, self._exact)
                for each in (self.preprocessing.mean, self.preprocessing.std)
            )
            self.black = (-self._mean / self._std).to(self.kernel.dtype)

    @property
    def digest(self) -> str:
        """The SHA-256 of weights, preprocessing, outputs and labels, in hexadecimal, as they are now."""
        return self._weights.digest

    @property
    def precision(self) -> str:
        """The type that the model computes in: "float32"; "tf32" where a GPU's convolutions may round to that."""
        name = str(self.kernel.compute_dtype).removeprefix("torch.")
        rounds = self.kernel.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return "tf32" if rounds and name == "float32" else name

    @property
    def staged_dtype(self) -> np.dtype[np.generic]:
        """The type in which floating arrays go to the device."""
        return np.dtype(np.float64 if self._exact == torch.float64 else np.float32)

    @property
    def largest(self) -> float:
        """The largest number that the model's type holds."""
        return float(torch.finfo(self.kernel.compute_dtype).max)

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that the model can give."""
        return self.head.scores

    @property
    def layers(self) -> tuple[str, ...]:
        """The names that can be probed, in the order of the module tree; all names, if the input size is not fixed."""
        return tuple(name for name in self._names if not self.preprocessing or name in self.probed)

    @property
    def reproducible(self) -> bool:
        """Whether equal provenance promises equal bytes."""
        return self.padded_rows > 0

    def layer(self, name: str) -> str:
        """Return the layer that a name means. `NotFound` with the near names."""
        if self.preprocessing is not None or (name and name not in self._names):
            return chosen_layer(name, self.probed, self._names)
        return name

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

    def learn_output(self, shape: tuple[int, ...]) -> None:
        """Take note of what the model returned: K, or K, h, w. `ValueError` if K changes."""
        if self.output_shape and self.output_shape[0] != shape[0]:
            raise ValueError(f"the model returned {shape[0]} classes, {self.output_shape[0]} before")
        self.output_shape, self.class_count = shape, shape[0]

    def _labelled(self, label: str) -> int:
        named = [index for index, each in enumerate(self.labels) if each == label]
        if not named:
            raise NotFound(f'target: model "{self.name}" has no label "{label}"; {near(label, self.labels)}')
        if len(named) > 1:
            classes = ", ".join(map(str, named))
            raise InvalidArgument(f'target: label "{label}" names the classes {classes}; give one of these indices')
        return named[0]

    def inputs_like(self, n: int, *, seed: int = 0) -> Tensor:
        """Return n random inputs, [n, C, H, W], of the fixed size, for trials."""
        assert self.preprocessing is not None  # noqa: S101
        return _noise(self.preprocessing, n, seed=seed).to(self.kernel.device, self.kernel.dtype)

    def exact_kernel(self) -> Kernel:
        """Return a kernel of the same module without any option, to compare with."""
        return Kernel(self._module, device=self.kernel.device, head=self.head)

    def _try(self) -> None:
        inputs = self.inputs_like(2)
        failed = "failed" if self.kernel.options.is_exact else f"failed as {self.kernel.told}"
        with self._refusing(f"{failed} on an input of {[1, *inputs.shape[1:]]}"):
            answer = self.kernel.run(inputs[:1], [PREDICTED], [self.scores[0]])
        n_classes = answer.output_shape[0]
        if self.labels and len(self.labels) != n_classes:
            raise ConfigurationError(f'labels: got {len(self.labels)}, model "{self.name}" has {n_classes} classes')
        self.learn_output(answer.output_shape)
        with self._refusing(f"{failed} on an input of {list(inputs.shape)}"):
            self.rows_touch = self.kernel.rows_touch(inputs)
            self.probed = self.kernel.layers(inputs[:1])
        if self.rows_touch:
            self.chunk_rows = 1
            log.warning('event=rows_touch model="%s" message="examples touch each other: each runs alone"', self.name)

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except ConfigurationError as error:
            raise ConfigurationError(f'model "{self.name}": {error}') from error
        except Exception as error:
            why = str(error).partition("\n\n")[0]  # torch's compiler goes on with advice
            raise ConfigurationError(f'model "{self.name}": {what}: {type(error).__name__}: {why}') from error


def _noise(preprocessing: Preprocessing, n: int, *, seed: int = 0) -> Tensor:
    shape = (n, preprocessing.channels, preprocessing.height, preprocessing.width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


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
