"""A serving model: its kernel, preprocessing, labels and digest."""

import functools
import logging

import torch
from torch import Tensor

from ..compute.kernel import Kernel
from ..config.model_settings import ModelSettings
from ..config.options import KernelOptions
from ..config.spec import ModelSpec
from ..domain import Choice, Score
from ..errors import OutputsError
from ..methods import METHODS, GuidedBackpropagation
from ..methods.method import Shape
from ..telemetry.logs import Event
from .chunk_size import DEFAULT_CHUNK_ROWS, ChunkRate, RowLimit
from .class_names import ClassNames
from .identity import ModelIdentity, facts_of
from .input_format import InputConversion, preprocessing_of, trial_input, trial_shape_of
from .model_kernels import ModelKernels
from .row_memory import RowMemory, shape_of
from .trial.checks import noise
from .trial.in_turn import InTurn, at_once
from .trial.introspection import Detected
from .trial.trial_run import TrialRun, detect_on, model_errors

log = logging.getLogger("sidelight")

DEFAULT_NAME = "model"
BATCH_DEPENDENT = "rows of this model depend on each other: each runs alone"


class Model:
    """One version of one model on one device.

    The constructor runs a trial and raises `ConfigurationError` if the spec does not fit. Passes at load and during
    calibration run `in_turn`: as tasks on the device's thread, once that serves other models. `is_shared`: the caller
    also holds the module and may write to its weights.
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
        self.labels = tuple(spec.class_names or ())
        self._class_names = ClassNames(self.name, self.labels)
        self.preprocessing = preprocessing_of(spec)
        self.trial_shape = trial_shape_of(spec)
        self.class_count = len(self.labels)  # 0 until the first rows have run, if there are no labels and no trial run
        self.output_shape: tuple[int, ...] = ()  # K, or K, h, w; empty: unknown, as above
        self.padded_rows = 0  # rows that chunks are padded to, for the same bytes with any neighbors
        self.warm_up: tuple[ChunkRate, ...] = ()
        self.is_measured = False  # whether the chunk size was measured, so that it may be measured again
        self.fidelity: dict[str, float] = {}  # of each kernel by its summary, see `warmup`
        self.neighbor_difference: float | None = None  # see `calibration`; None: not measured
        self._names = [name for name, _ in spec.module.named_modules() if name]
        trial = trial_input(spec, device)
        self._unknown_spec = spec if trial is None else None  # detect on the first rows: there is no trial input
        result = TrialRun(self.name, spec, trial, device=device, in_turn=in_turn).run()
        self._isolation = result.isolation
        self.has_rectifiers = result.has_rectifiers  # True without a trial run
        self.gradient_fault = result.gradient_fault  # empty: the gradient is right, or there was no trial run
        self._adopt(result.detected)
        self._row_limit = RowLimit()
        self.chunk_rows = self.at_most(DEFAULT_CHUNK_ROWS)
        with model_errors(self.name, "cannot be replicated and moved to the device"):
            make = functools.partial(self._kernel, device=device, trial=trial, is_shared=is_shared)
            self.kernels = in_turn(lambda: ModelKernels(make, spec.options, spec.method_precision))
            self.kernel = self.kernels.default
            self._memory = RowMemory(self.name, self.kernel, device_memory_limit=self.settings.device_memory_limit)
            self.identity = ModelIdentity(
                self.name,
                self.kernel,
                facts=facts_of(spec, self.preprocessing, None if self._unknown_spec else self.head, self.adapter),
                trial=functools.partial(self.inputs_like, 1) if self.is_tried else None,
            )
        self.kernels.log_fold(self.name)
        self.inputs = InputConversion(self.preprocessing, dtype=self.kernel.dtype, device=device)
        self.staged_dtype, self.black = self.inputs.staged_dtype, self.inputs.black
        if self.is_tried:
            self._try()

    def _adopt(self, detected: Detected) -> None:
        self.adapter, self.head = detected.adapter, detected.head
        self.explainable = detected.layers  # layers that can be explained; empty without a trial run
        # If outputs of a row depend on its neighbors, each row runs alone.
        self.is_batch_dependent = detected.is_batch_dependent

    def _kernel(
        self,
        options: KernelOptions | None = None,
        *,
        device: torch.device,
        trial: Tensor | None = None,
        is_shared: bool = False,
    ) -> Kernel:
        """Return a kernel of the module, with what introspection has detected so far."""
        return Kernel(
            self._module,
            device=device,
            adapter=self.adapter,
            head=self.head,
            layers=self.explainable,
            options=options,
            trial=trial,
            isolation=self._isolation,
            is_shared=is_shared,
        )

    def at_most(self, rows: int) -> int:
        """Return `rows`, or the module's largest batch size if that is less."""
        return min(rows, self.adapter.most or rows)

    @property
    def chunk_rows(self) -> int:
        """The largest number of rows that run at once: as set, or fewer while memory is short."""
        return self._row_limit.of(self._chunk_rows)

    @chunk_rows.setter
    def chunk_rows(self, rows: int) -> None:
        self._chunk_rows = rows

    @property
    def set_chunk_rows(self) -> int:
        """The largest number of rows that run at once if there is enough memory."""
        return self._chunk_rows

    def has_fitted(self, rows: int, shape: Shape) -> None:
        """Record that `rows` rows of a shape ran at once. On the device's thread, as `lacks_memory`."""
        self._row_limit.passed(rows, most=self._chunk_rows)
        self._memory.add_shape(shape)

    @property
    def has_run(self) -> bool:
        return bool(self._memory.shapes)

    def has_run_on(self, shape: Shape) -> bool:
        """Whether the model has run on inputs of a shape, [C, H, W]. If not, a failure may be the caller's fault."""
        return self.preprocessing is not None or self._memory.has_run(shape)

    def lacks_memory(self, *, above: int) -> None:
        """Record that more than `above` rows did not fit into memory; they are not tried again for a while."""
        self._row_limit.lower(above)

    def rows_at_once(self, shape: Shape) -> int:
        """Return the chunk size for a shape: `chunk_rows`, or fewer if callers choose the shape.

        On the device's thread, as `check_memory`, which makes the final check.
        """
        rows = self.chunk_rows
        if self._has_measured_size(shape) or self.padded_rows:
            return rows
        return self._memory.fitting(shape, rows)

    def check_memory(self, inputs: Tensor) -> None:
        """Raise `TooLarge` if rows, [n, C, H, W], of a shape that the caller chose do not fit into memory."""
        if not self._has_measured_size(shape_of(inputs)):
            self._memory.check(inputs, least=self.adapter.least, is_padded=bool(self.padded_rows))

    def _has_measured_size(self, shape: Shape) -> bool:
        return self.preprocessing is not None or shape == self.trial_shape

    @property
    def digest(self) -> str:
        """The SHA-256 of weights, preprocessing, outputs and labels, in hexadecimal, as they are now."""
        return self.identity.digest

    @property
    def precision(self) -> str:
        """The type that the model computes in, or "mixed"; "tf32" if convolutions on a GPU may round to it."""
        return self.precision_of(self.kernel)

    def precision_of(self, kernel: Kernel) -> str:
        """The precision of one of the model's kernels, as `precision`."""
        rounds = kernel.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        return "tf32" if rounds and kernel.precision == "float32" else kernel.precision

    @property
    def largest(self) -> float:
        """The largest number that the model's type holds."""
        return float(torch.finfo(self.kernel.compute_dtype).max)

    @property
    def scores(self) -> tuple[Score, ...]:
        return self.head.scores

    @property
    def serves_gradients(self) -> bool:
        return not self.gradient_fault or self.settings.accept_partial_gradient

    @property
    def methods(self) -> tuple[str, ...]:
        served = [each for each in METHODS if self.serves_gradients or not each.needs_gradient]
        return tuple(each.name for each in served if self.has_rectifiers or each is not GuidedBackpropagation)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that can be explained, in the order of the module tree; all layers, if the model has never run."""
        return tuple(name for name in self._names if not self.is_known or name in self.explainable.layouts)

    @property
    def is_tried(self) -> bool:
        """Whether the model ran at load, with its input size or its trial size."""
        return self.trial_shape is not None

    @property
    def shapes(self) -> object:
        """Shapes and options, which are equal for two versions of the same network with the same cost."""
        state = self._module.state_dict().items()
        weights = [(name, each.shape, each.dtype) for name, each in state if isinstance(each, Tensor)]
        return self.trial_shape, self.kernel.options, self.adapter, weights

    @property
    def reproducible(self) -> bool:
        """Whether equal provenance promises equal bytes."""
        return self.padded_rows > 0

    def layer(self, name: str) -> str:
        """Return the layer of a name; empty is the default. Raises `NotFound`, which suggests similar names."""
        if self.is_known or (name and name not in self._names):
            return self.explainable.choose(name, self._names)
        return name

    def class_of(self, choice: Choice) -> int:
        """Return a class index. Raises `NotFound` for an unknown label, `InvalidArgument` for an index out of range."""
        return self._class_names.index(choice, n_classes=self.class_count)

    def learn_output(self, shape: tuple[int, ...]) -> None:
        """Record the shape of the outputs: K, or K, h, w. Raises `OutputsError` if K changes."""
        if self.output_shape and self.output_shape[0] != shape[0]:
            raise OutputsError(f"the model returned {shape[0]} classes, {self.output_shape[0]} before")
        self.output_shape, self.class_count = shape, shape[0]

    @property
    def is_known(self) -> bool:
        """Whether introspection has run, so that call and outputs are known."""
        return self._unknown_spec is None

    def introspect(self, inputs: Tensor) -> None:
        """Run introspection on the first rows, [n, C, H, W], for models without a trial at load.

        On the device's thread. Raises `OutputsError` if the model cannot be served. The module's own exceptions only
        fail these rows, and introspection is repeated on the next ones.
        """
        spec = self._unknown_spec
        if spec is None:
            return
        detected = detect_on(inputs, spec, self._module, self._isolation, adapter=self.adapter, memory=self._memory)
        if detected is None:  # the outputs are NaN; this example will fail
            return
        self._adopt(detected)
        for kernel in self.kernels:
            kernel.adopt(adapter=detected.adapter, head=detected.head, layers=detected.layers)
        self._unknown_spec = None
        log.info(Event(
            "outputs_detected", model=self.name, call=self.adapter.summary, outputs=self.head.outputs,
            activation=self.head.activation,
        ))  # fmt: skip
        if self.is_batch_dependent:
            self.run_rows_alone()

    def run_rows_alone(self) -> None:
        self.is_batch_dependent, self.chunk_rows = True, 1
        log.warning(Event("batch_dependent", model=self.name, message=BATCH_DEPENDENT))

    def inputs_like(self, n: int, *, seed: int = 0) -> Tensor:
        """Return n random trial inputs, [n, C, H, W]."""
        assert self.trial_shape is not None  # noqa: S101
        return noise(self.trial_shape, n, seed=seed).to(self.kernel.device, self.kernel.dtype)

    def exact_kernel(self) -> Kernel:
        """Return a kernel of the same module without options, for comparison."""
        return self._kernel(device=self.kernel.device)

    def _try(self) -> None:
        output_shape = self.kernels.run_first(
            self.name, self.inputs_like(1), self.scores[0], gradient=self.serves_gradients, in_turn=self.in_turn
        )
        self._class_names.check(output_shape[0], file=self.settings.class_names)
        self.learn_output(output_shape)
        if self.gradient_fault:
            served = "served (accept_partial_gradient)" if self.serves_gradients else "not served"
            message = f"{self.gradient_fault}; gradient methods are {served}; available: {', '.join(self.methods)}"
            log.warning(Event("gradient_fault", model=self.name, message=message))
        if self.is_batch_dependent:
            self.run_rows_alone()
