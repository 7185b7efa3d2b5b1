"""The mode of a recorded module: one that was recorded in train mode stays in it, whatever `eval()` says later."""

from collections.abc import Iterator

import torch
from torch import fx, nn

from ..errors import ConfigurationError

_TRAINS = ("train", "training")  # what operators call the argument


def check_mode(module: nn.Module) -> None:
    """Refuse exported programs, traces and scripts that draw dropout, or take the batch's own statistics."""
    for each in module.modules():
        found = _of_script(each) if isinstance(each, torch.jit.ScriptModule) else ()
        if isinstance(each, fx.GraphModule):
            found = _of_graph(each.graph)
        for name in found:
            raise ConfigurationError(
                f"it was exported in train mode, its {name} among it; call eval() on the module before it is exported"
            )


def _of_graph(graph: fx.Graph) -> Iterator[str]:
    """Yield the operators of a graph, as `torch.export` and `torch.fx` make them, that were recorded in train mode."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        given = dict(node.kwargs)
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            given |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if any(given.get(key) is True for key in _TRAINS) and _shows(name, given.get("p"), given.get("running_mean")):
            yield _told(name)


def _of_script(module: torch.jit.ScriptModule) -> Iterator[str]:
    """Yield the operators of a script that were recorded in train mode: with a constant, not the module's own mode."""
    try:
        graph = module.inlined_graph
    except (RuntimeError, AttributeError):  # it has no forward
        return
    for name, place in (("batch_norm", 5), ("dropout", 2), ("feature_dropout", 2), ("alpha_dropout", 2)):
        for node in graph.findAllNodes(f"aten::{name}", True):  # type: ignore[attr-defined]  # torch's stub lacks it
            values = [each.toIValue() if each.node().kind() == "prim::Constant" else ... for each in node.inputs()]
            if values[place] is True and _shows(name, values[1], values[3] if place == 5 else None):
                yield _told(name)


def _shows(name: str, p: object, running_mean: object) -> bool:
    """Say whether an operator that trains does so because of its module's mode."""
    if "dropout" in name:
        return p != 0
    return "batch_norm" in name and running_mean is not None  # else it has no other statistics in eval mode either


def _told(name: str) -> str:
    return "dropout" if "dropout" in name else "BatchNorm"
