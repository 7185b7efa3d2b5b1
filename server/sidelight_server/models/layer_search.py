"""Layer search: finds the layers that layer methods can explain, their layouts, and the default layer.

A layer qualifies by its behavior: its rows are the examples, it depends on the input, the outputs depend on it, and if
half of the input changes, its positions in that half change most. Names matter only for the default: a layer within a
class named "attention" is not chosen.
"""

import contextlib
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ..compute.layers import Layers, Layout, Size, first_tensor, grids, layout, with_first_tensor
from ..errors import ConfigurationError, InvalidArgument, did_you_mean
from ..telemetry.logs import Event

log = logging.getLogger("sidelight")

MAX_EXTRA_TOKENS = 16  # tokens without a position: class and distillation tokens, registers
MAX_ROUNDS = 12  # trial passes; the first one is that of introspection
CERTAIN = 0.9  # agreement above which no further round is needed
AGREEMENT = 0.75  # least agreement for a layout; a layer without positions has 0.5
ENOUGH = 32  # rows and columns to compare; larger grids are pooled
LONG = 2  # aspect ratio of the input from which a layer may have a single row or column

_Call = Callable[[nn.Module, Tensor], object]


@dataclass(slots=True)
class Trace:
    """What one pass with a graph records about a layer."""

    n_runs: int = 0
    value: Tensor | None = None  # its output, detached; None: no tensor
    edge: GradientEdge | None = None  # its node in the graph; None: it does not depend on the input
    has_slope: Tensor | None = None  # bool, [T] for tokens, else [1]: where the first row's gradient is not zero


Traces = dict[str, Trace]


@contextlib.contextmanager
def _hooked(module: nn.Module, see: Callable[[str, object], object]) -> Iterator[None]:
    """Call `see` with the name and the output of each layer when it returns; its result replaces the output."""

    def hook(name: str) -> Callable[[nn.Module, object, object], object]:
        return lambda _module, _inputs, returned: see(name, returned)

    with contextlib.ExitStack() as stack:
        for name, each in module.named_modules():
            if name and not isinstance(each, torch.jit.ScriptModule):  # scripts take no hooks
                stack.callback(each.register_forward_hook(hook(name)).remove)
        yield


def trace(module: nn.Module, run: Callable[[], object]) -> Traces:
    """Run a pass; return a trace of each layer, in the order in which they return.

    The next module gets a copy of each output: it may modify it in edge, and the same tensor may also take other paths
    around the layer, which must be other nodes of the graph.
    """
    traces: Traces = {}

    def see(name: str, returned: object) -> object:
        value = first_tensor(returned)
        seen = traces[name] = traces.pop(name, Trace())
        seen.n_runs += 1
        if value is None:
            return returned
        copy = value.clone()
        seen.value, seen.edge = value.detach(), get_gradient_edge(copy) if copy.requires_grad else None
        return with_first_tensor(returned, copy)

    with _hooked(module, see):
        run()
    return traces


@contextlib.contextmanager
def recording_slopes(traces: Traces) -> Iterator[None]:
    """Record where the gradients at layers are not zero, in the backward passes of the context."""

    def record(seen: Trace, index: int) -> Callable[[Sequence[Tensor | None]], None]:
        def hook(gradients: Sequence[Tensor | None]) -> None:
            slope = gradients[index]
            if slope is not None and len(slope):
                seen.has_slope = (slope[0] != 0).any(-1) if slope.ndim == 3 else slope[0].any().reshape(1)

        return hook

    with contextlib.ExitStack() as stack:
        for seen in traces.values():
            if seen.edge is not None:
                stack.callback(seen.edge.node.register_prehook(record(seen, seen.edge.output_nr)).remove)
        yield


_Edge = tuple[Node, int]


def _cuts(outputs: Tensor, inputs: Tensor) -> set[_Edge]:
    """Return the edges of a graph that every path from the outputs to the inputs passes.

    An edge is on n paths: the number that lead to it times the number that go on from it. It is a cut if n is the
    number of all paths.
    """
    if not outputs.requires_grad:
        return set()
    first, last = get_gradient_edge(outputs), get_gradient_edge(inputs)
    start, end = (first.node, first.output_nr), (last.node, last.output_nr)
    order = _sorted(start)
    onward: dict[_Edge, int] = {}  # number of paths to the inputs
    for edge in reversed(order):
        onward[edge] = 1 if edge == end else sum(onward[each] for each in _next(edge))
    arriving = dict.fromkeys(order, 0)  # number of paths from the outputs
    arriving[start] = 1
    for edge in order:
        for each in _next(edge):
            arriving[each] += arriving[edge]
    return {edge for edge in order if arriving[edge] * onward[edge] == onward[start] > 0}


def _next(edge: _Edge) -> list[_Edge]:
    return [(node, number) for node, number in edge[0].next_functions if node is not None]


