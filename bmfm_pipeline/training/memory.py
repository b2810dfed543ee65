"""How much memory this process may take, and the most that it took: on the host, or on its CUDA device."""

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

GB = 1e9
_PROC = Path("/proc")
_NO_LIMIT = 2**60  # control groups say "no limit" with numbers close to 2**63


class HostMemory:
    """The memory of this process on the host."""

    # The rest of a machine moves too, and a limit that is overstepped ends the process.
    share = 0.9

    def free(self) -> int:
        """Bytes that are free for this process, beside those it holds."""
        return min(_machine_free(), _group_free(), _address_space_free())

    def held(self) -> int:
        """Bytes that this process holds."""
        status = _status()
        return status["VmRSS"] if status else most_ever()

    def start(self) -> None:
        """Peaks are counted from here on."""
        gc.collect()
        give_back_to_system()
        with contextlib.suppress(OSError):
            (_PROC / "self" / "clear_refs").write_text("5")

    def peak(self) -> int:
        """The most bytes held since `start`; since the process began where a system cannot start counting anew."""
        status = _status()
        return status["VmHWM"] if status else most_ever()

    def allow(self, limit: float | None) -> None:
        """Nothing stops the host from giving more than `limit`; it is kept by predicting what would be taken."""


class CudaMemory:
    """The memory of this process on its current CUDA device."""

    share = 0.95  # of what is free: allocations leave gaps

    def free(self) -> int:
        import torch

        return torch.cuda.mem_get_info()[0]

    def held(self) -> int:
        import torch

        return torch.cuda.memory_reserved()

    def start(self) -> None:
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved()

    def allow(self, limit: float | None) -> None:
        """Let an allocation fail that would take this process beyond `limit` bytes; None takes the limit away."""
        import torch

        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(1.0, limit / total))


def most_ever() -> int:
    """The most bytes this process has held since it began."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_taken(accelerator: str) -> dict[str, float | str]:
    """The most memory this process took, in GB: on the host, and with a GPU on it too, with its name."""
    found: dict[str, float | str] = {"peak_memory_gb": round(HostMemory().peak() / GB, 3)}
    if accelerator == "gpu":
        import torch

        found |= {"peak_gpu_memory_gb": round(CudaMemory().peak() / GB, 3), "device": torch.cuda.get_device_name()}
    return found


def give_back_to_system() -> None:
    """Return what was freed but kept for later allocations; nothing where the C library cannot."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status() -> dict[str, int]:
    """Bytes by name of /proc/self/status; empty on systems without it."""
    try:
        lines = (_PROC / "self" / "status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs}


def _machine_free() -> int:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _group_free(root: Path = Path("/sys/fs/cgroup"), groups: Path = _PROC / "self" / "cgroup") -> int:
    """What the tightest control group around this process has left; pages of files count as free, as they can be dropped."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    left = _NO_LIMIT
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "memory":
            base, limit, usage, cached = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        elif controllers == "":
            base, limit, usage, cached = root, "memory.max", "memory.current", "inactive_file"
        else:
            continue
        folder = base / place.lstrip("/")
        for level in (folder, *folder.parents):  # a container may see its own group as the root
            if level.is_relative_to(base):
                left = min(left, _left_in(level, limit, usage, cached))
    return left


def _left_in(group: Path, limit: str, usage: str, cached: str) -> int:
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return _NO_LIMIT
    return most - used + int(counts.get(cached, 0)) if most < _NO_LIMIT else _NO_LIMIT


def _address_space_free() -> int:
    """What `ulimit -v` leaves."""
    try:
        import resource
    except ImportError:
        return _NO_LIMIT
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return _NO_LIMIT
    return max(0, most - _status().get("VmSize", 0))
