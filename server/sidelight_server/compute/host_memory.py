"""Host memory: how much is available, and how much freed memory the C library keeps."""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")

# The options of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 1 << 30
_LARGEST_BYTES = 32 << 20  # glibc's maximum

_UNLIMITED = 1 << 60  # bytes; cgroup v1 reports 2⁶³, rounded to pages, for no limit


def keep_freed() -> None:
    """Make glibc keep freed memory instead of returning it to the system between chunks.

    Otherwise the activations of every chunk are mapped anew, and each first access to a page is a page fault: 1,400 for
    one ResNet-18 row at 224², about 2 ms of its 60. Does nothing with another C library.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def trim() -> None:
    """Return freed memory that glibc keeps to the system. Takes about 0.1 ms per MiB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """Bytes that this process can still allocate, and the limit of its cgroup or of the machine."""

    left: int
    limit: int


def available_memory(proc: Path = PROC, groups: Path = GROUPS) -> AvailableMemory | None:
    """Return the available memory: the least of the process's cgroups and the machine; None if unknown.

    Reclaimable page cache counts as available.
    """
    return min([*_of_groups(proc, groups), *_of_machine(proc)], key=lambda each: each.left, default=None)


def limit_bytes() -> int | None:
    """Return the least limit of the process's cgroups and the machine; None if unknown."""
    return min((each.limit for each in (*_of_groups(PROC, GROUPS), *_of_machine(PROC))), default=None)


def _of_groups(proc: Path, groups: Path) -> Iterator[AvailableMemory]:
    """Yield the available memory of each cgroup with a limit: the process's own and its ancestors."""
    with contextlib.suppress(OSError):
        for limit, usage, stat, reclaimable in _find_limits(_read(f"{proc}/self/cgroup"), str(groups)):
            with contextlib.suppress(OSError, ValueError):  # the cgroup or its limit was removed
                n_bytes = int(_read(limit))
                yield AvailableMemory(n_bytes - int(_read(usage)) + _value(_read(stat), reclaimable), n_bytes)


@functools.lru_cache(maxsize=1)
def _find_limits(memberships: str, groups: str) -> list[tuple[str, str, str, str]]:
    """Return the cgroups that have a limit: their files of limit, usage and statistics, and the reclaimable key.

    Cached per membership: most cgroups have no limit, and checking one takes 20 µs.
    """
    found = []
    for membership in memberships.splitlines():
        _, controllers, path = membership.split(":", 2)
        if not controllers:
            folder, limit, usage, reclaimable = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit, usage = f"{groups}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        # In a container its own cgroup may be mounted as the root, whatever the path says.
        inner = Path(folder, path.lstrip("/"))
        for group in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                if int(_read(f"{group}/{limit}")) < _UNLIMITED:
                    found.append((f"{group}/{limit}", f"{group}/{usage}", f"{group}/memory.stat", reclaimable))
            if group == Path(folder):
                break
    return found


def _of_machine(proc: Path) -> Iterator[AvailableMemory]:
    with contextlib.suppress(OSError, ValueError):
        meminfo = _read(f"{proc}/meminfo")
        yield AvailableMemory(_value(meminfo, "MemAvailable:") * 1024, _value(meminfo, "MemTotal:") * 1024)


def _value(table: str, name: str) -> int:
    """Return the number after a name at the start of a line. Raises `ValueError` if there is none."""
    return int(f"\n{table}".partition(f"\n{name} ")[2].lstrip().partition("\n")[0].removesuffix(" kB"))


def _read(path: str) -> str:
    """Read a small file, in a third of the time of `Path.read_text`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 1 << 16).decode()
    finally:
        os.close(descriptor)


def resident_bytes() -> int:
    """Return the resident set size of this process in bytes; 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
