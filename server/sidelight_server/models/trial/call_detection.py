"""Call detection: how a module is called, from its signature and by trying."""

import inspect
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...compute.passes.adapter import Adapter, LabelFiller
from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from .layer_trace import Traces, trace

INPUTS = ("image", "pixel_values", "x", "images", "input")  # tried for modules that accept any keyword


def possible_calls(module: nn.Module, spec: ModelSpec) -> Iterator[Adapter]:
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


def _forms(module: nn.Module, keyword: str) -> Iterator[LabelFiller]:
    yield LabelFiller(keyword)
    yield LabelFiller(keyword, "column")
    widths = [each.out_features for each in module.modules() if isinstance(each, nn.Linear)]
    if widths and widths[-1] > 1:
        yield LabelFiller(keyword, "row", widths[-1])


def _first_key(module: nn.Module, attribute: str) -> str | None:
    """Return the first of PyHealth's `feature_keys` or `label_keys`: the keywords that its models take."""
    keys = getattr(module, attribute, None)
    return keys[0] if isinstance(keys, list) and keys and isinstance(keys[0], str) else None


def first_that_runs(module: nn.Module, calls: list[Adapter], inputs: Tensor) -> tuple[Adapter, object, Traces]:
    """Return the first call that does not fail, what the module returned, and the traces of its layers.

    If all fail, raises the error of the first one: it is the most likely.
    """
    failed: Exception | None = None
    for call in calls:
        returned: list[object] = []

        def run(call: Adapter = call, returned: list[object] = returned) -> None:
            returned.append(call.call(module, inputs * 1))  # a copy: the module may work in place

        try:
            traces = trace(module, run)
            return call, returned[0], traces
        except Exception as error:  # a module may raise anything for arguments that it does not take
            failed = failed or error
    assert failed is not None  # noqa: S101
    raise failed


def check_labels(module: nn.Module, adapter: Adapter, inputs: Tensor, outputs: Tensor) -> None:
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
