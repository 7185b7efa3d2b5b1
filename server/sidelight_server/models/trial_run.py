"""The trial run: a module runs once on a device before it serves, and shows how it can be served.

It runs on a replica that shares no buffer, for a pass may write to them, and `in_turn`: as a task of the thread that
owns the device, where that answers others already.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..compute.adapter import Adapter
from ..compute.layer_hooks import Guided
from ..compute.replica import Isolation, n_hooks, replicate
from ..compute.saved_memory import SavedMemory
from ..config.spec import ModelSpec
from ..errors import ConfigurationError, OutputsError, SidelightError
from ..telemetry.logs import Event
from .checks import gradient_fault
from .introspection import Detected, NotNumbersError, detect
from .row_memory import RowMemory

log = logging.getLogger("sidelight")

_Value = TypeVar("_Value")


class InTurn(Protocol):
    """Runs a function on a device when it is its turn, and returns what that returns."""

    def __call__(self, task: Callable[[], _Value]) -> _Value:
        """Run it."""


def at_once(task: Callable[[], _Value]) -> _Value:
    """Run a function here and now: for a device that nobody else uses."""
    return task()


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What the trial of a module shows; without one, what is assumed of it."""

    detected: Detected
    isolation: Isolation
    gradient_fault: str = ""  # why no map of gradients can be had
    has_rectifiers: bool = True  # that guided backpropagation can guide


class TrialRun:
    """The trial of a specification's module on `inputs`, [n, C, H, W]; None: nothing is run."""

    def __init__(
        self, name: str, spec: ModelSpec, inputs: Tensor | None, *, device: torch.device, in_turn: InTurn
    ) -> None:
        self._name = name
        self._spec = spec
        self._inputs = inputs
        self._device = device
        self._in_turn = in_turn

    def run(self) -> TrialResult:
        """Run it. The caller's hooks are left out where the outputs are the same without them."""
        hooks = n_hooks(self._spec.module)
        if hooks and self._inputs is not None:
            with contextlib.suppress(Exception):  # a network whose hooks compute may need them to run at all
                return self._without_hooks(self._inputs, n_hooks=hooks)
        if hooks:
            said = "hooks of the module's forward pass run with each pass here: "
            said += (
                "set trial_size to have them tried and left out" if self._inputs is None else "outputs depend on them"
            )
            log.warning(Event("hooks_kept", model=self._name, hooks=hooks, message=said))
        return self._tried()[1]

    def _without_hooks(self, inputs: Tensor, *, n_hooks: int) -> TrialResult:
        """Try the module without hooks. `ConfigurationError` where its outputs are others then."""
        without, result = self._tried(keeps_hooks=False)
        with_hooks = replicate(self._spec.module, Isolation(owned=None)).to(self._device)

        def differ() -> bool:
            with torch.no_grad():
                ours, theirs = (result.detected.adapter(each, inputs.clone()) for each in (without, with_hooks))
            return not torch.equal(ours, theirs)

        if self._in_turn(differ):
            raise ConfigurationError("the outputs depend on hooks")
        log.info(Event("hooks_dropped", model=self._name, hooks=n_hooks, message="the module's hooks do not run here"))
        return result

    def _tried(self, *, keeps_hooks: bool = True) -> tuple[nn.Module, TrialResult]:
        """Return the replica that ran, and what that shows."""
        with refusing(self._name, "cannot be replicated and moved to the device"):
            replica = replicate(self._spec.module, Isolation(owned=None, keeps_hooks=keeps_hooks)).to(self._device)
        versions = {name: each._version for name, each in _state(replica)}
        inputs, setting = self._inputs, "trial_size" if self._spec.input_size is None else "input_size"
        failed = "" if inputs is None else f"failed on an input of {list(inputs.shape)}, as {setting} says"
        with refusing(self._name, failed):
            detected = self._in_turn(lambda: detect(replica, self._spec, inputs))
        if inputs is None:
            return replica, TrialResult(detected, Isolation(owned=None))
        written = {name for name, each in _state(replica) if versions.get(name) != each._version}
        # By value too: torch does not count what a BatchNorm in train mode writes to its statistics.
        theirs = dict(self._spec.module.named_buffers())
        written |= {
            name for name, each in replica.named_buffers() if not torch.equal(each, theirs[name].to(self._device))
        }
        isolation = Isolation(frozenset(written), keeps_hooks=keeps_hooks)
        with refusing(self._name, f"failed on inputs like {list(inputs.shape)}"):
            fault = self._gradient_fault(replica, detected, inputs[:1])
            has_rectifiers = self._in_turn(lambda: _has_rectifiers(replica, detected, inputs))
        return replica, TrialResult(detected, isolation, fault, has_rectifiers)

    def _gradient_fault(self, module: nn.Module, detected: Detected, example: Tensor) -> str:
        """Return what is wrong with the gradient, if it is not that of the outputs."""
        adapter, rows = detected.adapter, 1 if detected.is_batch_dependent or detected.adapter.most == 1 else 2

        def run(inputs: Tensor) -> Tensor:
            return adapter(module, inputs * 1)  # a copy: it may begin with an operation in place

        return gradient_fault(run, example, in_turn=self._in_turn, most=rows)


def detect_on(
    inputs: Tensor, spec: ModelSpec, module: nn.Module, isolation: Isolation, *, adapter: Adapter, memory: RowMemory
) -> Detected | None:
    """Detect how a module is called on the first of some rows, [n, C, H, W]; None where its outputs are not numbers.

    `TooLarge` where memory lacks for it, `OutputsError` where the model cannot be served as it is; whatever the module
    raises itself.
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
        except Exception:
            if not kept.is_over:
                raise
    memory.learn(kept, trial, limit=limit, n_rows=max(len(trial), adapter.least))
    return detected


@contextlib.contextmanager
def refusing(name: str, what: str) -> Iterator[None]:
    """Raise `ConfigurationError`, with the model's name and `what` failed, for any error."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f'model "{name}": {error}') from error
    except SidelightError as error:
        raise ConfigurationError(f'model "{name}": {what}: {error.message}') from error
    except Exception as error:
        said = str(error).strip()
        # A script's interpreter tells the cause last; torch's compiler goes on with advice.
        why = said.splitlines()[-1] if "TorchScript interpreter" in said else said.partition("\n\n")[0]
        kind = type(error).__name__
        why = why.removeprefix(f"{kind}: ")
        raise ConfigurationError(f'model "{name}": {what}: {kind}: {why}') from error


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's tensors by name, those alone whose writes torch counts."""
    return [
        (name, each) for name, each in (*module.named_parameters(), *module.named_buffers()) if not each.is_inference()
    ]


def _has_rectifiers(module: nn.Module, detected: Detected, inputs: Tensor) -> bool:
    """Say whether a pass comes through a rectifier that can be guided: those of scripts and programs cannot."""
    with Guided() as guided, torch.no_grad():
        detected.adapter(module, inputs.clone())
    return bool(guided.n_rectifiers)
