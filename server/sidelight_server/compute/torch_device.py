"""Devices: which one to use, how many CPU threads this process may use, and how much memory is free."""

import math
import os
from pathlib import Path

import torch

from ..errors import ConfigurationError
from .host_memory import room

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
SHARE_OF_FREE_MEMORY = 0.5

# What is said by those that have no exception of their own: the CPU's allocator, CUDA, its libraries, and Python where
# there is none for a thread.
_OUT_OF_MEMORY = (
    "can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED", "can't start new thread",
)  # fmt: skip


def choose_devices(wanted: str) -> tuple[torch.device, ...]:
    """Return the devices that a list with commas names, as `choose_device` does each. A GPU may be named once."""
    devices = tuple(choose_device(each.strip()) for each in wanted.split(","))
    for device in devices:
        if device.type != "cpu" and devices.count(device) > 1:
            raise ConfigurationError(f'device: got "{wanted}", which names {device} twice')
    return devices


def choose_device(wanted: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda", "cuda:N" or "mps". `ConfigurationError` where there is none such."""
    if wanted == "auto":
        wanted = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ConfigurationError(f'device: got "{wanted}", expected auto, cpu, cuda:N or mps')
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigurationError(f'device: got "{wanted}", but torch sees {count} CUDA devices')
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigurationError('device: got "mps", but torch sees no such device')
    return torch.device(device.type)


def make_deterministic(device: torch.device) -> None:
    """Let a GPU run only algorithms that give the same bytes each time, for all of this process. A CPU always does."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def check_works(device: torch.device) -> None:
    """Compute something tiny on a device, and wait for it. Raises what torch raises where that cannot be done."""
    torch.zeros(1, device=device).add_(1).cpu()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory lacks, the device's or the host's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(each in str(error) for each in _OUT_OF_MEMORY)


def cpu_quota() -> int:
    """Return how many CPUs this process may keep busy: its affinity, and within that its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.floor(int(quota) / int(period))))


def free_memory(device: torch.device) -> int:
    """Return how many bytes a chunk may take: half of what is free where the device is. Without a way to know, all."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return int((torch.cuda.mem_get_info(device)[0] + kept) * SHARE_OF_FREE_MEMORY)
    left = room()
    return int((left.left if left else 1 << 62) * SHARE_OF_FREE_MEMORY)
