"""Model sources, written "kind:location". Files are read, but no code in them is run.

Exceptions are the sources that are programs: a Python factory and a TorchScript file. Weights are safetensors, or a
`.pt` file read weights-only.
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
    """Load a module from a source, with what the source states about it. Raises `ConfigurationError`."""
    kind, location = _split(source)
    return kind.load(location, weights)


def files(source: str, weights: Path | None = None) -> tuple[Path, ...]:
    """Return the files whose change triggers a reload of the model."""
    kind, location = _split(source)
    return kind.files(location, weights)


def _split(source: str) -> tuple[_Kind, str]:
    name, colon, location = source.partition(":")
    if name in _KINDS and colon and location:
        return _KINDS[name], location
    if name in _KINDS:
        raise ConfigurationError(f'model: got "{source}", expected "{_KINDS[name].form}"')
    close = difflib.get_close_matches(name, _KINDS, n=1)
    hint = f'; did you mean "{close[0]}:"?' if close else ""
    raise ConfigurationError(f'model: got "{source}", expected {FORMS}{hint}')
