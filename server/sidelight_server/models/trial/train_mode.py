"""Detects modules that were exported in train mode: `eval()` does not change them."""

from collections.abc import Iterator

import torch
from torch import fx, nn

from ...errors import ConfigurationError

_TRAINS = ("train", "training")  # names of the argument in operators


def check_eval_mode(module: nn.Module) -> None:
    """Raise `ConfigurationError` for exported programs, traces and scripts in train mode."""
    for each in module.modules():
        found = _of_script(each) if isinstance(each, torch.jit.ScriptModule) else ()
        if isinstance(each, fx.GraphModule):
            found = _of_graph(each.graph)
        for name in found:
            raise ConfigurationError(
                f"it was exported in train mode, its {name} among it; call eval() on the module before it is exported"
            )


def _of_graph(graph: fx.Graph) -> Iterator[str]:
    """Yield the operators in train mode of a graph of `torch.export` or `torch.fx`."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        given = dict(node.kwargs)
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            given |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if any(given.get(key) is True for key in _TRAINS) and _by_mode(name, given.get("p"), given.get("running_mean")):
            yield _display_name(name)


def _of_script(module: torch.jit.ScriptModule) -> Iterator[str]:
    """Yield the operators of a script whose train mode is a constant, not the module's attribute."""
    try:
        graph = module.inlined_graph
    except (RuntimeError, AttributeError):  # it has no forward
        return
    for name, index in (("batch_norm", 5), ("dropout", 2), ("feature_dropout", 2), ("alpha_dropout", 2)):
        for node in graph.findAllNodes(f"aten::{name}", True):  # type: ignore[attr-defined]  # torch's stub lacks it
            values = [each.toIValue() if each.node().kind() == "prim::Constant" else ... for each in node.inputs()]
            if values[index] is True and _by_mode(name, values[1], values[3] if index == 5 else None):
                yield _display_name(name)


def _by_mode(name: str, p: object, running_mean: object) -> bool:
    """Return whether an operator in train mode would behave differently in eval mode."""
    if "dropout" in name:
        return p != 0
    return "batch_norm" in name and running_mean is not None  # without them it always uses the batch's


def _display_name(name: str) -> str:
    return "dropout" if "dropout" in name else "BatchNorm"
