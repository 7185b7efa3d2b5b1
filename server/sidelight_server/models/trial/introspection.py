"""Introspection: one trial run detects how a module is called and what its outputs are.

It runs at load if the input size is known, otherwise on the first rows. Fields that the `ModelSpec` sets are not
detected but verified, so that a wrong one fails here. Anything that is neither set nor detected is an error.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...compute.outputs.head import Head
from ...compute.passes.adapter import Adapter, summary
from ...compute.passes.layers import Layers
from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from .call_detection import check_labels, first_that_runs, possible_calls
from .layer_search import find
from .layer_trace import recording_gradients
from .output_detection import detect_head, last_step, output_key
from .train_mode import check_eval_mode


class NotNumbersError(ConfigurationError):
    """The module returned NaN for its trial input."""


@dataclass(frozen=True, slots=True)
class Detected:
    """The result of introspection: how to call a module and read its outputs, and what the trial run shows."""

    adapter: Adapter
    head: Head
    layers: Layers = field(default_factory=Layers)  # layers that can be explained
    is_batch_dependent: bool = False  # whether one row's outputs depend on another row


def detect(module: nn.Module, spec: ModelSpec, trial: Tensor | None) -> Detected:
    """Detect how to call a frozen module in eval mode, from its signature and from its outputs for a trial.

    `trial` is two inputs, [2, C, H, W]; without it nothing is run and the result is a first guess. Raises
    `ConfigurationError`, with the spec field and what the module returned; the module may raise anything.
    """
    check_eval_mode(module)
    calls = list(possible_calls(module, spec))
    if trial is None:
        head = Head(spec.output_kind or "logits", spec.activation or "softmax")
        return Detected(replace(calls[0], output=spec.output_key), head)
    inputs = trial.detach().clone().requires_grad_()
    with torch.enable_grad():
        adapter, returned, traces = first_that_runs(module, calls, inputs)
        adapter = replace(adapter, output=output_key(returned, spec, n=max(len(trial), adapter.least)))
        outputs = adapter.outputs(returned, n=len(trial))
        check_labels(module, adapter, inputs, outputs)
        last = last_step(outputs)  # while the graph exists
        with recording_gradients(traces):
            gradients = _gradients_of_first(outputs, inputs)
    is_batch_dependent = bool((gradients[1:].nan_to_num() != 0).any())
    layers = find(
        module,
        adapter.call,
        traces,
        outputs=outputs,
        inputs=inputs,
        n=max(len(trial), adapter.least),
        together=1 if is_batch_dependent else len(trial),
        given=spec.layer_layout or {},
    )
    return Detected(adapter, detect_head(spec, adapter, returned, outputs, last), layers, is_batch_dependent)


def _gradients_of_first(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return the gradients of the first row's outputs at all inputs, [n, C, H, W]; zeros without a graph."""
    if outputs.isnan().any():
        raise NotNumbersError(f"its outputs, {summary(outputs)}, are not numbers (NaN)")
    if not outputs.is_floating_point():
        raise ConfigurationError(f"it cannot be differentiated: its outputs, {summary(outputs)}, are not real numbers")
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    first = outputs[0].flatten()
    # Unequal weights, because an unweighted sum of probabilities is always 1.
    weights = torch.linspace(1, 2, len(first), dtype=first.dtype, device=first.device)
    (gradients,) = torch.autograd.grad((first * weights).sum(), inputs, allow_unused=True)
    return torch.zeros_like(inputs) if gradients is None else gradients
