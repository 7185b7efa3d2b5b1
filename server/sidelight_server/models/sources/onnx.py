"""`onnx:FILE`: an ONNX network, converted to a module by onnx2torch. Needs the extra `sidelight[onnx]`."""

import functools
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from .loading import cause, only_file, source_errors
from .torchvision_import import import_with_torchvision

FORM = "onnx:FILE"
FLOATING = (1, 10, 11)  # TensorProto.FLOAT, FLOAT16, DOUBLE
OPSET = 17  # the newest that onnx2torch reads; torch.onnx.export writes 18 and later unless dynamo is False
EXPORT_HINT = f"export the model with torch.onnx.export(…, dynamo=False, opset_version={OPSET})"


def load(location: str, weights: Path | None) -> ModelSpec:
    """Load the network in a file as a module, with what its graph states about its input."""
    path = only_file("onnx:", location, weights)
    onnx, onnx2torch = _import("onnx"), _import("onnx2torch")
    with source_errors("model", path), warnings.catch_warnings(action="ignore"):
        network = onnx.load(str(path), load_external_data=False)
        _load_external(onnx, network, path.parent)
        onnx.checker.check_model(network)
        known = _input(network)
        module = _to_module(onnx, onnx2torch, network)
        return ModelSpec(module=module.eval(), name=path.stem, **known)


def files(location: str, weights: Path | None) -> tuple[Path, ...]:
    """Return the file and its external weight files."""
    path = Path(location)
    try:
        state = path.stat()
    except OSError:
        return (path,)
    return (path, *_weight_files(path, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _weight_files(path: Path, size: int, changed_ns: int) -> tuple[Path, ...]:
    """Return the external weight files of a file. Cached by its size and time, because it is called often."""
    try:
        onnx = _import("onnx")
        return tuple(path.parent / each for each in sorted(_locations(onnx, onnx.load(path, load_external_data=False))))
    except Exception:  # loading it will report the error
        return ()


def _locations(onnx: ModuleType, network: Any) -> set[str]:
    """Return the paths of external weight files, relative to the file's folder."""
    tensors = onnx.external_data_helper._get_all_tensors(network)
    return {entry.value for each in tensors for entry in each.external_data if entry.key == "location"}


def _import(name: str) -> ModuleType:
    try:
        return import_with_torchvision(name)
    except ImportError as error:
        raise ConfigurationError("onnx: needs the extra: pip install 'sidelight[onnx]'") from error
    except RuntimeError as error:
        raise ConfigurationError(f"onnx: cannot import {name}: {cause(error)}") from error


def _load_external(onnx: ModuleType, network: Any, folder: Path) -> None:
    """Load external weights. Raises `ConfigurationError` for files outside the folder."""
    inside = folder.resolve()
    for location in _locations(onnx, network):
        if not (folder / location).resolve().is_relative_to(inside):
            raise ConfigurationError(f'has weights in "{location}", expected a file in the same folder')
    onnx.load_external_data_for_model(network, str(folder))


def _to_module(onnx: ModuleType, onnx2torch: ModuleType, network: Any) -> Any:
    """Convert a network to a module. Raises `ConfigurationError`, which says how to export it instead."""
    opset = max((each.version for each in network.opset_import if each.domain in ("", "ai.onnx")), default=OPSET)
    try:
        if opset > OPSET:
            network = _to_older_opset(onnx, network)
        _constants_to_initializers(network)
        module = onnx2torch.convert(network)
    except Exception as error:  # neither onnx nor onnx2torch documents its exceptions
        if opset <= OPSET and not isinstance(error, NotImplementedError):
            raise
        reason = cause(error).rpartition("failed: ")[2]
        raise ConfigurationError(f"its operators, of opset {opset}, cannot be read: {reason}; {EXPORT_HINT}") from error
    for each in module.modules():
        # onnx2torch uses 0 for a length that the graph does not infer; the weights have it.
        is_unknown = isinstance(each, nn.LayerNorm) and 0 in each.normalized_shape
        if is_unknown and len(each.normalized_shape) == each.weight.ndim:
            each.normalized_shape = tuple(each.weight.shape)
    return module


def _to_older_opset(onnx: ModuleType, network: Any) -> Any:
    """Convert a network to an older opset. Raises if an operator has no equivalent there."""
    converter = import_with_torchvision("onnx.version_converter")
    lowered = converter.convert_version(network, OPSET)
    shapes = {each.name: each for each in lowered.graph.initializer}
    for node in lowered.graph.node:
        # The converter keeps this default, which older operators do not have.
        _drop(node, "noop_with_empty_axes", 0)
        shape = shapes.get(node.input[1]) if node.op_type == "Reshape" else None
        # onnx2torch does not support allowzero, which only matters if the shape has a 0.
        if shape is not None and onnx.numpy_helper.to_array(shape).all():
            _drop(node, "allowzero", 1)
    onnx.checker.check_model(lowered)
    return lowered


def _drop(node: Any, name: str, value: int) -> None:
    for each in [each for each in node.attribute if each.name == name and each.i == value]:
        node.attribute.remove(each)


def _constants_to_initializers(network: Any) -> None:
    """Convert weights that are Constant or Identity nodes to initializers, as onnx2torch requires.

    torch's older exporter writes equal weights once, and Identity nodes for the others.
    """
    held = {each.name: each for each in network.graph.initializer}
    for node in list(network.graph.node):
        values = [each.t for each in node.attribute if each.name == "value"] if node.op_type == "Constant" else []
        if node.op_type == "Identity" and node.input[0] in held:
            values = [held[node.input[0]]]
        if values:
            tensor = network.graph.initializer.add()
            tensor.CopyFrom(values[0])
            tensor.name = node.output[0]
            held[tensor.name] = tensor
            network.graph.node.remove(node)


def _input(network: Any) -> dict[str, Any]:
    """Return the input's size and batch size, as far as the graph fixes them."""
    weights = {each.name for each in network.graph.initializer}
    inputs = [each for each in network.graph.input if each.name not in weights]
    shapes = [_shape(each) for each in inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or inputs[0].type.tensor_type.elem_type not in FLOATING:
        found = ", ".join(f"{each.name} {shape}" for each, shape in zip(inputs, shapes, strict=True))
        raise ConfigurationError(f"takes {found or 'nothing'}, expected one floating input [N, C, H, W]")
    n, *size = shapes[0]
    return {"batch": (n, n) if n else None, "input_size": tuple(size) if all(size) else None}


def _shape(value: Any) -> list[int]:
    """Return a shape, with 0 for a length that is not fixed; some exporters write −1."""
    return [max(0, each.dim_value) for each in value.type.tensor_type.shape.dim]
