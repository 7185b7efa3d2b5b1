"""Certificate and token files, read again once they change."""

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
    """What a reading of some files gave. It may be asked from any thread.

    Files that have changed and cannot be read, or not yet, leave what was: one line says so for each change. What they
    hold is never in a line or an error.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], _Content], *, name: str) -> None:
        """Read them. `ConfigurationError` is `read`'s, which raises nothing else."""
        self.name = name
        self.is_stale = False  # whether they have changed, and what was before stays for want of anything good
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._seen = self._fingerprint()
        self._content = read()

    @property
    def content(self) -> _Content:
        """What they hold now."""
        self.reread()
        return self._content

    def reread(self) -> _Content | None:
        """Return what they hold where that has changed since it was last asked for, else None."""
        with self._lock:
            now = self._fingerprint()  # before they are read: what is written meanwhile is a change of its own
            if now == self._seen:
                return None
            self._seen = now
            try:
                self._content = self._read()
            except ConfigurationError as error:
                self.is_stale = True
                said = f"the files have changed, the old ones stay: {error}"
                log.warning(Event(f"{self.name}_kept", message=said))
                return None
            self.is_stale = False
            log.info(Event(f"{self.name}_read", files=",".join(map(str, self._paths))))
            return self._content

    def _fingerprint(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_of(path) for path in self._paths)


def read_secret(path: Path, *, setting: str) -> bytes:
    """Return a file's bytes, and warn where every user of the machine may read them."""
    try:
        content = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigurationError(f"{setting}: cannot read {path}: {error.strerror}") from None
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        said = f"{setting}: {path} is open to every user; chmod o= closes it"
        log.warning(Event("readable_secret", message=said))
    return content


def _of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
