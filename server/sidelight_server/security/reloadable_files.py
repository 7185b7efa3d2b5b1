"""Certificate and token files that are read again when they change."""

import logging
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from ..errors import ConfigurationError
from ..telemetry.logs import Event

log = logging.getLogger("sidelight")

_Content = TypeVar("_Content")


class SecretFiles(Generic[_Content]):
    """The parsed content of some files, reloaded when they change. Thread-safe.

    If changed files cannot be read or are invalid, the old content stays and each change logs one line. The content of
    the files never appears in a log line or an error.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], _Content], *, name: str) -> None:
        """Read the files. Raises the `ConfigurationError` of `read`, which raises nothing else."""
        self.name = name
        self.is_stale = False  # whether the files have changed but are invalid, so that the old content stays
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._seen = self._fingerprint()
        self._content = read()

    @property
    def content(self) -> _Content:
        """The current content, after reading changed files."""
        self.reread()
        return self._content

    def reread(self) -> _Content | None:
        """Read the files if they have changed; return the new content, or None if it is unchanged or invalid."""
        with self._lock:
            now = self._fingerprint()  # taken before reading, so that a write in between counts as another change
            if now == self._seen:
                return None
            self._seen = now
            try:
                self._content = self._read()
            except ConfigurationError as error:
                self.is_stale = True
                message = f"the files have changed but are invalid, the old content stays: {error}"
                log.warning(Event(f"{self.name}_kept", message=message))
                return None
            self.is_stale = False
            log.info(Event(f"{self.name}_read", files=",".join(map(str, self._paths))))
            return self._content

    def _fingerprint(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_of(path) for path in self._paths)


def read_secret(path: Path, *, setting: str) -> bytes:
    """Return a file's bytes; log a warning if every user of the machine may read or write it."""
    try:
        content = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigurationError(f"{setting}: cannot read {path}: {error.strerror}") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        message = f"{setting}: {path} is open to every user of this machine; chmod o= closes it"
        log.warning(Event("readable_secret", message=message))
    return content


def _of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
