"""Format and parse methods as text: `smoothgrad(samples=10, base=integrated_gradients(steps=20))`.

Options are those of the method classes; omitted options have their defaults. A value is a number, True, False, None, a
word, a quoted string, a tuple or a method.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.enums import word
from .._inputs.validation import did_you_mean
from ..exceptions import InvalidArgument
from .baselines import Blurred, baseline_text
from .method import Method


def _classes() -> Iterator[type[Method]]:
    """Yield the methods of all modules of this package."""
    for found in pkgutil.iter_modules(sys.modules[__package__].__path__):
        module = importlib.import_module(f"{__package__}.{found.name}")
        for each in vars(module).values():
            if isinstance(each, type) and issubclass(each, Method) and each.__module__ == module.__name__:
                yield each


_BY_NAME = {each().message().WhichOneof("method"): each for each in _classes() if not inspect.isabstract(each)}
METHODS: dict[str, type[Method]] = {
    name: _BY_NAME[name] for name in pb.Method.DESCRIPTOR.fields_by_name if name in _BY_NAME
}
_BASELINES = {"blurred": Blurred}
_CONSTANTS = ("True", "False", "None")

_Called = TypeVar("_Called", bound=Method | Blurred)
_Token = re.Match[str]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_LAYER = re.compile(r"[\w.+-]+", re.ASCII)
_TOKEN = re.compile(
    r"""(?P<quoted>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
    r"""|(?P<layer>\blayer\s*=\s*)?(?P<word>[\w.+-]+)(?P<name>\s*[(=])?"""
)


def method_text(method: pb.Method) -> str:
    """Return a method as text, with the options in force. `parse_method` reads it, unless an option is an array."""
    name = method.WhichOneof("method")
    if name is None:
        return ""
    options = ", ".join(f"{option}={value}" for option, value in _options(getattr(method, name)))
    return f"{name}({options})" if options else name


def parse_method(text: str) -> Method:
    """Parse a method. `InvalidArgument` names an unknown word and the closest known one."""
    try:
        node = ast.parse(_TOKEN.sub(_python, text.strip()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InvalidArgument(f"method: got {text!r}, expected something like integrated_gradients(steps=50)") from None
    method = _called(node, METHODS, "method")
    method.message()
    return method


def _options(message: Message) -> Iterator[tuple[str, str]]:
    match message:
        case pb.GradientMethod():
            yield "signed", str(message.magnitude == pb.MAGNITUDE_SIGNED)
            yield "times_input", str(message.times_input)
            yield "squared", str(message.magnitude == pb.MAGNITUDE_SQUARED)
        case pb.OcclusionMethod():
            yield "window", str((message.window_height, message.window_width))
            yield "stride", str((message.stride_height, message.stride_width))
            yield "baseline", baseline_text(message.baseline)
        case _:
            # A tolerance and a fixed count exclude each other: show the one in force.
            idle = ("samples", "steps") if getattr(message, "tolerance", 0) else ("tolerance",)
            yield from (
                (each.name, _text(message, each.name)) for each in message.DESCRIPTOR.fields if each.name not in idle
            )


def _text(message: Message, option: str) -> str:
    value = getattr(message, option)
    match option, value:
        case "statistic", _:
            return word(pb.SmoothGradMethod.Statistic, value)
        case "rule", _:
            return word(pb.PathRule, value)
        case "baselines", _:
            return "tensor" if message.HasField("baselines") else "None"
        case _, pb.Baseline():
            return baseline_text(value)
        case _, pb.Method():
            return method_text(value) or "gradient"
        case _, str():
            return value if _LAYER.fullmatch(value) else repr(value)
        case _:
            return repr(value)


def _python(token: _Token) -> str:
    """Convert a token to Python syntax: words and layer names become quoted strings."""
    bare = token["word"]
    if token["name"] or (bare and not token["layer"] and (bare in _CONSTANTS or _NUMBER.fullmatch(bare))):
        return token[0]
    # In parentheses: Python would concatenate two adjacent strings.
    return f"{token['layer'] or ''}({token['quoted'] or repr(bare)})"


def _called(node: ast.expr, known: dict[str, type[_Called]], field: str) -> _Called:
    """Return the method or baseline of a name or call expression."""
    match node:
        case ast.Constant(value=str(name)):
            keywords: list[ast.keyword] = []
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            pass
        case _:
            raise InvalidArgument(
                f"{field}: got {ast.unparse(node)}, expected a name with named options, one of {', '.join(known)}"
            )
    if name not in known:
        raise InvalidArgument(f"{field}: got {name!r}, expected one of {', '.join(known)}{did_you_mean(name, known)}")
    return known[name](**_given(name, keywords, [each.name for each in dataclasses.fields(known[name])], field))


def _given(name: str, keywords: list[ast.keyword], known: list[str], field: str) -> dict[str, Any]:
    """Return a call's options. `InvalidArgument` for one that is unknown or repeated."""
    options: dict[str, Any] = {}
    for keyword in keywords:
        option = keyword.arg or "**"
        if option not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise InvalidArgument(
                f"{field}: {name} got the option {option!r}, expected {expected}{did_you_mean(option, known)}"
            )
        if option in options:
            raise InvalidArgument(f"{field}: {name} got the option {option!r} twice, expected it once")
        options[option] = _value(keyword.value, option)
    return options


def _value(node: ast.expr, option: str) -> object:
    if option == "base":
        return _called(node, METHODS, "method.base")
    if option == "baseline" and isinstance(node, ast.Call):
        return _called(node, _BASELINES, f"method.{option}")
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise InvalidArgument(
            f"method.{option}: got {ast.unparse(node)}, expected a number, a word or a quoted string"
        ) from None
