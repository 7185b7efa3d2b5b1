"""Introspection: one trial run detects how a module is called and what its outputs are.

It runs at load if the input size is known, otherwise on the first rows. Fields that the `ModelSpec` sets are not
detected but verified, so that a wrong one fails here. Anything that is neither set nor detected is an error.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ..compute.adapter import Adapter, Labels, items, summary
from ..compute.head import Head
from ..compute.layers import Layers
from ..config.options import Activation, Outputs
from ..config.spec import ModelSpec
from ..errors import ConfigurationError
from .layer_search import Traces, find, recording_slopes, trace
from .mode import check_mode

# In order of preference: logits allow more scores than probabilities.
LOGITS = ("logits", "logit")
PROBABILITIES = ("y_prob", "probabilities", "probs", "prob")
OTHERS = ("out", "output", "outputs")
INPUTS = ("image", "pixel_values", "x", "images", "input")  # tried for modules that accept any keyword
SUM_TOLERANCE = 1e-3  # of the sum of softmax probabilities, also in half precision


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
    check_mode(module)
    calls = list(_calls(module, spec))
    if trial is None:
        head = Head(spec.outputs or "logits", spec.activation or "softmax")
        return Detected(replace(calls[0], output=spec.output), head)
    inputs = trial.detach().clone().requires_grad_()
    with torch.enable_grad():
        adapter, returned, traces = _first_that_runs(module, calls, inputs)
        adapter = replace(adapter, output=_output(returned, spec, n=max(len(trial), adapter.least)))
        outputs = adapter.outputs(returned, n=len(trial))
        _check_labels(module, adapter, inputs, outputs)
        last = _last_step(outputs)  # while the graph exists
        with recording_slopes(traces):
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
    return Detected(adapter, _head(spec, adapter, returned, outputs, last), layers, is_batch_dependent)


def _calls(module: nn.Module, spec: ModelSpec) -> Iterator[Adapter]:
    """Yield possible ways to call a module, the most likely first."""
    takes = _Signature(module)
    arguments = tuple((spec.arguments or {}).items())
    least, most = spec.batch or (1, 0)
    for name in dict(arguments):
        takes.check(name, setting="arguments")
    for name in _inputs(module, spec, takes):
        plain = Adapter(input=name, arguments=arguments, least=least, most=most)
        keyword = _label(module, spec, takes, plain)
        if keyword is None:
            yield plain
            continue
        for labels in _forms(module, keyword):
            yield replace(plain, labels=labels)


def _inputs(module: nn.Module, spec: ModelSpec, takes: "_Signature") -> tuple[str, ...]:
    if spec.input is not None:
        takes.check(spec.input, setting="input")
        return (spec.input,)
    if takes.positional:
        return ("",)
    required = [name for name in takes.required if name not in (spec.arguments or {}) and name != spec.label]
    if required:
        return (next((name for name in INPUTS if name in required), required[0]),)
    key = _first_key(module, "feature_keys")
    return (key,) if key else INPUTS


def _label(module: nn.Module, spec: ModelSpec, takes: "_Signature", call: Adapter) -> str | None:
    """Return the required keyword for labels, if there is one."""
    if spec.label is not None:
        takes.check(spec.label, setting="label")
        return spec.label
    given = {call.input or takes.first, *dict(call.arguments)}
    missing = [name for name in takes.required if name not in given]
    if len(missing) > 1:
        raise ConfigurationError(
            f"arguments: the module also requires {', '.join(missing)}; set constants for them, or label for that one "
            "which gets zeros"
        )
    if missing:
        return missing[0]
    return _first_key(module, "label_keys") if takes.anything and not takes.positional else None


def _forms(module: nn.Module, keyword: str) -> Iterator[Labels]:
    yield Labels(keyword)
    yield Labels(keyword, "column")
    widths = [each.out_features for each in module.modules() if isinstance(each, nn.Linear)]
    if widths and widths[-1] > 1:
        yield Labels(keyword, "row", widths[-1])


def _first_key(module: nn.Module, attribute: str) -> str | None:
    """Return the first of PyHealth's `feature_keys` or `label_keys`: the keywords that its models take."""
    keys = getattr(module, attribute, None)
    return keys[0] if isinstance(keys, list) and keys and isinstance(keys[0], str) else None


