"""Introspection: one trial run detects how a module is called and what its outputs are.

It runs at load if the input size is known, otherwise on the first rows. Fields that the `ModelSpec` sets are not
detected but verified, so that a wrong one fails here. Anything that is neither set nor detected is an error.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...compute.head import Head
from ...compute.passes.adapter import Adapter, Labels, items, summary
from ...compute.passes.layers import Layers
from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from .layer_search import find
from .layer_trace import Traces, recording_slopes, trace
from .mode import check_mode
from .output_kind import LOGITS, PROBABILITIES, detect_head, last_step

OTHERS = ("out", "output", "outputs")
INPUTS = ("image", "pixel_values", "x", "images", "input")  # tried for modules that accept any keyword


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
        head = Head(spec.output_kind or "logits", spec.activation or "softmax")
        return Detected(replace(calls[0], output=spec.output_key), head)
    inputs = trial.detach().clone().requires_grad_()
    with torch.enable_grad():
        adapter, returned, traces = _first_that_runs(module, calls, inputs)
        adapter = replace(adapter, output=_output(returned, spec, n=max(len(trial), adapter.least)))
        outputs = adapter.outputs(returned, n=len(trial))
        _check_labels(module, adapter, inputs, outputs)
        last = last_step(outputs)  # while the graph exists
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
    return Detected(adapter, detect_head(spec, adapter, returned, outputs, last), layers, is_batch_dependent)


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
    required = [name for name in takes.required if name not in (spec.arguments or {}) and name != spec.label_argument]
    if required:
        return (next((name for name in INPUTS if name in required), required[0]),)
    key = _first_key(module, "feature_keys")
    return (key,) if key else INPUTS


def _label(module: nn.Module, spec: ModelSpec, takes: "_Signature", call: Adapter) -> str | None:
    """Return the required keyword for labels, if there is one."""
    if spec.label_argument is not None:
        takes.check(spec.label_argument, setting="label_argument")
        return spec.label_argument
    given = {call.input or takes.first, *dict(call.arguments)}
    missing = [name for name in takes.required if name not in given]
    if len(missing) > 1:
        raise ConfigurationError(
            f"arguments: the module also requires {', '.join(missing)}; set constants for them, or label_argument "
            "for the one which gets zeros"
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
            f'label_argument: the outputs depend on "{name}", so zeros would be wrong there; if it is a constant, '
            "set arguments"
        )


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
