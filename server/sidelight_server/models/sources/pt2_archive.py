"""Checks a `.pt2` archive before torch loads it, so that no code in the file is run.

torch's own loader can be made to run code in five ways: it unpickles arbitrary objects, loads compiled libraries,
accepts any function reachable from `torch` as an operator, evaluates size expressions, and writes names into Python
source. A file is rejected unless each of these has the form that `torch.export.save` writes for a plain network.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...errors import ConfigurationError

if TYPE_CHECKING:  # not in older torch
    from torch.export.pt2_archive import PT2ArchiveReader

# Allowed members of an archive. Compiled code ("data/aotinductor/…") is not among them.
_MEMBERS = re.compile(
    r"(archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|\.storage_alignment"
    r"|models/model\.json|extra/.*|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json))"
)
_PROGRAM = "models/model.json"
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.(?!(from_file|save)\b)\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|map_impl|scan|while_loop|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_(float|int|ite|max|min|not|sum|sqrt)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift)"
    r"|math\.(ceil|floor|trunc|sqrt)"
)
_NAME = re.compile(r"[\w.+\- ]*")  # in Python source this is a name or does not compile
_SIZES = (
    ast.Expression, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Constant,
    ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
_FUNCTIONS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Mod|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|CeilDiv"
    r"|FloorToInt|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt"
    r"|RoundDecimal|ToFloat|Identity|floor|ceiling"
)
_SYMBOL = re.compile(r"[suz]+f?\d+|True|False|oo|int_oo")
_QUOTED = re.compile(r"[suz]+f?\d+|-?\d+(\.\d*)?(e-?\d+)?")
_TEXTS = {"as_string", "as_strings", "stack_trace", "guards_code", "metadata"}  # stored or quoted only
_SPECS = {"in_spec", "out_spec"}  # JSON in JSON
_IMPORTING = {"__enum__", "default_factory_module"}  # keys that import modules


def read(data: bytes) -> ExportedProgram:
    """Load the program in an archive. Raises `ConfigurationError` if it could run code, and what torch raises."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ConfigurationError("is not an archive, or is broken; expected what torch.export.save makes")
    _check(data)
    _register_outputs(data)
    # From memory, because the file could have changed since the check.
    return torch.export.load(io.BytesIO(data))


def _register_outputs(data: bytes) -> None:
    """Import transformers' output classes if the program uses them: the import registers them with torch."""
    if b"transformers.modeling_outputs." in data:
        with contextlib.suppress(ImportError):
            importlib.import_module("transformers.modeling_outputs")


def _check(data: bytes) -> None:
    try:
        from torch.export.pt2_archive import PT2ArchiveReader
    except ImportError:
        raise ConfigurationError(f"needs torch 2.8 or newer, this is {torch.__version__}") from None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch detects the older format, which it unpickles, like this
        names = archive.namelist()
        if "version" in names or "serialized_exported_program.json" in names:
            raise ConfigurationError("is an archive of torch before 2.8; export the model again")
        if not any(name.endswith("/archive_format") for name in names):
            raise ConfigurationError("is another kind of archive, expected what torch.export.save makes")
    # With the reader that torch uses: another one might find other members.
    with PT2ArchiveReader(io.BytesIO(data)) as archive:
        names = archive.get_file_names()
        if strange := [name for name in names if not _MEMBERS.fullmatch(name)]:
            raise ConfigurationError(f'holds "{strange[0]}", expected weights and one program, and no code')
        if _PROGRAM not in names:
            raise ConfigurationError("holds no exported program, expected what torch.export.save makes")
        for kind in ("weights", "constants"):
            _check_payloads(archive, kind)
        if "data/sample_inputs/model.pt" in names:
            _check_pickle(archive, "data/sample_inputs/model.pt")
        _check_program(json.loads(archive.read_bytes(_PROGRAM)))


def _check_payloads(archive: "PT2ArchiveReader", kind: str) -> None:
    config = json.loads(archive.read_bytes(f"data/{kind}/model_{kind}_config.json"))["config"]
    for payload in config.values():
        name = str(payload["path_name"])
        if not re.fullmatch(r"(weight|tensor)_\d+", name):
            raise ConfigurationError(f'holds "{name}", an object, expected tensors')
        if payload["use_pickle"] and not isinstance(_check_pickle(archive, f"data/{kind}/{name}"), Tensor):
            raise ConfigurationError(f'"{name}" is not a tensor')


def _check_pickle(archive: "PT2ArchiveReader", name: str) -> object:
    """Read a pickle weights-only. Raises `UnpicklingError` if it holds anything but tensors."""
    if not (pickled := archive.read_bytes(name)):
        return None
    return torch.load(io.BytesIO(pickled), map_location="cpu", weights_only=True)


def _check_program(part: object, key: str = "") -> None:
    """Check every string of a program, recursively."""
    if isinstance(part, Mapping):
        for name, each in part.items():
            _check_text(name, "expr_str" if key == "range_constraints" else "key")
            if name not in _TEXTS:
                _check_program(each, name)
    elif isinstance(part, list):
        for each in part:
            _check_program(each, key)
    elif isinstance(part, str):
        _check_text(part, key)


def _check_text(text: str, key: str) -> None:
    if key in ("target", "as_operator"):
        if not _OPERATORS.fullmatch(text):
            raise ConfigurationError(f'calls "{text[:80]}", expected operators of torch.ops.aten')
    elif key == "expr_str":
        if not _is_size(text):
            raise ConfigurationError(f'has the size "{text[:80]}", expected sums and products of symbols')
    elif key in _SPECS:
        _check_program(json.loads(text), "context")
    elif key == "context" and text[:1] in ("[", "{"):
        _check_program(json.loads(text), key)
    else:
        _check_name(text)


def _check_name(text: str) -> None:
    if not _NAME.fullmatch(text) or text in _IMPORTING:
        raise ConfigurationError(f'has the name "{text[:80]}", expected letters, digits, dots and dashes')


def _is_size(text: str) -> bool:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    called = {id(each.func) for each in ast.walk(tree) if isinstance(each, ast.Call)}
    return all(_is_harmless(each, is_called=id(each) in called) for each in ast.walk(tree))


def _is_harmless(node: ast.AST, *, is_called: bool) -> bool:
    if isinstance(node, ast.Name):
        return bool((_FUNCTIONS if is_called else _SYMBOL).fullmatch(node.id))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) or bool(_QUOTED.fullmatch(str(node.value)))
    return isinstance(node, _SIZES)