class _Signature:
    """The signature of a module's `forward`."""

    def __init__(self, module: nn.Module) -> None:
        try:
            parameters = list(inspect.signature(module.forward).parameters.values())
        except (TypeError, ValueError):  # not written in Python
            parameters = []
        # The signature of a script accepts anything, and exported programs are usually called by position.
        opaque = not parameters or isinstance(module, torch.jit.ScriptModule)
        kinds = inspect.Parameter
        named = [each for each in parameters if each.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
        self.names = [each.name for each in named]
        self.required = [] if opaque else [each.name for each in named if each.default is kinds.empty]
        self.anything = opaque or any(each.kind is kinds.VAR_KEYWORD for each in parameters)
        names = [each.name for each in parameters if each.kind not in (kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD)]
        self.positional = opaque or bool(names)
        self.first = names[0] if names else ""

    def check(self, name: str, *, setting: str) -> None:
        """Raise `ConfigurationError` for a keyword that the module does not take."""
        if not self.anything and name not in self.names:
            raise ConfigurationError(f'{setting}: the module takes no "{name}"; it takes {", ".join(self.names)}')


def _first_that_runs(module: nn.Module, calls: list[Adapter], inputs: Tensor) -> tuple[Adapter, object, Traces]:
    failed: Exception | None = None
    for call in calls:
        returned: list[object] = []

        def run(call: Adapter = call, returned: list[object] = returned) -> None:
            returned.append(call.call(module, inputs * 1))  # a copy: the module may work in place

        try:
            traces = trace(module, run)
            return call, returned[0], traces
        except Exception as error:
            failed = failed or error
    assert failed is not None  # noqa: S101
    raise failed


def _output(returned: object, spec: ModelSpec, *, n: int) -> int | str | None:
    """Return the key of the outputs in a module's return value for n examples; None if it is the tensor."""
    wanted = spec.output
    if isinstance(returned, Tensor):
        if wanted is not None:
            raise ConfigurationError(f'output: got "{wanted}", but the model returned a tensor, {summary(returned)}')
        return None
    within = items(returned)
    if wanted is not None:
        key = int(wanted) if isinstance(wanted, str) and wanted.isdecimal() and wanted not in within else wanted
        if key not in within:
            raise ConfigurationError(f'output: got "{wanted}", but the model returned {summary(returned)}')
        return key
    fitting = [key for key, each in within.items() if _fits(each, n)]
    known = [key for key in (*LOGITS, *PROBABILITIES, *OTHERS) if key in fitting]
    if known:
        return known[0]
    keys = [key for key in fitting if isinstance(key, int)] or fitting  # a named tuple has each item twice
    if len(keys) > 1 and spec.labels:
        keys = [key for key in keys if _n_classes(within[key]) == len(spec.labels)] or keys
    if len(keys) == 1:
        return keys[0]
    raise ConfigurationError(
        f"output: the model returned {summary(returned)}; set output to the one that is [n, K] or [n, K, h, w]"
        + (", or labels of its K classes" if len(keys) > 1 and not spec.labels else "")
    )


def _n_classes(outputs: object) -> int:
    """Return K, the number of classes; 2 for a single output."""
    length = outputs.shape[1] if isinstance(outputs, Tensor) and outputs.ndim > 1 else 1
    return max(2, length)


def _fits(returned: object, n: int) -> bool:
    return (
        isinstance(returned, Tensor)
        and returned.is_floating_point()
        and returned.ndim in (1, 2, 4)
        and len(returned) == n
        and 0 not in returned.shape
    )


def _check_labels(module: nn.Module, adapter: Adapter, inputs: Tensor, outputs: Tensor) -> None:
    """Raise `ConfigurationError` if the outputs depend on the labels argument, so that zeros would be wrong."""
    if adapter.labels is None:
        return
    try:
        with torch.no_grad():
            others = adapter.outputs(adapter.call(module, inputs * 1, label=1), n=len(inputs))
    except Exception:  # there may be no class 1
        return
    if not torch.allclose(others, outputs.detach(), equal_nan=True):
        name = adapter.labels.keyword
        raise ConfigurationError(
            f'label: the outputs depend on "{name}", so zeros would be wrong there; if it is a constant, set arguments'
        )


def _gradients_of_first(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return the gradients of the first row's outputs at all inputs, [n, C, H, W]; zeros without a graph."""
    if outputs.isnan().any():
        raise NotNumbersError(f"its outputs, {summary(outputs)}, are not numbers (NaN)")
    if not outputs.is_floating_point():
        raise ConfigurationError(f"it cannot be differentiated: its outputs, {summary(outputs)}, are no real numbers")
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    first = outputs[0].flatten()
    # Unequal weights, because an unweighted sum of probabilities is always 1.
    weights = torch.linspace(1, 2, len(first), dtype=first.dtype, device=first.device)
    (gradients,) = torch.autograd.grad((first * weights).sum(), inputs, allow_unused=True)
    return torch.zeros_like(inputs) if gradients is None else gradients


def _head(spec: ModelSpec, adapter: Adapter, returned: object, outputs: Tensor, last: "_Step") -> Head:
    """Return the head for outputs, [n, K] or [n, K, h, w]. Raises `ConfigurationError` if it cannot be detected."""
    if spec.outputs is None:
        found, activation = _kind(adapter, returned, outputs, last)
        return Head(found, spec.activation or activation)
    values = outputs.detach()
    if spec.outputs == "probabilities" and not _in_unit(values):
        raise ConfigurationError(
            f'outputs: got "probabilities", but the model returned {summary(outputs)} from {values.min():.3g} to '
            f'{values.max():.3g}; set outputs to "logits"'
        )
    if spec.outputs == "logits" and last in ("softmax", "sigmoid") and adapter.output not in LOGITS:
        raise ConfigurationError(
            f'outputs: got "logits", but the model returned probabilities, {summary(outputs)}: its last step is a '
            f'{last}; set outputs to "probabilities"'
        )
    if spec.activation:
        return Head(spec.outputs, spec.activation)
    if spec.outputs == "probabilities":
        return Head(spec.outputs, "softmax" if _sums_to_one(outputs) else "sigmoid")
    return Head(spec.outputs, _activation_of(returned, outputs) if adapter.output in LOGITS else "softmax")


def _kind(adapter: Adapter, returned: object, outputs: Tensor, last: "_Step") -> tuple[Outputs, Activation]:
    """Detect the kind of the outputs: by their name, then by the autograd graph, and last by their values."""
    if adapter.output in LOGITS:
        return "logits", _activation_of(returned, outputs)
    if _sums_to_one(outputs):
        return "probabilities", "softmax"
    values, in_unit = outputs.detach(), _in_unit(outputs.detach())
    named = adapter.output in PROBABILITIES
    if in_unit and (named or last in ("softmax", "sigmoid")):
        return "probabilities", "sigmoid"
    spread = f"{summary(outputs)} from {values.min():.3g} to {values.max():.3g}"
    if named or last in ("softmax", "sigmoid", "logarithm"):
        step = f'is called "{adapter.output}"' if named else f"ends in a {last}"
        raise ConfigurationError(
            f"outputs: what the model returned {step}, but these, {spread}, are neither probabilities nor logits; "
            'leave the last step out, or set outputs to "logits" or "probabilities"'
        )
    is_constant = not outputs.requires_grad and bool((values == values[:1]).all())  # checked elsewhere
    if in_unit and last != "linear" and not is_constant:
        raise ConfigurationError(
            f"outputs: the model returned {spread}, and its last step, {_step_name(outputs)}, does not show what they "
            'are; set outputs to "logits" or "probabilities"'
        )
    return "logits", "softmax"


def _in_unit(values: Tensor) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


_Step = Literal["softmax", "sigmoid", "logarithm", "linear", "unknown"]

_STEPS: dict[str, _Step] = {"Softmax": "softmax", "Sigmoid": "sigmoid", "LogSigmoid": "logarithm"}
_PRODUCTS = frozenset((
    "Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Linear", "Convolution", "ConvolutionOverrideable",
    "MkldnnLinear", "MkldnnConvolution",
))  # fmt: skip
# Unbounded outputs, so they are logits. So is a log-softmax: its softmax gives the same probabilities.
_UNBOUNDED = _PRODUCTS | {
    "LogSoftmax", "Relu", "LeakyRelu", "PreluKernel", "Elu", "Gelu", "Silu", "Softplus", "NativeBatchNorm",
    "CudnnBatchNorm", "MiopenBatchNorm", "NativeLayerNorm", "NativeGroupNorm",
}  # fmt: skip

# Operations that only change the shape, or keep all values between the least and the largest one.
_LOOKED_THROUGH = frozenset((
    "Squeeze", "Unsqueeze", "View", "UnsafeView", "ReshapeAlias", "Expand", "Permute", "Transpose", "T", "Unfold",
    "Slice", "Select", "Index", "IndexSelect", "Gather", "TakeAlongDim", "AsStrided", "Unbind", "Split", "UnsafeSplit",
    "SplitWithSizes", "Cat", "Stack", "Repeat", "Flip", "Roll", "Sort", "Topk", "Clone", "Alias", "ToCopy", "Mean",
    "Amax", "Amin", "Max", "Min", "Maximum", "Minimum", "Median", "Where", "MaskedFill", "NanToNum", "Clamp",
    "ClampMin", "ClampMax", "AvgPool2D", "AdaptiveAvgPool2D", "MkldnnAdaptiveAvgPool2D", "MaxPool2DWithIndices",
    "AdaptiveMaxPool2D", "UpsampleNearest2D", "UpsampleBilinear2D", "NativeDropout",
))  # fmt: skip
_BOUNDING = frozenset(("Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Where", "MaskedFill"))
MOST_STEPS = 200  # nodes of the graph that are inspected, from the outputs back


def _last_step(outputs: Tensor) -> _Step:
    """Return a module's last operation, from the autograd graph: exact, while values are only a hint."""
    return _Walk().step(outputs.grad_fn)


class _Walk:
    """A bounded walk through the graph, from the outputs back."""

    def __init__(self) -> None:
        self._left = MOST_STEPS

    def step(self, node: Node | None, *, behind_product: bool = False) -> _Step:
        """Return the last step that produced a node's tensor; "linear" is anything that cannot be a probability."""
        self._left -= 1
        if node is None or self._left < 0:
            return "unknown"
        name = _name(node)
        before = [each for each, _ in node.next_functions if each is not None]
        if name in _STEPS:
            return _STEPS[name]
        if name in _UNBOUNDED:
            # Probabilities multiplied by a constant matrix may still be probabilities.
            sums = name in _PRODUCTS and not behind_product and before and all(map(self._is_probable, before))
            return "unknown" if sums else "linear"
        found = {self.step(each, behind_product=behind_product) for each in before}
        if name in _LOOKED_THROUGH:
            return "unknown" if len(found) != 1 or ("linear" in found and name in _BOUNDING) else found.pop()
        if name in ("Mul", "Div", "Neg") and len(before) == 1:
            (step,) = found
            return step if step == "linear" or _is_by_one(node) else "unknown"
        return "linear" if name in ("Add", "Sub", "Rsub") and "linear" in found else "unknown"

    def _is_probable(self, node: Node) -> bool:
        return self.step(node, behind_product=True) in ("softmax", "sigmoid")


def _name(node: Node) -> str:
    return re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])


def _is_by_one(node: Node) -> bool:
    """Return whether a node multiplies or divides by the number 1."""
    other = getattr(node, "_saved_other", None)
    return isinstance(other, Tensor) and other.numel() == 1 and bool(other == 1)


def _step_name(outputs: Tensor) -> str:
    node = outputs.grad_fn
    while node is not None and _name(node) == "Clone":  # added by `trace`
        node = node.next_functions[0][0]
    return "an unknown one" if node is None else _name(node).lower()


def _sums_to_one(outputs: Tensor) -> bool:
    values = outputs.detach().float()
    return bool(values.shape[1] > 1 and (values >= 0).all() and ((values.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all())


def _activation_of(returned: object, logits: Tensor) -> Activation:
    """Return the activation of logits, from probabilities that are returned with them; softmax without any."""
    within: Mapping[int | str, object] = items(returned)
    for name in PROBABILITIES:
        beside = within.get(name)
        if isinstance(beside, Tensor) and beside.shape == logits.shape:
            return "softmax" if _sums_to_one(beside) else "sigmoid"
    return "softmax"
