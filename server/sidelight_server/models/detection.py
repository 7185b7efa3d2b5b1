"""Detection: finds out, when a model is loaded, how its module is called and what its outputs are. By one trial run.

What the specification says is not guessed, but tried all the same: a wrong word fails here, not at the first request.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..options import Activation, Outputs
from ..probes import layers_of
from ..scores import Head
from .adapter import Adapter, Labels, items, told
from .spec import ModelSpec

# In the order of preference: of logits more scores can be had than of probabilities.
LOGITS = ("logits", "logit")
PROBABILITIES = ("y_prob", "probabilities", "probs", "prob")
OTHERS = ("out", "output", "outputs")
INPUTS = ("image", "pixel_values", "x", "images", "input")  # what those call it that take any keyword
SUM_TOLERANCE = 1e-3  # of probabilities that exclude each other, in half precision too


@dataclass(frozen=True, slots=True)
class Detected:
    """How a module is called, and how its outputs are read; and what else its one run shows."""

    adapter: Adapter
    head: Head
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)  # that can be probed: their h and w
    rows_touch: bool = False  # whether one row's outputs depend on another row


def detect(module: nn.Module, spec: ModelSpec, trial: Tensor | None) -> Detected:
    """Return what is known of a frozen module in eval mode, by its signature and by what it returns for a trial.

    `trial` is two inputs, [2, C, H, W]; without one nothing is run, and outputs are taken for what most are.
    `ConfigurationError` says what does not fit, and what the module returned; a module may raise whatever it likes.
    """
    calls = list(_calls(module, spec))
    if trial is None:
        head = Head(spec.outputs or "logits", spec.activation or "softmax")
        return Detected(replace(calls[0], output=spec.output), head)
    inputs = trial.detach().clone().requires_grad_()
    with torch.enable_grad():
        adapter, returned, layers = _first_that_runs(module, calls, inputs)
        adapter = replace(adapter, output=_output(returned, spec.output, n=max(len(trial), adapter.least)))
        outputs = adapter.outputs(returned, n=len(trial))
        _check_labels(module, adapter, inputs, outputs)
        gradients = _gradients_of_first(outputs, inputs)
    return Detected(
        adapter,
        _head(spec, adapter, returned, outputs),
        layers,
        rows_touch=bool((gradients[1:].nan_to_num() != 0).any()),
    )


def _calls(module: nn.Module, spec: ModelSpec) -> Iterator[Adapter]:
    """Yield the ways in which a module may want to be called, the likeliest first."""
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
    """Return the keyword that demands labels, if one does."""
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
    """What a module's `forward` takes."""

    def __init__(self, module: nn.Module) -> None:
        try:
            parameters = list(inspect.signature(module.forward).parameters.values())
        except (TypeError, ValueError):  # it is written in no Python
            parameters = []
        # A script says of itself that it takes anything, and an exported program is called by position as a rule.
        opaque = not parameters or isinstance(module, torch.jit.ScriptModule)
        kinds = inspect.Parameter
        named = [each for each in parameters if each.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
        self.names = [each.name for each in named]
        self.required = [] if opaque else [each.name for each in named if each.default is kinds.empty]
        self.anything = opaque or any(each.kind is kinds.VAR_KEYWORD for each in parameters)
        places = [each.name for each in parameters if each.kind not in (kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD)]
        self.positional = opaque or bool(places)
        self.first = places[0] if places else ""

    def check(self, name: str, *, setting: str) -> None:
        """Refuse a keyword that the module does not take."""
        if not self.anything and name not in self.names:
            raise ConfigurationError(f'{setting}: the module takes no "{name}"; it takes {", ".join(self.names)}')


def _first_that_runs(
    module: nn.Module, calls: list[Adapter], inputs: Tensor
) -> tuple[Adapter, object, dict[str, tuple[int, int]]]:
    failed: Exception | None = None
    for call in calls:
        returned: list[object] = []

        def run(call: Adapter = call, returned: list[object] = returned) -> None:
            returned.append(call.call(module, inputs * 1))  # a copy: it may begin with an operation in place

        try:
            layers = layers_of(module, run)
            return call, returned[0], layers
        except Exception as error:
            failed = failed or error
    assert failed is not None  # noqa: S101
    raise failed


def _output(returned: object, wanted: int | str | None, *, n: int) -> int | str | None:
    """Return where the outputs lie in what a module returned for n examples."""
    if isinstance(returned, Tensor):
        if wanted is not None:
            raise ConfigurationError(f'output: got "{wanted}", but the model returned a tensor, {told(returned)}')
        return None
    within = items(returned)
    if wanted is not None:
        place = int(wanted) if isinstance(wanted, str) and wanted.isdecimal() and wanted not in within else wanted
        if place not in within:
            raise ConfigurationError(f'output: got "{wanted}", but the model returned {told(returned)}')
        return place
    fitting = [key for key, each in within.items() if _fits(each, n)]
    known = [key for key in (*LOGITS, *PROBABILITIES, *OTHERS) if key in fitting]
    places = [key for key in fitting if isinstance(key, int)]
    if known or places or len(fitting) == 1:
        return (known or places or fitting)[0]
    raise ConfigurationError(
        f"output: the model returned {told(returned)}; set output to the one that is [n, K] or [n, K, h, w]"
    )


def _fits(returned: object, n: int) -> bool:
    return (
        isinstance(returned, Tensor)
        and returned.is_floating_point()
        and returned.ndim in (1, 2, 4)
        and len(returned) == n
        and 0 not in returned.shape
    )


def _check_labels(module: nn.Module, adapter: Adapter, inputs: Tensor, outputs: Tensor) -> None:
    """Refuse labels that are none: another input, which zeros would be wrong for."""
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
    """Return the gradients of the first row's outputs for all inputs, [n, C, H, W]; zeros where there are none."""
    if outputs.isnan().any():
        raise ConfigurationError(f"its outputs, {told(outputs)}, are not numbers (NaN) for noise between 0 and 1")
    if not outputs.is_floating_point():
        raise ConfigurationError(f"it cannot be differentiated: its outputs, {told(outputs)}, are no real numbers")
    if not outputs.requires_grad:
        return torch.zeros_like(inputs)
    first = outputs[0].flatten()
    # Unequal weights: probabilities, all added, would be 1 whatever they depend on.
    weights = torch.linspace(1, 2, len(first), dtype=first.dtype, device=first.device)
    (gradients,) = torch.autograd.grad((first * weights).sum(), inputs, allow_unused=True)
    return torch.zeros_like(inputs) if gradients is None else gradients


def _head(spec: ModelSpec, adapter: Adapter, returned: object, outputs: Tensor) -> Head:
    """Return how outputs, [n, K] or [n, K, h, w], are read."""
    found, activation = _kind(adapter, returned, outputs)
    values = outputs.detach()
    if spec.outputs == "probabilities" and (values.min() < 0 or values.max() > 1):
        raise ConfigurationError(
            f'outputs: got "probabilities", but the model returned {told(outputs)} from {values.min():.3g} to '
            f'{values.max():.3g}; set outputs to "logits"'
        )
    if spec.outputs == "logits" and found == "probabilities" and _last_step(outputs) is not None:
        raise ConfigurationError(
            f'outputs: got "logits", but the model returned probabilities, {told(outputs)}: its last step is a '
            f'{_last_step(outputs)}; set outputs to "probabilities"'
        )
    return Head(spec.outputs or found, spec.activation or activation)


def _kind(adapter: Adapter, returned: object, outputs: Tensor) -> tuple[Outputs, Activation]:
    last, exclusive = _last_step(outputs), _sums_to_one(outputs)
    if adapter.output in LOGITS:
        return "logits", _activation_of(returned, outputs)
    if adapter.output in PROBABILITIES or last or exclusive:
        return "probabilities", "softmax" if exclusive else "sigmoid"
    return "logits", "softmax"


def _last_step(outputs: Tensor) -> Activation | None:
    """Return the activation that a module ends with, by what autograd recorded: exact, where values only hint."""
    step = outputs.grad_fn
    while step is not None and step.name() in _RESHAPING:
        step = step.next_functions[0][0]
    name = "" if step is None else step.name()
    return "softmax" if name == "SoftmaxBackward0" else "sigmoid" if name == "SigmoidBackward0" else None


_RESHAPING = frozenset(
    {"SqueezeBackward1", "SqueezeBackward0", "UnsqueezeBackward0", "ViewBackward0", "SliceBackward0", "ToCopyBackward0"}
)


def _sums_to_one(outputs: Tensor) -> bool:
    values = outputs.detach().float()
    return bool(values.shape[1] > 1 and (values >= 0).all() and ((values.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all())


def _activation_of(returned: object, logits: Tensor) -> Activation:
    """Return how logits become probabilities, where those are returned beside them."""
    within: Mapping[int | str, object] = items(returned)
    for name in PROBABILITIES:
        beside = within.get(name)
        if isinstance(beside, Tensor) and beside.shape == logits.shape:
            return "softmax" if _sums_to_one(beside) else "sigmoid"
    return "softmax"
