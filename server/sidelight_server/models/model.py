"""A model that serves: its kernel, its preprocessing, its labels, and its digest."""

import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..compute.kernel import Kernel
from ..compute.layer_hooks import Guided
from ..compute.replica import Isolation, n_hooks, replicate, weights_dtype
from ..compute.saved_memory import SavedMemory, TooLarge
from ..compute.staging import normalize
from ..compute.torch_device import free_memory
from ..compute.weights import Identity, Seen, Weights
from ..config.model_settings import ModelSettings
from ..config.spec import ModelSpec
from ..domain import PREDICTED, Choice, Score
from ..errors import (
    ConfigurationError,
    InvalidArgument,
    NotFound,
    OutputsError,
    SidelightError,
    did_you_mean,
)
from ..methods import METHODS, GuidedBackpropagation
from ..methods.method import Shape
from ..telemetry.logs import Event
from .calibration import DEFAULT_CHUNK_ROWS, Trial
from .checks import gradient_fault, is_batch_dependent, noise
from .input_format import preprocessing_of, trial_shape_of
from .introspection import Detected, NotNumbersError, detect
from .row_limit import RowLimit

log = logging.getLogger("sidelight")

DEFAULT_NAME = "model"
MAX_SHAPES = 1024  # that are kept in mind, of a model without an input size
LITTLE_BYTES = 64 * 1024 * 1024  # which a chunk may take without a look at how much memory is free
TOUCHING = "examples touch each other: each runs alone"

_Value = TypeVar("_Value")


class InTurn(Protocol):
    """Runs a function on a device when it is its turn, and returns what that returns."""

    def __call__(self, task: Callable[[], _Value]) -> _Value:
        """Run it."""


def at_once(task: Callable[[], _Value]) -> _Value:
    """Run a function here and now: for a device that nobody else uses."""
    return task()


