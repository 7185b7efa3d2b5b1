"""The trial run: runs a module once on its device at load, to detect how it can be served.

It uses a replica that shares no buffer, because a pass may write to buffers. It runs `in_turn`: as a task on the
device's thread, once that serves other models.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...compute.passes.adapter import Adapter
from ...compute.passes.layer_hooks import Guided
from ...compute.replica.replica import Isolation, n_hooks, replicate
from ...compute.saved_memory import SavedMemory
from ...config.spec import ModelSpec
from ...errors import ConfigurationError, OutputsError, SidelightError
from ...telemetry.logs import Event
from ..row_memory import RowMemory
from .checks import gradient_fault
from .in_turn import InTurn
from .introspection import Detected, NotNumbersError, detect

log = logging.getLogger("sidelight")


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The result of a trial run; without trial inputs, the defaults."""

    detected: Detected
    isolation: Isolation
    gradient_fault: str = ""  # what is wrong with the gradient; empty if it is right
    has_rectifiers: bool = True  # whether guided backpropagation is possible


class TrialRun:
    """Runs a spec's module on trial `inputs`, [n, C, H, W]; None: runs nothing."""

    def __init__(
        self, name: str, spec: ModelSpec, inputs: Tensor | None, *, device: torch.device, in_turn: InTurn
    ) -> None:
        self._name = name
        self._spec = spec
        self._inputs = inputs
        self._device = device
        self._in_turn = in_turn

    def run(self) -> TrialResult:
        """Run the trial. Drops the caller's hooks if the outputs are the same without them."""
        hooks = n_hooks(self._spec.module)
        if hooks and self._inputs is not None:
            with contextlib.suppress(Exception):  # the module may not run without hooks
                return self._without_hooks(self._inputs, n_hooks=hooks)
        if hooks:
            untried = self._inputs is None
            why = "set trial_size to check whether they can be dropped" if untried else "the outputs depend on them"
            message = f"hooks of the module's forward pass run with each pass: {why}"
            log.warning(Event("hooks_kept", model=self._name, hooks=hooks, message=message))
        return self._try()[1]

    def _without_hooks(self, inputs: Tensor, *, n_hooks: int) -> TrialResult:
        """Run the trial without hooks. Raises `ConfigurationError` if that changes the outputs."""
        without, result = self._try(keeps_hooks=False)
        with_hooks = replicate(self._spec.module, Isolation(owned=None)).to(self._device)

        def differ() -> bool:
            with torch.no_grad():
                ours, theirs = (result.detected.adapter(each, inputs.clone()) for each in (without, with_hooks))
            return not torch.equal(ours, theirs)

        if self._in_turn(differ):
            raise ConfigurationError("the outputs depend on hooks")
        message = "the module's hooks do not run in the server"
        log.info(Event("hooks_dropped", model=self._name, hooks=n_hooks, message=message))
        return result

    def _try(self, *, keeps_hooks: bool = True) -> tuple[nn.Module, TrialResult]:
        """Run the trial on a replica; return the replica and the result."""
        with model_errors(self._name, "cannot be replicated and moved to the device"):
            replica = replicate(self._spec.module, Isolation(owned=None, keeps_hooks=keeps_hooks)).to(self._device)
        versions = {name: each._version for name, each in _state(replica)}
        inputs, setting = self._inputs, "trial_size" if self._spec.input_size is None else "input_size"
        failed = "" if inputs is None else f"failed on an input of {list(inputs.shape)}, from {setting}"
        with model_errors(self._name, failed):
            detected = self._in_turn(lambda: detect(replica, self._spec, inputs))
        if inputs is None:
            return replica, TrialResult(detected, Isolation(owned=None))
        written = {name for name, each in _state(replica) if versions.get(name) != each._version}
        # By value too: torch's version counters miss the running statistics of a BatchNorm in train mode.
        theirs = dict(self._spec.module.named_buffers())
        written |= {
            name for name, each in replica.named_buffers() if not torch.equal(each, theirs[name].to(self._device))
        }
        isolation = Isolation(frozenset(written), keeps_hooks=keeps_hooks)
        with model_errors(self._name, f"failed on inputs like {list(inputs.shape)}"):
            fault = self._gradient_fault(replica, detected, inputs[:1])
            has_rectifiers = self._in_turn(lambda: _has_rectifiers(replica, detected, inputs))
        return replica, TrialResult(detected, isolation, fault, has_rectifiers)

    def _gradient_fault(self, module: nn.Module, detected: Detected, example: Tensor) -> str:
        """Return what is wrong with the gradient; empty if it is right."""
        adapter, rows = detected.adapter, 1 if detected.is_batch_dependent or detected.adapter.most == 1 else 2

        def run(inputs: Tensor) -> Tensor:
            return adapter(module, inputs * 1)  # a copy: it may begin with an operation in place

        return gradient_fault(run, example, in_turn=self._in_turn, most=rows)


def detect_on(
    inputs: Tensor, spec: ModelSpec, module: nn.Module, isolation: Isolation, *, adapter: Adapter, memory: RowMemory
) -> Detected | None:
    """Run introspection on the first of some rows, [n, C, H, W]. Return None if the outputs are NaN.

    Raises `TooLarge` if a row does not fit into memory, `OutputsError` if the model cannot be served, and whatever the
    module raises.
    """
    rows = inputs.detach()[:1]
    trial = rows if adapter.most == 1 else rows.repeat(2, 1, 1, 1)
    replica = replicate(module, isolation).to(inputs.device)
    limit, detected = memory.limit_bytes, None
    with SavedMemory(limit=limit, weights=replica) as kept:
        try:
            detected = detect(replica, spec, trial)
        except NotNumbersError:
            return None
        except ConfigurationError as error:
            if not kept.is_over:
                raise OutputsError(str(error)) from error
        except Exception:  # `SavedMemory` stops the pass with an error, which the module may replace
            if not kept.is_over:
                raise
    memory.learn(kept, trial, limit=limit, n_rows=max(len(trial), adapter.least))
    return detected


@contextlib.contextmanager
def model_errors(name: str, what: str) -> Iterator[None]:
    """Convert any error to `ConfigurationError`, with the model's name and `what` failed."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f'model "{name}": {error}') from error
    except SidelightError as error:
        raise ConfigurationError(f'model "{name}": {what}: {error.message}') from error
    except Exception as error:  # a module may raise anything
        text = str(error).strip()
        # TorchScript has the cause in the last line; torch.compile adds advice after an empty line.
        why = text.splitlines()[-1] if "TorchScript interpreter" in text else text.partition("\n\n")[0]
        kind = type(error).__name__
        why = why.removeprefix(f"{kind}: ")
        raise ConfigurationError(f'model "{name}": {what}: {kind}: {why}') from error


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's tensors by name, without inference tensors, whose writes torch does not count."""
    return [
        (name, each) for name, each in (*module.named_parameters(), *module.named_buffers()) if not each.is_inference()
    ]


def _has_rectifiers(module: nn.Module, detected: Detected, inputs: Tensor) -> bool:
    """Return whether a pass has ReLUs that can be guided; those in scripts and exported programs cannot."""
    with Guided() as guided, torch.no_grad():
        detected.adapter(module, inputs.clone())
    return bool(guided.n_rectifiers)
