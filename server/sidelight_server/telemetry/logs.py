"""Structured logs: each line is an event with fields, as key=value or JSON."""

import json
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

# Fields with text from outside are always quoted, so that their lines have one format.
QUOTED = {"model", "models", "message", "call", "id", "error", "traceback"}
_MARKS = frozenset(' "=\\')

# Limits of one line: an exception's message may contain tensors, and its traceback may be of a recursion.
MAX_TEXT, MAX_TRACEBACK = 4_000, 16_000

EVERY_S, TRACEBACK_EVERY_S = 1.0, 60.0  # least interval of lines that callers can cause, and of their tracebacks
MAX_KINDS = 256

log = logging.getLogger("sidelight")


class Event:
    """The event of a log line: `log.info(Event("loaded", model=name))`. Values are converted by `str`."""

    __slots__ = ("fields",)

    def __init__(self, event: str, /, **fields: object) -> None:
        self.fields: dict[str, object] = {"event": event} | fields

    def __str__(self) -> str:
        return as_text(self.fields)


def as_text(fields: dict[str, object]) -> str:
    """Return fields as key=value on one line. Text that is not one plain word becomes a JSON string."""
    return " ".join(f"{name}={_word(value, quoted=name in QUOTED)}" for name, value in fields.items())


def as_json(fields: dict[str, object]) -> str:
    """Return fields as a JSON object on one line, in ASCII, so that text from callers cannot break a reader."""
    return json.dumps({name: _plain(value) for name, value in fields.items()})


class Throttle:
    """Logs events that callers can cause any number of times: per kind one line a second, one traceback a minute.

    A kind is an event name with its model, the type of the error, and whether it concerns one example. The next line of
    a kind has the number of omitted lines in `left_out`. Thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def log(self, level: int, event: Event, error: BaseException | None = None) -> None:
        """Log an event with its error, if any, unless one of its kind was just logged."""
        now_s = self._clock()
        name = (event.fields["event"], event.fields.get("model"), "example" in event.fields, type(error).__name__)
        with self._lock:
            if name not in self._kinds and len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            kind = self._kinds.setdefault(name, _Kind())
            if now_s - kind.written_s < EVERY_S:
                kind.left_out += 1
                return
            left_out, kind.left_out, kind.written_s = kind.left_out, 0, now_s
            has_traceback = now_s - kind.traced_s >= TRACEBACK_EVERY_S
            if has_traceback:
                kind.traced_s = now_s
        if left_out:
            event.fields["left_out"] = left_out
        if error is not None and not has_traceback:
            event.fields["error"] = _cut(_last_line(error), MAX_TEXT)
        log.log(level, event, exc_info=error if has_traceback else None)


@dataclass(slots=True)
class _Kind:
    """The times of the last line and of the last traceback of a kind, and the number of omitted lines."""

    written_s: float = -math.inf
    traced_s: float = -math.inf
    left_out: int = 0


class Formatter(logging.Formatter):
    """Formats a record: its time in UTC, its level, the event's fields, and the exception if there is one."""

    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._write = as_json if log_format == "json" else as_text

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event: Any = record.msg
        if isinstance(event, Event):
            fields = event.fields
        else:  # logged by a library
            fields = {"event": "log", "logger": record.name, "message": record.getMessage()}
        return self._write(
            {"time": f"{at}.{int(record.msecs):03}Z", "level": record.levelname} | fields | _failure(record)
        )


class Handler(logging.StreamHandler[TextIO]):
    """Writes lines to a stream; lines that cannot be written are dropped and counted in `n_lost`.

    The disk may be full or the reader may have exited; requests continue, and so does the log once writes succeed.
    """

    n_lost = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self.n_lost += 1


def configure(log_format: LogFormat = "text") -> None:
    """Log everything in this process to stderr from INFO up, including warnings and uncaught exceptions."""
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
    text = "".join(traceback.format_exception(*record.exc_info))
    return {"error": _cut(_last_line(error), MAX_TEXT), "traceback": _cut(text, MAX_TRACEBACK)}


def _last_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _cut(text: str, limit: int) -> str:
    """Shorten a long text in its middle: the cause of an error is at the end."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


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
