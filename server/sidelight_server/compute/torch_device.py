"""Torch devices: choosing them, the CPU quota of this process, and free memory."""

import math
import os
from pathlib import Path

import torch

from ..errors import ConfigurationError
from .host_memory import available_memory

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
SHARE_OF_FREE_MEMORY = 0.5

# Messages of out-of-memory errors without an exception type of their own: of the CPU allocator, CUDA, CUDA libraries,
# and Python's thread start.
_OUT_OF_MEMORY = (
    "can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED", "can't start new thread",
)  # fmt: skip


def choose_devices(wanted: str) -> tuple[torch.device, ...]:
    """Return the devices of a comma-separated list. Raises `ConfigurationError`, also for a GPU named twice."""
    devices = tuple(choose_device(each.strip()) for each in wanted.split(","))
    for device in devices:
        if device.type != "cpu" and devices.count(device) > 1:
            raise ConfigurationError(f'device: got "{wanted}", which names {device} twice')
    return devices


def choose_device(wanted: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda", "cuda:N" or "mps". Raises `ConfigurationError`."""
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
    """Restrict a GPU to deterministic algorithms, for the whole process. CPU algorithms are deterministic anyway."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialized
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def check_works(device: torch.device) -> None:
    """Run a tiny computation on a device and wait for it. Raises what torch raises if the device fails."""
    torch.zeros(1, device=device).add_(1).cpu()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports a lack of memory, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(each in str(error) for each in _OUT_OF_MEMORY)


def cpu_quota() -> int:
    """Return the number of CPUs that this process may use, by its affinity and its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, math.floor(int(quota) / int(period))))


def free_memory(device: torch.device) -> int:
    """Return how many bytes a chunk may take: half of the device's free memory, or unlimited if unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by torch's allocator
        return int((torch.cuda.mem_get_info(device)[0] + kept) * SHARE_OF_FREE_MEMORY)
    left = available_memory()
    return int((left.left if left else 1 << 62) * SHARE_OF_FREE_MEMORY)
