"""ONNX: `onnx:FILE`, a network that onnx2torch writes anew as a module. An optional extra."""

import functools
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import ConfigurationError
from ..spec import ModelSpec
from .refusal import cause, refuse_weights, refusing, require_file
from .vision import import_with_torchvision

FORM = "onnx:FILE"
FLOATING = (1, 10, 11)  # TensorProto.FLOAT, FLOAT16, DOUBLE


def load(place: str, weights: Path | None) -> ModelSpec:
    """Return the network in a file as a module, and what its graph says of its input."""
    path = Path(place)
    refuse_weights("onnx:", weights)
    require_file("model", path)
    onnx, onnx2torch = _imported("onnx"), _imported("onnx2torch")
    with refusing("model", path), warnings.catch_warnings(action="ignore"):
        network = onnx.load(str(path), load_external_data=False)
        _load_external(onnx, network, path.parent)
        onnx.checker.check_model(network)
        known = _input(network)
        _settle(network)
        return ModelSpec(onnx2torch.convert(network).eval(), name=path.stem, **known)


def files(place: str, weights: Path | None) -> tuple[Path, ...]:
    """Return the file, and those in which it keeps its weights."""
    path = Path(place)
    try:
        state = path.stat()
    except OSError:
        return (path,)
    return (path, *_beside(path, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _beside(path: Path, size: int, changed_ns: int) -> tuple[Path, ...]:
    """Return the files in which another, as it is since it changed, keeps its weights. They are asked for often."""
    try:
        onnx = _imported("onnx")
        return tuple(path.parent / each for each in sorted(_locations(onnx, onnx.load(path, load_external_data=False))))
    except Exception:  # loading it will say what is wrong
        return ()


def _locations(onnx: ModuleType, network: Any) -> set[str]:
    """Return the names of other files in which weights are, from the file's folder."""
    tensors = onnx.external_data_helper._get_all_tensors(network)
    return {entry.value for each in tensors for entry in each.external_data if entry.key == "location"}


def _imported(name: str) -> ModuleType:
    try:
        return import_with_torchvision(name)
    except ImportError as error:
        raise ConfigurationError("onnx: needs the extra: pip install 'sidelight[onnx]'") from error
    except RuntimeError as error:
        raise ConfigurationError(f"onnx: cannot import {name}: {cause(error)}") from error


def _load_external(onnx: ModuleType, network: Any, folder: Path) -> None:
    """Read weights out of other files of the folder, and of no other place."""
    inside = folder.resolve()
    for location in _locations(onnx, network):
        if not (folder / location).resolve().is_relative_to(inside):
            raise ConfigurationError(f'has weights in "{location}", expected a file in the same folder')
    onnx.load_external_data_for_model(network, str(folder))


def _settle(network: Any) -> None:
    """Make initializers of weights that are written as constant operations, where onnx2torch looks for none."""
    for node in list(network.graph.node):
        values = [each.t for each in node.attribute if each.name == "value"]
        if node.op_type == "Constant" and values:
            tensor = network.graph.initializer.add()
            tensor.CopyFrom(values[0])
            tensor.name = node.output[0]
            network.graph.node.remove(node)


def _input(network: Any) -> dict[str, Any]:
    """Return the input's size and how many examples it takes at once, as far as the graph fixes them."""
    weights = {each.name for each in network.graph.initializer}
    inputs = [each for each in network.graph.input if each.name not in weights]
    shapes = [_shape(each) for each in inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or inputs[0].type.tensor_type.elem_type not in FLOATING:
        told = ", ".join(f"{each.name} {shape}" for each, shape in zip(inputs, shapes, strict=True))
        raise ConfigurationError(f"takes {told or 'nothing'}, expected one floating input [N, C, H, W]")
    n, *size = shapes[0]
    return {"batch": (n, n) if n else None, "input_size": tuple(size) if all(size) else None}


def _shape(value: Any) -> list[int]:
    """Return a shape; 0 for a length that is not fixed, for which some write −1."""
    return [max(0, each.dim_value) for each in value.type.tensor_type.shape.dim]
