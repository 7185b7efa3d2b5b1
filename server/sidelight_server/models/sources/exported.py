"""`export:FILE.pt2`: a program from `torch.export`. Loading it runs no code in the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec

from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from .loading import only_file, source_errors
from .pt2_archive import read

FORM = "export:FILE.pt2"

# torch accepts batch size 1 for a program with a lower bound of 2: it distinguishes sizes of 1 only if static.
_RELAXED = 2


def load(location: str, weights: Path | None) -> ModelSpec:
    """Load the program in a file as a module, with what it states about its inputs."""
    path = only_file("export:", location, weights)
    with source_errors("model", path):
        program = read(path.read_bytes())
        # Guards are code, which would be run; the size ranges of the program are checked instead.
        return ModelSpec(module=program.module(check_guards=False), name=path.stem, **_inputs(program))


def files(location: str, weights: Path | None) -> tuple[Path, ...]:
    """Return the file."""
    return (Path(location),)


def _inputs(program: ExportedProgram) -> dict[str, Any]:
    """Return how to call a program, as fields of `ModelSpec`: images by position or keyword, constants, and labels."""
    positional, named = _leaves(program)
    if len(positional) > 1:
        raise ConfigurationError(
            f"the program takes {len(positional)} inputs by position, expected the images alone, and others by keyword"
        )
    tensors = {name: each for name, each in named.items() if isinstance(each, Tensor)}
    arguments = {name: each for name, each in named.items() if isinstance(each, bool | int | float | str)}
    for name in named.keys() - tensors.keys() - arguments.keys():
        raise ConfigurationError(f'the program requires "{name}", {named[name]!r}; export it without that')
    pictures = [name for name, each in tensors.items() if _is_picture(each)]
    images: object = positional[0] if positional else tensors.pop(pictures[0]) if pictures else None
    if not isinstance(images, Tensor) or not _is_picture(images):
        taken = {"the first": positional[0]} if positional else tensors
        raise ConfigurationError(f"the program takes {_describe(taken)}, expected floating images, [N, C, H, W]")
    if len(tensors) > 1 or any(map(_is_picture, tensors.values())):
        raise ConfigurationError(f"the program also takes {_describe(tensors)}, expected nothing else but labels")
    return {
        "input_size": _size(images),
        "input": None if positional else pictures[0],
        "arguments": arguments or None,
        "label_argument": next(iter(tensors), None),
        "batch": _batch(program, images.shape[0]),
    }


def _leaves(program: ExportedProgram) -> tuple[list[object], dict[str, object]]:
    """Return a program's positional and keyword inputs: an example tensor, or the required constant."""
    specs = [each for each in program.graph_signature.input_specs if each.kind == InputKind.USER_INPUT]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves = [_value(each, values) for each in specs]
    in_spec = program.call_spec.in_spec
    if in_spec is None or len(in_spec.children()) != 2 or in_spec.num_leaves != len(leaves):
        raise ConfigurationError("the program does not record how it is called")
    by_position, by_keyword = in_spec.children()
    if any(not each.is_leaf() for each in (*by_position.children(), *by_keyword.children())):
        raise ConfigurationError("the program takes nested inputs, expected tensors")
    n = by_position.num_leaves
    return leaves[:n], dict(zip(by_keyword.context or (), leaves[n:], strict=True))


def _value(spec: InputSpec, values: Mapping[str, object]) -> object:
    return spec.arg.value if isinstance(spec.arg, ConstantArgument) else values.get(spec.arg.name)


def _is_picture(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _describe(inputs: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name} {str(each.dtype).removeprefix('torch.')} {[str(length) for length in each.shape]}".replace("'", "")
        if isinstance(each, Tensor)
        else f"{name} {each!r}"
        for name, each in inputs.items()
    )


def _size(images: Tensor) -> tuple[int, int, int] | None:
    channels, height, width = images.shape[1:]
    if isinstance(channels, int) and isinstance(height, int) and isinstance(width, int):
        return channels, height, width
    return None


def _batch(program: ExportedProgram, length: int | torch.SymInt) -> tuple[int, int] | None:
    """Return the least and the largest batch size of a program (0: no limit); None if it takes any."""
    if isinstance(length, int):
        return length, length
    expression = length.node.expr
    ranges = program.range_constraints.get(expression)
    if ranges is None or not expression.is_Symbol:
        raise ConfigurationError(f"the program takes {expression} examples at once, expected any number of them")
    least = int(ranges.lower) if ranges.lower > _RELAXED else 1
    # The end of an unbounded range is a special symbol of torch.
    most = int(ranges.upper) if ranges.upper.is_Integer else 0
    return None if (least, most) == (1, 0) else (least, most)
