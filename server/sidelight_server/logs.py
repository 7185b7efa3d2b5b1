"""The logs: each line an event with fields, as key=value or as JSON. A stream that takes no lines stops nothing."""

import json
import logging
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

# What others chose stands between quotes whatever it is, so that a line looks alike for all of them.
QUOTED = {"model", "models", "message", "call", "id", "error", "traceback"}
_MARKS = frozenset(' "=\\')

log = logging.getLogger("sidelight")


class Event:
    """What a line says: `log.info(Event("loaded", model=name))`. Values are text, numbers, or what has a `str`."""

    __slots__ = ("fields",)

    def __init__(self, event: str, /, **fields: object) -> None:
        self.fields: dict[str, object] = {"event": event} | fields

    def __str__(self) -> str:
        return in_words(self.fields)


def in_words(fields: dict[str, object]) -> str:
    """Return fields as key=value on one line. A text that is not one plain word is a JSON string."""
    return " ".join(f"{name}={_word(value, quoted=name in QUOTED)}" for name, value in fields.items())


def in_json(fields: dict[str, object]) -> str:
    """Return fields as a JSON object on one line, of ASCII alone: whatever a caller sent, any reader can take it."""
    return json.dumps({name: _plain(value) for name, value in fields.items()})


class Formatter(logging.Formatter):
    """Makes a line of a record: its time in UTC, its level, what it says, and the exception where there is one."""

    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._write = in_json if log_format == "json" else in_words

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said: Any = record.msg
        if isinstance(said, Event):
            fields = said.fields
        else:  # by a library
            fields = {"event": "log", "logger": record.name, "message": record.getMessage()}
        return self._write(
            {"time": f"{at}.{int(record.msecs):03}Z", "level": record.levelname} | fields | _failure(record)
        )


class Handler(logging.StreamHandler[TextIO]):
    """Writes lines. What cannot be written is lost, without a word: the stream that would have it is the one at fault.

    Its disk may be full, or its reader gone; requests go on, and so do the lines once it takes them again.
    """

    n_lost = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Count the line."""
        self.n_lost += 1


def configure(log_format: LogFormat = "text") -> None:
    """Write everything that is logged in this process to stderr, from INFO on; warnings and crashes too."""
    handler = Handler(sys.stderr)
    handler.setFormatter(Formatter(log_format))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    sys.excepthook = _crashed
    threading.excepthook = lambda args: _crashed(args.exc_type, args.exc_value, args.exc_traceback)


def _crashed(kind: type[BaseException], error: BaseException | None, at: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, SystemExit):
        log.critical(Event("crashed"), exc_info=(kind, error, at))


def _failure(record: logging.LogRecord) -> dict[str, object]:
    if not record.exc_info or record.exc_info[1] is None:
        return {}
    error = record.exc_info[1]
    said = "".join(traceback.format_exception_only(error)).strip()
    return {"error": said, "traceback": "".join(traceback.format_exception(*record.exc_info))}


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float | None) else str(value)


def _word(value: object, *, quoted: bool) -> str:
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case int():
            return str(value)
    text = str(value)
    if quoted or not text or not text.isprintable() or not _MARKS.isdisjoint(text):
        return json.dumps(text, ensure_ascii=not text.isprintable())
    return text