class Model:
    """One version of one model on one device.

    It is made from a whole specification, and tried once: `ConfigurationError` says what does not fit. What it runs on
    the device, then and while it is calibrated, it runs `in_turn`: as a task of the thread that owns the device,
    where that answers others already. A module is shared where others hold it too, and may write to its weights.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: torch.device,
        settings: ModelSettings | None = None,
        version: int = 1,
        in_turn: InTurn = at_once,
        is_shared: bool = False,
    ) -> None:
        self._module = spec.module
        self.settings = settings or ModelSettings()
        self.in_turn = in_turn
        self.name = spec.name or DEFAULT_NAME
        self.version = version
        self.labels = tuple(spec.labels or ())
        self._layer_layout = dict(spec.layer_layout or {})
        self.preprocessing = preprocessing_of(spec)
        self.trial_shape = trial_shape_of(spec)
        self.class_count = len(self.labels)  # without labels, and not tried, unknown until the first rows ran: 0
        self.output_shape: tuple[int, ...] = ()  # K, or K, h, w; as with the classes
        self.padded_rows = 0  # how many rows a chunk is filled up to, for the same bytes beside any neighbors
        self.warm_up: tuple[Trial, ...] = ()
        self.is_measured = False  # whether the size of its chunks was measured, and may grow when it is measured again
        self.neighbor_difference: float | None = None  # see `calibration`; None: not measured
        self._names = [name for name, _ in spec.module.named_modules() if name]
        trial = None
        if self.trial_shape is not None:
            most = spec.batch[1] if spec.batch else 0
            trial = noise(self.trial_shape, 1 if most == 1 else 2).to(device, weights_dtype(spec.module))
        self._isolation = Isolation(owned=None)
        self.has_rectifiers = True  # as far as is known: it is found out where the model is tried
        self.gradient_fault = ""  # why no map of gradients can be had; found out where the model is tried
        self._to_find_out = spec if trial is None else None  # on the first rows: there is nothing to try before
        detected = self._detected(spec, trial, device)
        self.adapter, self.head = detected.adapter, detected.head
        self.probed = detected.layers  # that a map can be made of, if it was tried
        self.is_batch_dependent = (
            detected.is_batch_dependent
        )  # whether one row's outputs depend on its neighbours: then it runs alone
        self._row_limit = RowLimit()
        self._shapes: dict[Shape, None] = {}  # the last that rows ran on, the newest last
        self._row_bytes: dict[Shape, int] = {}  # what a row takes, of the last shapes that were measured
        self.chunk_rows = self.at_most(DEFAULT_CHUNK_ROWS)
        with self._refusing("cannot be replicated and moved to the device"):
            self.kernel = in_turn(
                lambda: Kernel(
                    spec.module,
                    device=device,
                    adapter=self.adapter,
                    head=self.head,
                    layers=self.probed,
                    options=spec.options,
                    trial=trial,
                    isolation=self._isolation,
                    is_shared=is_shared,
                )
            )
            self._weights = Weights(self.kernel.watch, facts=json.dumps(self._facts(), sort_keys=True))
            self._seen: Seen | None = None  # of the state that the identity is of
            self._identity = Identity()
        if self.kernel.options.fold:
            log.info(Event("folded", model=self.name, norms=self.kernel.n_folded))
        elif spec.options.fold:
            message = "no BatchNorm directly follows a convolution or a linear layer; leave fold unset"
            log.warning(Event("not_folded", model=self.name, message=message))
        # Pixels are normalised, and floats staged, in no less than float32; a half-precision model rounds after that.
        self._exact = torch.float64 if self.kernel.dtype == torch.float64 else torch.float32
        self.black: Tensor | None = None  # [C, 1, 1], what pixel 0 becomes
        if self.is_tried:
            self._try()
        if self.preprocessing is not None:
            self._mean, self._std = (
                torch.tensor(each, dtype=torch.float64)[:, None, None].to(device, self._exact)
                for each in (self.preprocessing.mean_in_pixels, self.preprocessing.std_in_pixels)
            )
            self.black = (-self._mean / self._std).to(self.kernel.dtype)

    def _detected(self, spec: ModelSpec, trial: Tensor | None, device: torch.device) -> Detected:
        """Return what one run says, on a replica that shares no buffer: a pass may write to them."""
        hooks = n_hooks(spec.module)
        if hooks and trial is not None:
            with contextlib.suppress(Exception):  # a network whose hooks compute may need them to run at all
                return self._detected_without_hooks(spec, trial, device, n=hooks)
        if hooks:
            said = "hooks of the module's forward pass run with each pass here: "
            said += "outputs depend on them" if trial is not None else "set trial_size to have them tried and left out"
            log.warning(Event("hooks_kept", model=self.name, hooks=hooks, message=said))
        return self._tried(spec, trial, device)[1]

    def _detected_without_hooks(self, spec: ModelSpec, trial: Tensor, device: torch.device, *, n: int) -> Detected:
        """Detect with the caller's hooks left out. `ConfigurationError` where the outputs are others then."""
        without, detected = self._tried(spec, trial, device, keeps_hooks=False)
        with_hooks = replicate(spec.module, Isolation(owned=None)).to(device)

        def differ() -> bool:
            with torch.no_grad():
                ours, theirs = (detected.adapter(each, trial.clone()) for each in (without, with_hooks))
            return not torch.equal(ours, theirs)

        if self.in_turn(differ):
            self._isolation = Isolation(owned=None)
            raise ConfigurationError("the outputs depend on hooks")
        log.info(Event("hooks_dropped", model=self.name, hooks=n, message="the module's hooks do not run here"))
        return detected

    def _tried(
        self, spec: ModelSpec, trial: Tensor | None, device: torch.device, *, keeps_hooks: bool = True
    ) -> tuple[nn.Module, Detected]:
        """Run the detection; return the replica that it ran on, and take note of the buffers that it wrote to."""
        with self._refusing("cannot be replicated and moved to the device"):
            replica = replicate(spec.module, Isolation(owned=None, keeps_hooks=keeps_hooks)).to(device)
        versions = {name: each._version for name, each in _state(replica)}
        with self._refusing("" if trial is None else f"failed on an input of {list(trial.shape)}{self._by(spec)}"):
            detected = self.in_turn(lambda: detect(replica, spec, trial))
        if trial is not None:
            written = {name for name, each in _state(replica) if versions.get(name) != each._version}
            # By value too: torch does not count what a BatchNorm in train mode writes to its statistics.
            theirs = dict(spec.module.named_buffers())
            written |= {
                name for name, each in replica.named_buffers() if not torch.equal(each, theirs[name].to(device))
            }
            self._isolation = Isolation(frozenset(written), keeps_hooks=keeps_hooks)
            with self._refusing(f"failed on inputs like {list(trial.shape)}"):
                self._check_gradient(replica, detected, trial[:1])
                self.has_rectifiers = self.in_turn(lambda: _has_rectifiers(replica, detected, trial))
        return replica, detected

    def _check_gradient(self, module: nn.Module, detected: Detected, example: Tensor) -> None:
        """Look whether the gradient is that of the outputs."""
        adapter, rows = detected.adapter, 1 if detected.is_batch_dependent or detected.adapter.most == 1 else 2

        def run(inputs: Tensor) -> Tensor:
            return adapter(module, inputs * 1)  # a copy: it may begin with an operation in place

        self.gradient_fault = gradient_fault(run, example, in_turn=self.in_turn, most=rows)

    def _by(self, spec: ModelSpec) -> str:
        return ", as input_size says" if spec.input_size is not None else ", as trial_size says"

    def _facts(self) -> dict[str, object]:
        """Return all but the weights that a map depends on."""
        return {
            "preprocessing": self.preprocessing and asdict(self.preprocessing),
            "adapter": asdict(self.adapter),
            # Of a model that was not tried what is said of it: its digest stays when more is found out.
            "outputs": self._to_find_out.outputs if self._to_find_out else self.head.outputs,
            "activation": self._to_find_out.activation if self._to_find_out else self.head.activation,
            "labels": self.labels,
            **({"layer_layout": self._layer_layout} if self._layer_layout else {}),
        }

    def at_most(self, rows: int) -> int:
        """Return so many rows, or as many as the module takes at once."""
        return min(rows, self.adapter.most or rows)

    @property
    def chunk_rows(self) -> int:
        """How many rows run at once at most: what was set, or fewer while memory lacks."""
        return self._row_limit.of(self._chunk_rows)

    @chunk_rows.setter
    def chunk_rows(self, rows: int) -> None:
        self._chunk_rows = rows

    @property
    def set_chunk_rows(self) -> int:
        """How many rows run at once where memory allows it."""
        return self._chunk_rows

    def has_fitted(self, rows: int, shape: Shape) -> None:
        """Take note that so many rows of a shape ran at once. On the thread that owns the device, as `lacks_memory`."""
        self._row_limit.passed(rows, most=self._chunk_rows)
        _remember(self._shapes, shape, None)

    @property
    def has_run(self) -> bool:
        """Whether the model has run on any example."""
        return bool(self._shapes)

    def takes(self, shape: Shape) -> bool:
        """Whether the model is known to run on inputs of a shape, [C, H, W]: if not, a failure may be the caller's."""
        return self.preprocessing is not None or shape in self._shapes

    def lacks_memory(self, *, above: int) -> None:
        """Take note that more rows did not fit into memory: for a while they are not tried again."""
        self._row_limit.lower(above)

    def rows_at_once(self, shape: Shape) -> int:
        """Return how many rows of a shape a chunk takes: `chunk_rows`, or fewer where callers choose the size of each.

        On the thread that owns the device, as `check_memory`, which has the last word.
        """
        rows = self.chunk_rows
        if self._has_measured_size(shape) or self.padded_rows:
            return rows
        # Of a shape that is not known yet no more than its inputs, which are there before it is.
        a_row = self._row_bytes.get(shape) or 2 * math.prod(shape) * self.kernel.dtype.itemsize
        return max(1, min(rows, self._room(a_row, rows)))

    def check_memory(self, inputs: Tensor) -> None:
        """Raise `TooLarge` for rows, [n, C, H, W], of a size that callers chose and that memory lacks for.

        What a row of a shape takes is measured by a forward pass of one, which ends where that is too much already.
        """
        n, shape = len(inputs), _shape(inputs)
        if self._has_measured_size(shape):
            return
        if shape not in self._row_bytes:
            limit = self._memory_limit()
            kept = self.kernel.kept(inputs[:1], limit=limit)
            self._learn_row_bytes(kept, inputs[:1], limit=limit, n_rows=max(1, self.adapter.least))
        fitting = self._room(self._row_bytes[shape], n)
        if fitting < 1:
            raise self._too_large(shape, limit=self._memory_limit())
        if fitting < n:
            raise TooLarge(
                f'model "{self.name}": {n} rows of [C, H, W] = {list(shape)} at once, there is memory for {fitting}',
                fitting=0 if self.padded_rows else fitting,
            )

    def _has_measured_size(self, shape: Shape) -> bool:
        return self.preprocessing is not None or shape == self.trial_shape

    def _memory_limit(self) -> int:
        return self.settings.device_memory_limit or free_memory(self.kernel.device)

    def _room(self, a_row: int, rows: int) -> int:
        """Return how many rows of so many bytes there is memory for; `rows` where that is little."""
        return rows if rows * a_row <= self._little else self._memory_limit() // a_row

    @property
    def _little(self) -> int:
        return min(LITTLE_BYTES, self.settings.device_memory_limit or LITTLE_BYTES)

    def _learn_row_bytes(self, kept: SavedMemory, inputs: Tensor, *, limit: int, n_rows: int) -> None:
        """Take note of what a row takes, of what a pass of some rows kept. `TooLarge` where it was ended."""
        shape = _shape(inputs)
        if kept.is_over:
            raise self._too_large(shape, limit=limit)
        _remember(self._row_bytes, shape, -(-kept.n_bytes // n_rows) + 2 * inputs[0].nbytes)

    def _too_large(self, shape: Shape, *, limit: int) -> TooLarge:
        return TooLarge(
            f'images: an example of [C, H, W] = {list(shape)} takes more memory than there is for model "{self.name}", '
            f"{limit} bytes (device_memory_limit, or half of what is free); send a smaller one"
        )

    @property
    def digest(self) -> str:
        """The SHA-256 of weights, preprocessing, outputs and labels, in hexadecimal, as they are now."""
        return self._weights.digest

    def identify(self) -> Identity:
        """Return what the next chunk is computed by. On the thread that owns the device.

        Weights that others have written to are noticed, and the replica and the digest are made anew. So is the canary:
        the SHA-256 of what the replica makes of a fixed random input of the model's input or trial size, as
        "C×H×W:digest". It tells two networks apart that have the same weights. It is empty where two runs differ, or
        fail, or the model has no such size.
        """
        seen = self.kernel.watch.look(at_values=True)
        if seen != self._seen:
            self._identity = Identity(self.digest, self._canary())
            self._seen = seen
        return self._identity

    @property
    def is_identified(self) -> bool:
        """Whether the weights have not been written to since `identify`, as far as torch counts."""
        return self._seen is None or self.kernel.watch.look() == self._seen

    @property
    def canary(self) -> str:
        """That of `identify`; empty before the first chunk."""
        return self._identity.canary

    def _canary(self) -> str:
        if self.trial_shape is None:
            return ""
        inputs = self.inputs_like(1)
        try:
            first, second = (self.kernel.fingerprint(inputs) for _ in range(2))
        except Exception as error:  # the chunk that follows says what is wrong, to who asks
            log.warning(Event("canary_failed", model=self.name, message=f"{type(error).__name__}: {error}"))
            return ""
        return f"{'×'.join(map(str, self.trial_shape))}:{first}" if first == second else ""

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
    def serves_gradients(self) -> bool:
        """Whether methods that need a gradient can be asked for."""
        return not self.gradient_fault or self.settings.accept_partial_gradient

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods that can be asked for."""
        served = [each for each in METHODS if self.serves_gradients or not each.needs_gradient]
        return tuple(each.name for each in served if self.has_rectifiers or each is not GuidedBackpropagation)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names that can be probed, in the order of the module tree; all names, if the model has never run."""
        return tuple(name for name in self._names if not self.is_known or name in self.probed.layouts)

    @property
    def is_tried(self) -> bool:
        """Whether the model ran when it was loaded: on its input size, or on one to try it with."""
        return self.trial_shape is not None

    @property
    def shapes(self) -> object:
        """What two versions have in common if they are the same network, and cost the same."""
        state = self._module.state_dict().items()
        weights = [(name, each.shape, each.dtype) for name, each in state if isinstance(each, Tensor)]
        return self.trial_shape, self.kernel.options, self.adapter, weights

    @property
    def reproducible(self) -> bool:
        """Whether equal provenance promises equal bytes."""
        return self.padded_rows > 0

    def layer(self, name: str) -> str:
        """Return the layer that a name means. `NotFound` with the near names."""
        if self.is_known or (name and name not in self._names):
            return self.probed.chosen(name, self._names)
        return name

    def inputs(self, staged: Tensor) -> Tensor:
        """Return the kernel's input, [n, C, H, W], of staged pixels, uint8 [n, H, W, C], or staged floating arrays."""
        if staged.dtype == torch.uint8:
            staged = normalize(staged, self._mean, self._std)
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
        """Take note of what the model returned: K, or K, h, w. `OutputsError` if K changes."""
        if self.output_shape and self.output_shape[0] != shape[0]:
            raise OutputsError(f"the model returned {shape[0]} classes, {self.output_shape[0]} before")
        self.output_shape, self.class_count = shape, shape[0]

    @functools.cached_property
    def _classes(self) -> dict[str, list[int]]:
        """The numbers of the classes that bear each label."""
        classes: dict[str, list[int]] = {}
        for index, label in enumerate(self.labels):
            classes.setdefault(label, []).append(index)
        return classes

    @property
    def is_known(self) -> bool:
        """Whether it was found out how the module is called and what its outputs are."""
        return self._to_find_out is None

    def find_out(self, inputs: Tensor) -> None:
        """Find out on the first rows, [n, C, H, W], what the trial at load shows where an input size is known.

        On the thread that owns the device. `OutputsError` where the model cannot be served as it is; whatever the
        module raises itself is about these rows, and the next ones are tried again.
        """
        spec = self._to_find_out
        if spec is None:
            return
        rows = inputs.detach()[:1]
        trial = rows if self.adapter.most == 1 else rows.repeat(2, 1, 1, 1)
        replica = replicate(self._module, self._isolation).to(self.kernel.device)
        limit, detected = self._memory_limit(), None
        with SavedMemory(limit=limit, weights=replica) as kept:
            try:
                detected = detect(replica, spec, trial)
            except NotNumbersError:
                return  # of this example, which fails for it
            except ConfigurationError as error:
                if not kept.is_over:
                    raise OutputsError(str(error)) from error
            except Exception:
                if not kept.is_over:
                    raise
        self._learn_row_bytes(kept, trial, limit=limit, n_rows=max(len(trial), self.adapter.least))
        assert detected is not None  # noqa: S101
        self.adapter, self.head, self.is_batch_dependent = detected.adapter, detected.head, detected.is_batch_dependent
        self.probed = detected.layers
        self.kernel.adopt(adapter=detected.adapter, head=detected.head, layers=detected.layers)
        self._to_find_out = None
        log.info(Event(
            "found_out", model=self.name, call=self.adapter.summary, outputs=self.head.outputs,
            activation=self.head.activation,
        ))  # fmt: skip
        self._keep_apart()

    def _keep_apart(self) -> None:
        """Let rows that depend on each other run alone."""
        if self.is_batch_dependent:
            self.chunk_rows = 1
            log.warning(Event("rows_touch", model=self.name, message=TOUCHING))

    def _labelled(self, label: str) -> int:
        named = self._classes.get(label)
        if named is None:
            raise NotFound(f'target: model "{self.name}" has no label "{label}"; {did_you_mean(label, self.labels)}')
        if len(named) > 1:
            classes = ", ".join(map(str, named))
            raise InvalidArgument(f'target: label "{label}" names the classes {classes}; give one of these indices')
        return named[0]

    def inputs_like(self, n: int, *, seed: int = 0) -> Tensor:
        """Return n random inputs, [n, C, H, W], for trials."""
        assert self.trial_shape is not None  # noqa: S101
        return noise(self.trial_shape, n, seed=seed).to(self.kernel.device, self.kernel.dtype)

    def exact_kernel(self) -> Kernel:
        """Return a kernel of the same module without any option, to compare with."""
        return Kernel(
            self._module,
            device=self.kernel.device,
            adapter=self.adapter,
            head=self.head,
            isolation=self._isolation,
        )

    def _try(self) -> None:
        inputs = self.inputs_like(1)
        failed = "failed" if self.kernel.options.is_exact else f"failed as {self.kernel.summary}"
        with self._refusing(f"{failed} on an input of {list(inputs.shape)}"):
            answer = self.in_turn(
                lambda: self.kernel.run(inputs, [PREDICTED], [self.scores[0]], gradient=self.serves_gradients)
            )
        n_classes = answer.output_shape[0]
        if self.labels and len(self.labels) != n_classes:
            file = f"{self.settings.labels}: " if self.settings.labels else ""
            raise ConfigurationError(
                f'labels: {file}got {len(self.labels)}, model "{self.name}" has {n_classes} classes'
            )
        self.learn_output(answer.output_shape)
        if self.gradient_fault:
            served = "all the same, as accept_partial_gradient says" if self.serves_gradients else "not"
            said = f"{self.gradient_fault}; methods of gradients are {served} served, {', '.join(self.methods)} are"
            log.warning(Event("gradient_fault", model=self.name, message=said))
        self._keep_apart()

    def check_company(self) -> None:
        """Run rows alone from now on if an example's outputs depend on those that it shares a chunk with.

        What autograd recorded when the model was tried has not told that of statistics that are detached.
        """
        try:
            touches = is_batch_dependent(
                self.kernel.outputs_of,
                self.inputs_like(1),
                in_turn=self.in_turn,
                most=self.chunk_rows,
                dtype=self.kernel.compute_dtype,
            )
        except Exception as error:  # the model's own: it takes no such batch
            log.warning(Event("company_failed", model=self.name, message=f"{type(error).__name__}: {error}"))
            touches = True
        if touches:
            self.is_batch_dependent = True
            self._keep_apart()

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except ConfigurationError as error:
            raise ConfigurationError(f'model "{self.name}": {error}') from error
        except SidelightError as error:
            raise ConfigurationError(f'model "{self.name}": {what}: {error.message}') from error
        except Exception as error:
            said = str(error).strip()
            # A script's interpreter tells the cause last; torch's compiler goes on with advice.
            why = said.splitlines()[-1] if "TorchScript interpreter" in said else said.partition("\n\n")[0]
            kind = type(error).__name__
            why = why.removeprefix(f"{kind}: ")
            raise ConfigurationError(f'model "{self.name}": {what}: {kind}: {why}') from error


def _shape(inputs: Tensor) -> Shape:
    _, channels, height, width = inputs.shape
    return channels, height, width


def _remember(known: dict[Shape, _Value], shape: Shape, value: _Value) -> None:
    """Keep something of a shape in mind, and forget the one that was longest not spoken of: callers choose them."""
    known.pop(shape, None)
    known[shape] = value
    if len(known) > MAX_SHAPES:
        del known[next(iter(known))]


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's tensors by name, those alone whose writes torch counts."""
    return [
        (name, each) for name, each in (*module.named_parameters(), *module.named_buffers()) if not each.is_inference()
    ]


def _has_rectifiers(module: nn.Module, detected: Detected, trial: Tensor) -> bool:
    """Say whether a pass comes through a rectifier that can be guided: those of scripts and programs cannot."""
    with Guided() as guided, torch.no_grad():
        detected.adapter(module, trial.clone())
    return bool(guided.n_rectifiers)
