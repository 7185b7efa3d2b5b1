"""Errors of loading a model's source, in one line: setting, file, cause."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

from ...errors import ConfigurationError

MAX_CAUSE = 400  # characters: torch's messages list every mismatched tensor, or print programs


@contextlib.contextmanager
def source_errors(setting: str, path: Path | str) -> Iterator[None]:
    """Convert any exception in the context to `ConfigurationError`, with the setting and the source's path.

    Readers of files may raise anything.
    """
    try:
        yield
    except ConfigurationError as error:
        text = str(error)
        raise error if text.startswith(f"{setting}:") else ConfigurationError(f"{setting}: {path}: {text}") from None
    except FileNotFoundError:
        raise ConfigurationError(f"{setting}: {path} does not exist") from None
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code
        expected = "; expected what torch.save makes of a state_dict()" if setting == "weights" else ""
        raise ConfigurationError(
            f"{setting}: {path}: is broken, or holds other objects than tensors; code in a file is never run{expected}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{setting}: {path}: {_describe(error)}") from error


def cause(error: BaseException) -> str:
    """Return an error's message in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_CAUSE else text[:MAX_CAUSE] + "…"


def _describe(error: BaseException) -> str:
    text = cause(error)
    if not text or isinstance(error, KeyError):  # its message is only the missing key
        return f"{type(error).__name__} {text}".strip()
    return text


def only_file(kind: str, location: str, weights: Path | None) -> Path:
    """Return the path of a source that is one file. Raises `ConfigurationError` if it is none, or weights are set."""
    check_no_weights(kind, weights)
    path = Path(location)
    if not path.exists():
        raise ConfigurationError(f"model: {path} does not exist")
    if not path.is_file():
        raise ConfigurationError(f"model: {path}: is a folder, expected a file")
    return path


def check_no_weights(kind: str, weights: Path | None) -> None:
    """Raise `ConfigurationError` if weights are set for a source that has its own."""
    if weights is not None:
        raise ConfigurationError(f"weights: {weights}: {kind} brings its own; leave weights unset")