def _sorted(start: _Edge) -> list[_Edge]:
    """Return the edges of a graph in topological order."""
    done: dict[_Edge, None] = {}
    entered = {start}
    stack = [(start, iter(_next(start)))]
    while stack:
        edge, others = stack[-1]
        for each in others:
            if each not in entered:
                entered.add(each)
                stack.append((each, iter(_next(each))))
                break
        else:
            done[edge] = None
            stack.pop()
    return list(reversed(done))


def find(
    module: nn.Module,
    call: _Call,
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
    has_gradient = any(seen.has_slope is not None and bool(seen.has_slope.any()) for seen in traces.values())
    unfit = {name: why for name, seen in traces.items() if (why := _unfit(seen, n=n, has_gradient=has_gradient))}
    chosen = {name: _checked(name, text, traces, unfit.pop(name, ""), size) for name, text in given.items()}
    cuts = _cuts(outputs, inputs)
    passed = [
        name
        for name, seen in traces.items()
        if name not in unfit and seen.edge and (seen.edge.node, seen.edge.output_nr) in cuts
    ]
    wanted = {
        name: seen.value for name, seen in traces.items() if seen.value is not None and name not in {*unfit, *chosen}
    }
    found = _Positions(wanted, size).found(module, call, inputs.detach(), together=together, until=passed)
    layouts = {name: chosen.get(name) or found[name] for name in traces if name in chosen or name in found}
    unfit |= {
        name: f"returns {list(value.shape)}, in which no positions of the input are seen"
        for name, value in wanted.items()
        if name not in found
    }
    defaults = list(chosen) or [
        name
        for name in passed
        if name in found and wanted[name].shape != inputs.shape  # not the input itself, perhaps normalized
        and not _is_within_attention(module, name)
        and (not has_gradient or _reaches(traces[name], found[name]))
    ]  # fmt: skip
    return Layers(layouts, next((name for name in reversed(layouts) if name in defaults), ""), unfit)


def _unfit(seen: Trace, *, n: int, has_gradient: bool) -> str:
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
    if has_gradient and (seen.has_slope is None or not seen.has_slope.any()):
        return "is not what the outputs depend on"
    if len(shape) not in (3, 4):
        return f"returns {list(shape)}, expected [n, c, h, w], [n, h, w, c] or tokens [n, T, c]"
    return ""


def _reaches(seen: Trace, shown: Layout) -> bool:
    """Return whether the outputs depend on a layer's positions, not only on its class token."""
    assert seen.has_slope is not None  # noqa: S101
    if shown.kind != "tokens" or shown.grid is None:
        return True
    return bool(seen.has_slope[shown.prefix : shown.prefix + math.prod(shown.grid)].any())


def _is_within_attention(module: nn.Module, name: str) -> bool:
    """Return whether a layer is part of an attention: its output may only be used as keys or values."""
    inside = name
    while inside := inside.rpartition(".")[0]:
        kind = type(module.get_submodule(inside)).__name__.lower()
        if re.search("attention|attn", kind) and not re.search("block|layer|net|former|model", kind):
            return True
    return False


def _checked(name: str, text: str, traces: Traces, unfit: str, size: Size) -> Layout:
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
        own.arranged(value, size)
    except InvalidArgument as error:
        raise ConfigurationError(f'layer_layout: "{name}": {error.message.removeprefix("method.layer: ")}') from None
    return own


class _Positions:
    """Finds layouts by which positions change if half of the input does, in rounds until they are certain."""

    def __init__(self, values: Mapping[str, Tensor], size: Size) -> None:
        self._values = values  # the layers' outputs for the trial
        self._watched = set(values)
        self._size = size
        self._changes: dict[str, list[Tensor]] = {}  # squared, summed over rounds and each possible channel axis

    def found(
        self, module: nn.Module, call: _Call, trial: Tensor, *, together: int, until: Sequence[str]
    ) -> dict[str, Layout]:
        """Return the layouts found, after as many rounds as the layers in `until` need."""
        least, most = float(trial.min()), float(trial.max())
        generator = torch.Generator().manual_seed(0)
        is_pair = together > 1 and len(trial) > 1 and not torch.equal(trial[0], trial[1])
        for number in range(MAX_ROUNDS):
            first, second = trial[:1], trial[1:2]
            if number or not is_pair:
                noise = torch.rand((2, *trial.shape[1:]), generator=generator).to(trial)
                first, second = (least + ((most - least) or 1.0) * noise).chunk(2)
            try:
                self._look(module, call, first, second, together=together, is_known=is_pair and not number)
            except Exception as error:  # of the module: use earlier rounds
                log.warning(Event("layers_unseen", message=f"{type(error).__name__}: {error}"))
                break
            # Continue for layers after the last certain one, which may be the default. Others need only one round.
            judged = [(name, *self._judged(name)) for name in reversed(until)]
            with_positions = ((name, agreement) for name, best, agreement in judged if best)
            self._watched = {name for name, _ in itertools.takewhile(lambda each: each[1] < CERTAIN, with_positions)}
            if not self._watched:
                break
        shown = {name: self._judged(name) for name in self._changes}
        return {name: best for name, (best, agreement) in shown.items() if best and agreement >= AGREEMENT}

    def _look(
        self, module: nn.Module, call: _Call, first: Tensor, second: Tensor, *, together: int, is_known: bool
    ) -> None:
        """Add the changes if half of an example is replaced by that of another: top, bottom, left and right."""
        rows, columns = ((length + 1) // 2 for length in first.shape[2:])
        above = torch.cat([second[..., :rows, :], first[..., rows:, :]], dim=2)
        left = torch.cat([second[..., :columns], first[..., columns:]], dim=3)
        points = torch.cat([above, left] if is_known else [first, second, above, left])
        returned = {name: [*(self._values[name][:2] if is_known else ())] for name in self._watched}
        for part in torch.split(points, together):

            def see(name: str, given: object, n: int = len(part)) -> object:
                value = first_tensor(given)
                if name in returned and value is not None:
                    returned[name] += value[:n].clone()  # what comes next may work in edge
                    if len(returned[name]) == 4:
                        self._add(name, *returned.pop(name))
                return given

            with torch.no_grad(), _hooked(module, see):
                call(module, part.clone())

    def _add(self, name: str, first: Tensor, second: Tensor, above: Tensor, left: Tensor) -> None:
        changed = torch.stack([above - first, above - second, left - first, left - second]).float().square()
        sums = [changed.sum(dim=axis).double().cpu() for axis in ((1, 3) if changed.ndim == 4 else (2,))]
        before = self._changes.get(name) or [torch.zeros_like(each) for each in sums]
        self._changes[name] = [a + b for a, b in zip(before, sums, strict=True)]

    def _judged(self, name: str) -> tuple[Layout | None, float]:
        """Return the layout that fits a layer best, and its agreement."""
        changes, size = self._changes.get(name), self._size
        if not changes:
            return None, 0.0
        if len(changes) == 2:  # [4, h, w] and [4, h, w]
            read = {Layout("nchw"): changes[0], Layout("nhwc"): changes[1]}
        else:
            tokens = changes[0]  # [4, T]
            read = {
                Layout("tokens", prefix, extra - prefix, grid, size): part.reshape(4, *grid)  # [4, h, w]
                for extra in range(MAX_EXTRA_TOKENS + 1)
                for grid in grids(tokens.shape[1] - extra, size)
                for prefix in sorted({0, max(0, extra - 1), extra})  # extra tokens: all, or all but one, on one side
                for part in [tokens[:, prefix : prefix + math.prod(grid)]]
            }
        judged = {
            each: _agreement(values)
            for each, values in read.items()
            if _is_grid(values.shape[1], values.shape[2], size)
        }
        best = max(judged, key=lambda each: judged[each][1], default=None)
        return best, judged[best][0] if best else 0.0


def _is_grid(height: int, width: int, size: Size) -> bool:
    """Return whether a grid is plausible for an input size: a single row only for a wide input."""
    return height * width > 1 and (height > 1 or size[1] >= LONG * size[0]) and (width > 1 or size[0] >= LONG * size[1])


def _agreement(change: Tensor) -> tuple[float, float]:
    """Return the agreement of positions with the halves that they are in, and the margin, for changes [4, h, w].

    The agreement is the probability that a position in one half changes more with that half than a position in the
    other half does: the lower one of rows and columns.
    """
    # Pooled: more positions take long to sort and add no information.
    sides = min(change.shape[1], ENOUGH), min(change.shape[2], ENOUGH)
    above, below, left, right = nn.functional.adaptive_avg_pool2d(change, sides)
    judged = [_halves(above, below), _halves(left.T, right.T)]
    agreements, margins = zip(*(each for each in judged if each is not None), strict=True)
    return min(agreements), sum(margins)


def _halves(first: Tensor, second: Tensor) -> tuple[float, float] | None:
    """Return agreement and margin along the first axis, for changes [a, b] of the first and of the second half."""
    half = len(first) // 2  # the middle of an odd number belongs to neither half
    if not half:
        return None
    share = first / (first + second)  # NaN where nothing changes
    ahead, behind = (part[part.isfinite()] for part in (share[:half], share[len(share) - half :]))
    if not len(ahead) or not len(behind):
        return 0.0, 0.0
    n_less = torch.searchsorted(behind.sort().values, ahead)  # for each in `ahead`, how many in `behind` are less
    return float(n_less.double().mean()) / len(behind), float(ahead.mean() - behind.mean())
