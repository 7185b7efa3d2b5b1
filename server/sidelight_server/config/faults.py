"""Messages for invalid settings and specs, in one line."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError

from .model_settings import ModelSettings


def first_fault(error: ValidationError, *, known: Iterable[str], where: str) -> str:
    """Return the message for the first validation error. `known` are the valid fields, `where` names their source."""
    wrong = error.errors()[0]
    path = [str(each) for each in wrong["loc"]]
    is_of_model = path[:1] == ["models"] and len(path) > 2  # models, its name, a setting
    name = ".".join(path[:3]) if is_of_model else path[0] if path else "settings"
    if wrong["type"] == "extra_forbidden":
        known = ModelSettings.model_fields if is_of_model else known
        close = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
        return f"{name}: there is no such setting in {where}" + (f"; did you mean {close[0]}?" if close else "")
    why = "too few numbers" if wrong["type"] == "missing" and len(path) > 1 else wrong["msg"]
    return f"{name}: got {wrong['input']!r}: {why}"
