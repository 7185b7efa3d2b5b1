"""Errors of loading: what is wrong with a model's source, in one line: setting, file, cause."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

from ...errors import ConfigurationError

MAX_CAUSE = 400  # characters: torch lists every tensor that does not fit, and prints programs


@contextlib.contextmanager
def refusing(setting: str, path: Path | str) -> Iterator[None]:
    """Turn what is raised while a file is read into `ConfigurationError`. No reader promises what it raises."""
    try:
        yield
    except ConfigurationError as error:
        said = str(error)
        raise error if said.startswith(f"{setting}:") else ConfigurationError(f"{setting}: {path}: {said}") from None
    except FileNotFoundError:
        raise ConfigurationError(f"{setting}: {path} is not there") from None
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code
        expected = "; expected what torch.save makes of a state_dict()" if setting == "weights" else ""
        raise ConfigurationError(
            f"{setting}: {path}: is broken, or holds more than tensors, and code in a file is never run{expected}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"{setting}: {path}: {_named(error)}") from error


def cause(error: BaseException) -> str:
    """Return what an error says, in one line."""
    said = " ".join(str(error).split())
    return said if len(said) <= MAX_CAUSE else said[:MAX_CAUSE] + "…"


def _named(error: BaseException) -> str:
    said = cause(error)
    if not said or isinstance(error, KeyError):  # which says no more than what was looked for
        return f"{type(error).__name__} {said}".strip()
    return said


def require_file(setting: str, path: Path) -> None:
    """Refuse a path where no file is."""
    if not path.exists():
        raise ConfigurationError(f"{setting}: {path} is not there")
    if not path.is_file():
        raise ConfigurationError(f"{setting}: {path}: is a folder, expected a file")


def refuse_weights(kind: str, weights: Path | None) -> None:
    """Refuse weights beside a source that holds its own."""
    if weights is not None:
        raise ConfigurationError(f"weights: {weights}: {kind} brings its own; leave weights unset")
