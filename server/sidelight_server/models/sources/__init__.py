"""Sources: where a module comes from. A kind, a colon, and a place; what a place holds is read, and never run.

The exceptions are what the operator names as a program: a factory, and a script. Weights are safetensors, or a `.pt`
file read weights-only.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from . import exported, huggingface, onnx, python, torchscript


@dataclass(frozen=True, slots=True)
class _Kind:
    form: str
    load: Callable[[str, Path | None], ModelSpec]
    files: Callable[[str, Path | None], tuple[Path, ...]]


_KINDS: Mapping[str, _Kind] = {
    each.FORM.partition(":")[0]: _Kind(each.FORM, each.load, each.files)
    for each in (python, exported, torchscript, huggingface, onnx)
}
FORMS = ", ".join(each.form for each in _KINDS.values())


def load(source: str, weights: Path | None = None) -> ModelSpec:
    """Return the module that a source holds, and what is known of it. `ConfigurationError` says what went wrong."""
    kind, place = _found(source)
    return kind.load(place, weights)


def files(source: str, weights: Path | None = None) -> tuple[Path, ...]:
    """Return the files whose change means that the model must be loaded again."""
    kind, place = _found(source)
    return kind.files(place, weights)


def _found(source: str) -> tuple[_Kind, str]:
    name, colon, place = source.partition(":")
    if name in _KINDS and colon and place:
        return _KINDS[name], place
    if name in _KINDS:
        raise ConfigurationError(f'model: got "{source}", expected "{_KINDS[name].form}"')
    close = difflib.get_close_matches(name, _KINDS, n=1)
    hint = f'; did you mean "{close[0]}:"?' if close else ""
    raise ConfigurationError(f'model: got "{source}", expected {FORMS}{hint}')
