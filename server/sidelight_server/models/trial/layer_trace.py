"""The trace of a pass: each layer's output, and its edge in the autograd graph."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ...compute.passes.layers import first_tensor, with_first_tensor


@dataclass(slots=True)
class Trace:
    """What one pass with a graph records about a layer."""

    n_runs: int = 0
    value: Tensor | None = None  # its output, detached; None: no tensor
    edge: GradientEdge | None = None  # its node in the graph; None: it does not depend on the input
    has_gradient: Tensor | None = None  # bool, [T] for tokens, else [1]: where the first row's gradient is not zero


Traces = dict[str, Trace]


@contextlib.contextmanager
def hooked_layers(module: nn.Module, see: Callable[[str, object], object]) -> Iterator[None]:
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

    The next module gets a copy of each output: it may modify it in place, and paths of the same tensor around the layer
    must be other nodes of the graph.
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

    with hooked_layers(module, see):
        run()
    return traces


@contextlib.contextmanager
def recording_gradients(traces: Traces) -> Iterator[None]:
    """Record where the gradients at layers are not zero, in the backward passes within the context."""

    def record(seen: Trace, index: int) -> Callable[[Sequence[Tensor | None]], None]:
        def hook(gradients: Sequence[Tensor | None]) -> None:
            gradient = gradients[index]
            if gradient is not None and len(gradient):
                seen.has_gradient = (gradient[0] != 0).any(-1) if gradient.ndim == 3 else gradient[0].any().reshape(1)

        return hook

    with contextlib.ExitStack() as stack:
        for seen in traces.values():
            if seen.edge is not None:
                stack.callback(seen.edge.node.register_prehook(record(seen, seen.edge.output_nr)).remove)
        yield


_Edge = tuple[Node, int]


def cuts_of(outputs: Tensor, inputs: Tensor) -> set[_Edge]:
    """Return the edges of a graph that every path from the outputs to the inputs passes.

    An edge is on n paths: the number that lead to it times the number that go on from it. It is a cut if n is the
    number of all paths.
    """
    if not outputs.requires_grad:
        return set()
    first, last = get_gradient_edge(outputs), get_gradient_edge(inputs)
    start, end = (first.node, first.output_nr), (last.node, last.output_nr)
    order = _sort(start)
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


def _sort(start: _Edge) -> list[_Edge]:
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
