"""Layer search: finds the layers that layer methods can explain, their layouts, and the default layer.

A layer qualifies by its behavior: its rows are the examples, it depends on the input, the outputs depend on it, and if
half of the input changes, its positions in that half change most. Names matter only for the default: a layer within a
class named "attention" is not chosen.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ...compute.passes.layers import Layers, Layout, Size, layout
from ...errors import ConfigurationError, InvalidArgument, did_you_mean
from .layer_positions import Call, Positions
from .layer_trace import Trace, Traces, cuts_of

log = logging.getLogger("sidelight")


def find(
    module: nn.Module,
    call: Call,
    traces: Traces,
    *,
    outputs: Tensor,
    inputs: Tensor,
    n: int,
    together: int,
    given: Mapping[str, str],
) -> Layers:
    """Return the layers that qualify, from the `traces` of a pass of n rows and from further passes.

    The graph leads from `inputs`, the trial of one or two examples, to `outputs`. At most `together` rows run at once.
    `given` are layouts that the operator has set: the last of these layers is the default. Without them the default is
    the last layer that is a cut of the graph (so not a branch), is not within an attention, and on whose positions the
    outputs depend: after its last block a ViT only reads the class token.
    """
    size = (inputs.shape[2], inputs.shape[3])
    any_gradient = any(seen.has_gradient is not None and bool(seen.has_gradient.any()) for seen in traces.values())
    unfit = {name: why for name, seen in traces.items() if (why := _unfit(seen, n=n, any_gradient=any_gradient))}
    chosen = {name: _check_layout(name, text, traces, unfit.pop(name, ""), size) for name, text in given.items()}
    cuts = cuts_of(outputs, inputs)
    passed = [
        name
        for name, seen in traces.items()
        if name not in unfit and seen.edge and (seen.edge.node, seen.edge.output_nr) in cuts
    ]
    wanted = {
        name: seen.value for name, seen in traces.items() if seen.value is not None and name not in {*unfit, *chosen}
    }
    found = Positions(wanted, size).find(module, call, inputs.detach(), together=together, until=passed)
    layouts = {name: chosen.get(name) or found[name] for name in traces if name in chosen or name in found}
    unfit |= {
        name: f"returns {list(value.shape)}, in which no positions of the input were detected"
        for name, value in wanted.items()
        if name not in found
    }
    defaults = list(chosen) or [
        name
        for name in passed
        if name in found and wanted[name].shape != inputs.shape  # not the input itself, perhaps normalized
        and not _is_within_attention(module, name)
        and (not any_gradient or _reaches(traces[name], found[name]))
    ]  # fmt: skip
    return Layers(layouts, next((name for name in reversed(layouts) if name in defaults), ""), unfit)


def _unfit(seen: Trace, *, n: int, any_gradient: bool) -> str:
    """Return why a layer does not qualify, whatever its layout; empty if it may."""
    if seen.n_runs > 1:
        return f"runs {seen.n_runs} times in a pass, expected once"
    if seen.value is None:
        return "returns no tensor"
    shape = seen.value.shape
    if shape[:1] != (n,) or 0 in shape:
        return f"returns {list(shape)}, expected the examples first, [n, …]"
    if seen.edge is None:
        return "does not depend on the input"
    if any_gradient and (seen.has_gradient is None or not seen.has_gradient.any()):
        return "does not influence the outputs"
    if len(shape) not in (3, 4):
        return f"returns {list(shape)}, expected [n, c, h, w], [n, h, w, c] or tokens [n, T, c]"
    return ""


def _reaches(seen: Trace, shown: Layout) -> bool:
    """Return whether the outputs depend on a layer's positions, not only on its class token."""
    assert seen.has_gradient is not None  # noqa: S101
    if shown.kind != "tokens" or shown.grid is None:
        return True
    return bool(seen.has_gradient[shown.prefix : shown.prefix + math.prod(shown.grid)].any())


def _is_within_attention(module: nn.Module, name: str) -> bool:
    """Return whether a layer is part of an attention: its output may only be used as keys or values."""
    inside = name
    while inside := inside.rpartition(".")[0]:
        kind = type(module.get_submodule(inside)).__name__.lower()
        if re.search("attention|attn", kind) and not re.search("block|layer|net|former|model", kind):
            return True
    return False


def _check_layout(name: str, text: str, traces: Traces, unfit: str, size: Size) -> Layout:
    """Parse the operator's layout of a layer. Raises `ConfigurationError` if it does not fit the output."""
    own = layout(text)
    if name not in traces:
        raise ConfigurationError(f'layer_layout: no layer "{name}" runs; {did_you_mean(name, traces)}')
    value = traces[name].value
    if unfit or value is None:
        raise ConfigurationError(f'layer_layout: "{name}" {unfit}')
    if own.grid and value.ndim == 3:
        own = replace(own, suffix=max(0, value.shape[1] - own.prefix - math.prod(own.grid)), input_size=size)
    try:
        own.arrange(value, size)
    except InvalidArgument as error:
        raise ConfigurationError(f'layer_layout: "{name}": {error.message.removeprefix("method.layer: ")}') from None
    return own
