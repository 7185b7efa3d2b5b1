"""Output detection: which part of a return value is the outputs, and whether they are logits or probabilities.

The kind is detected by the name of the outputs, by the autograd graph and by their values.
"""

import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.autograd.graph import Node

from ...compute.outputs.head import Head
from ...compute.passes.adapter import Adapter, items, summary
from ...config.options import Activation, Outputs
from ...config.spec import ModelSpec
from ...errors import ConfigurationError

Step = Literal["softmax", "sigmoid", "logarithm", "linear", "unknown"]

# In order of preference: logits allow more scores than probabilities.
LOGITS = ("logits", "logit")
PROBABILITIES = ("y_prob", "probabilities", "probs", "prob")
OTHERS = ("out", "output", "outputs")

SUM_TOLERANCE = 1e-3  # tolerance of the sum of softmax probabilities, also in half precision


def output_key(returned: object, spec: ModelSpec, *, n: int) -> int | str | None:
    """Return the key of the outputs in a module's return value for n examples; None if it is the tensor."""
    wanted = spec.output_key
    if isinstance(returned, Tensor):
        if wanted is not None:
            raise ConfigurationError(
                f'output_key: got "{wanted}", but the model returned a tensor, {summary(returned)}'
            )
        return None
    within = items(returned)
    if wanted is not None:
        key = int(wanted) if isinstance(wanted, str) and wanted.isdecimal() and wanted not in within else wanted
        if key not in within:
            raise ConfigurationError(f'output_key: got "{wanted}", but the model returned {summary(returned)}')
        return key
    fitting = [key for key, each in within.items() if _fits(each, n)]
    known = [key for key in (*LOGITS, *PROBABILITIES, *OTHERS) if key in fitting]
    if known:
        return known[0]
    keys = [key for key in fitting if isinstance(key, int)] or fitting  # a named tuple has each item twice
    if len(keys) > 1 and spec.class_names:
        keys = [key for key in keys if _n_classes(within[key]) == len(spec.class_names)] or keys
    if len(keys) == 1:
        return keys[0]
    raise ConfigurationError(
        f"output_key: the model returned {summary(returned)}; set output_key to the one that is [n, K] or [n, K, h, w]"
        + (", or class_names of its K classes" if len(keys) > 1 and not spec.class_names else "")
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


def detect_head(spec: ModelSpec, adapter: Adapter, returned: object, outputs: Tensor, last: Step) -> Head:
    """Return the head for outputs, [n, K] or [n, K, h, w]. Raises `ConfigurationError` if it cannot be detected."""
    if spec.output_kind is None:
        found, activation = _kind(adapter, returned, outputs, last)
        return Head(found, spec.activation or activation)
    values = outputs.detach()
    if spec.output_kind == "probabilities" and not _in_unit(values):
        raise ConfigurationError(
            f'output_kind: got "probabilities", but the model returned {summary(outputs)} from {values.min():.3g} to '
            f'{values.max():.3g}; set output_kind to "logits"'
        )
    if spec.output_kind == "logits" and last in ("softmax", "sigmoid") and adapter.output not in LOGITS:
        raise ConfigurationError(
            f'output_kind: got "logits", but the model returned probabilities, {summary(outputs)}: its last step is a '
            f'{last}; set output_kind to "probabilities"'
        )
    if spec.activation:
        return Head(spec.output_kind, spec.activation)
    if spec.output_kind == "probabilities":
        return Head(spec.output_kind, "softmax" if _sums_to_one(outputs) else "sigmoid")
    return Head(spec.output_kind, _activation_of(returned, outputs) if adapter.output in LOGITS else "softmax")


def _kind(adapter: Adapter, returned: object, outputs: Tensor, last: Step) -> tuple[Outputs, Activation]:
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
        step = f'are called "{adapter.output}"' if named else f"end in a {last}"
        raise ConfigurationError(
            f"output_kind: the model's outputs {step}, but {spread} are neither probabilities nor logits; "
            'leave the last step out, or set output_kind to "logits" or "probabilities"'
        )
    is_constant = not outputs.requires_grad and bool((values == values[:1]).all())  # checked elsewhere
    if in_unit and last != "linear" and not is_constant:
        raise ConfigurationError(
            f"output_kind: the model returned {spread}, and its last step, {_step_name(outputs)}, does not show "
            'what they are; set output_kind to "logits" or "probabilities"'
        )
    return "logits", "softmax"


def _in_unit(values: Tensor) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


_STEPS: dict[str, Step] = {"Softmax": "softmax", "Sigmoid": "sigmoid", "LogSigmoid": "logarithm"}
_PRODUCTS = frozenset((
    "Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Linear", "Convolution", "ConvolutionOverrideable",
    "MkldnnLinear", "MkldnnConvolution",
))  # fmt: skip
# Unbounded outputs, so they are logits. So is a log-softmax: its softmax gives the same probabilities.
_UNBOUNDED = _PRODUCTS | {
    "LogSoftmax", "Relu", "LeakyRelu", "PreluKernel", "Elu", "Gelu", "Silu", "Softplus", "NativeBatchNorm",
    "CudnnBatchNorm", "MiopenBatchNorm", "NativeLayerNorm", "NativeGroupNorm",
}  # fmt: skip
# Operations that only change the shape, or whose results lie between the least and the largest of their inputs.
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


def last_step(outputs: Tensor) -> Step:
    """Return a module's last operation, from the autograd graph: exact, while values are only a hint."""
    return _Walk().step(outputs.grad_fn)


class _Walk:
    """A bounded walk through the graph, from the outputs back."""

    def __init__(self) -> None:
        self._left = MOST_STEPS

    def step(self, node: Node | None, *, behind_product: bool = False) -> Step:
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
