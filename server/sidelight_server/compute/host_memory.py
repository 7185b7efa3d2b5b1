"""Host memory: how much of it is left, and what the C library keeps of freed memory."""

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
_LARGEST_BYTES = 32 << 20  # glibc takes no more

_UNLIMITED = 1 << 60  # bytes; version 1 of control groups says 2⁶³, rounded to pages, where there is no limit


def keep_freed() -> None:
    """Let this process keep freed memory instead of giving it back to the system between chunks.

    A thread's activations are otherwise mapped anew for every chunk, and each first touch of a page is a fault: 1,400
    of them in one ResNet-18 row at 224², about 2 ms of its 60. Does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Give the system what is kept of freed memory. It takes about 0.1 ms for each MiB that there is to give."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True, slots=True)
class Room:
    """How many bytes this process may still take, of all that its control group, or the machine, has."""

    left: int
    limit: int


def room(proc: Path = PROC, groups: Path = GROUPS) -> Room | None:
    """Return the memory that is left: the least of what the process's control groups and the machine have.

    None where nothing says so. Files that were read and can be dropped count as left.
    """
    return min([*_of_groups(proc, groups), *_of_machine(proc)], key=lambda each: each.left, default=None)


def _of_groups(proc: Path, groups: Path) -> Iterator[Room]:
    """Yield what is left of each control group with a limit: the process's own, and those around it."""
    with contextlib.suppress(OSError):
        for limit, usage, stat, reclaimable in _limited(_read(f"{proc}/self/cgroup"), str(groups)):
            with contextlib.suppress(OSError, ValueError):  # gone, or its limit is
                n_bytes = int(_read(limit))
                yield Room(n_bytes - int(_read(usage)) + _value(_read(stat), reclaimable), n_bytes)


@functools.lru_cache(maxsize=1)
def _limited(memberships: str, groups: str) -> list[tuple[str, str, str, str]]:
    """Return the groups that have a limit: files of limit, usage and figures, and the figure of what can be dropped.

    It is asked once for each place that the process is put: most groups have none, and looking for it takes 20 µs each.
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
        # A container may see its own group as the root, whatever the path says.
        inner = Path(folder, path.lstrip("/"))
        for group in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                if int(_read(f"{group}/{limit}")) < _UNLIMITED:
                    found.append((f"{group}/{limit}", f"{group}/{usage}", f"{group}/memory.stat", reclaimable))
            if group == Path(folder):
                break
    return found


def _of_machine(proc: Path) -> Iterator[Room]:
    with contextlib.suppress(OSError, ValueError):
        told = _read(f"{proc}/meminfo")
        yield Room(_value(told, "MemAvailable:") * 1024, _value(told, "MemTotal:") * 1024)


def _value(table: str, name: str) -> int:
    """Return the number behind a name at the start of a line. `ValueError` where there is none."""
    return int(f"\n{table}".partition(f"\n{name} ")[2].lstrip().partition("\n")[0].removesuffix(" kB"))


def _read(path: str) -> str:
    """Return what a small file holds, in a third of the time that `Path.read_text` takes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 1 << 16).decode()
    finally:
        os.close(descriptor)


def resident_bytes() -> int:
    """Return the bytes of memory that this process has; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
