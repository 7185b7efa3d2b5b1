"""Arguments: parses command-line text as pictures, methods and targets. Invalid text is a usage error."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import typer

from .._inputs.targets import Choice, Contrast, Dense, Region, Target, TopK
from .._inputs.tensors import Array
from ..exceptions import InvalidArgument, SidelightError
from ..methods.gradient import Gradient
from ..methods.method import Method
from ..methods.parsing import METHODS, parse_method
from ..methods.path import ExpectedGradients, IntegratedGradients, SmoothGrad
from ..methods.perturbation import Occlusion

REGION = "TOP,LEFT,HEIGHT,WIDTH"
PICTURES = (".bmp", ".dcm", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def pictures_of(paths: Sequence[Path]) -> list[Path]:
    """Replace each folder by its pictures, sorted by name. Subfolders are not searched.

    A missing file fails alone, when it is read; if all are missing, that is a usage error.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(each for each in path.iterdir() if each.suffix.lower() in PICTURES and each.is_file())
        if not found:
            raise typer.BadParameter(f"the folder {path} has no pictures ({', '.join(PICTURES)})", param_hint="IMAGES")
        files.extend(found)
    if files and not any(each.exists() for each in files):
        missing = ", ".join(map(str, files))
        raise typer.BadParameter(f"no such file: {missing}", param_hint="IMAGES")
    return files


def method_of(text: str, options: Sequence[str] | None, *, signed: bool, times_input: bool) -> Method:
    """Return the method of --method, --option, --signed and --times-input."""
    if options:
        text = _with_options(text, options)
    try:
        method = parse_method(text)
    except SidelightError as error:
        raise typer.BadParameter(error.message, param_hint="--method") from None
    if not (signed or times_input):
        return method
    if text.strip() != "gradient":
        raise typer.BadParameter("--signed and --times-input are options only of gradient", param_hint="--method")
    return Gradient(signed=signed, times_input=times_input)


def _with_options(name: str, options: Sequence[str]) -> str:
    if not name.isidentifier():
        raise typer.BadParameter(f"got {name!r} together with --option, expected only a name", param_hint="--method")
    for each in options:
        option, _, value = each.partition("=")
        if not option.isidentifier() or not value:
            raise typer.BadParameter(f"got {each!r}, expected NAME=VALUE", param_hint="--option")
    return f"{name}({', '.join(options)})"


def method_names(incomplete: str) -> list[str]:
    """Return the methods with this prefix, for shell completion."""
    return [name for name in METHODS if name.startswith(incomplete)]


def from_baseline(method: Method, array: Array) -> Method:
    """Return the method with an array as its baseline."""
    match method:
        case IntegratedGradients() | Occlusion():
            return dataclasses.replace(method, baseline=array)
        case ExpectedGradients():
            return dataclasses.replace(method, baselines=array)
        case SmoothGrad(base=IntegratedGradients() as base):
            return dataclasses.replace(method, base=dataclasses.replace(base, baseline=array))
        case _:
            raise InvalidArgument(f"--baseline: {type(method).__name__} has no baseline")


def target_of(text: str | None, *, against: str | None, region: str | None, top_k: int | None) -> Target:
    """Return the target of --target, --against, --region and --top-k."""
    beside = [name for name, each in (("--against", against), ("--region", region)) if each is not None]
    if top_k is not None:
        if text is not None or beside:
            raise typer.BadParameter("expected only without --target, --against and --region", param_hint="--top-k")
        return TopK(top_k)
    if text is None and beside:
        raise typer.BadParameter("expected only with --target", param_hint=beside[0])
    if len(beside) == 2:
        raise typer.BadParameter("expected only without --region", param_hint="--against")
    if text is not None and against is not None:
        return Contrast(_choice(text), _choice(against))
    if text is not None and region is not None:
        return Dense(_choice(text), _region(region))
    return None if text is None else _choice(text)


def _choice(text: str) -> Choice:
    """Return a class index if the text is a number, else a label."""
    return int(text) if re.fullmatch("-?[0-9]+", text) else text


def _region(text: str) -> Region:
    if not re.fullmatch("[0-9]+(,[0-9]+){3}", text):
        raise typer.BadParameter(f"got {text!r}, expected {REGION}", param_hint="--region")
    top, left, height, width = map(int, text.split(","))
    return top, left, height, width
