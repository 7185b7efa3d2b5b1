"""A cgroup with a memory limit."""

import contextlib
import os
from pathlib import Path

ROOTS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # of cgroup v1 and v2


class MemoryGroup:
    """A cgroup whose processes may use `limit_bytes` together. Without the permission to create one, `path` is None."""

    def __init__(self, limit_bytes: int) -> None:
        self.path: Path | None = None
        for root in ROOTS:
            path = root / f"sidelight-{os.getpid()}"
            with contextlib.suppress(OSError):
                path.mkdir()
                for name in ("memory.limit_in_bytes", "memory.max"):
                    with contextlib.suppress(OSError):
                        (path / name).write_text(str(limit_bytes))
                        self.path = path
                        return
                path.rmdir()

    def take(self, pid: int) -> None:
        """Add a process, and all processes that it starts from now on. Memory that it already has is not counted."""
        if self.path:
            (self.path / "cgroup.procs").write_text(str(pid))

    def peak(self) -> int:
        """Return the peak use in bytes; 0 if unknown."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with contextlib.suppress(OSError):
                return int((self.path / name).read_text()) if self.path else 0
        return 0

    def close(self) -> None:
        """Remove the cgroup. Its processes must have ended."""
        if self.path:
            with contextlib.suppress(OSError):
                self.path.rmdir()
