"""The machine: processors, memory, limits of the process, accelerator and its driver."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bmfm_pipeline.commands.checkup.findings import FAIL, OK, WARN, Finding
from bmfm_pipeline.config import find_accelerator

GIB = 2**30
LITTLE_MEMORY, TOO_LITTLE_MEMORY = 4 * GIB, 1 * GIB
FEW_FILES, TOO_FEW_FILES = 1024, 256
LITTLE_SHARED = 256 * 2**20
DRIVER_SECONDS = 20
CGROUP = Path("/sys/fs/cgroup")


def check() -> Iterator[Finding]:
    yield _cores()
    yield _memory()
    yield _open_files()
    yield from _file_size()
    yield from _shared_memory()
    yield from _accelerator()


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    quota = _quota()
    if quota is not None and quota < cores * 0.9 and not os.environ.get("OMP_NUM_THREADS"):
        return Finding(
            "cores", WARN, f"{cores} are seen, but this container may use {quota:g}: threads would wait for each other",
            f"export OMP_NUM_THREADS={max(1, round(quota))}",
        )  # fmt: skip
    return Finding("cores", OK, str(cores) + (f", of which {quota:g} may be used" if quota is not None else ""))


def _quota() -> float | None:
    """How many processors the container may use at once; None without a limit."""
    try:
        share, period = (CGROUP / "cpu.max").read_text().split()
        return None if share == "max" else int(share) / int(period)
    except (OSError, ValueError):
        return None


def _memory() -> Finding:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    said = ""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max" and int(limit) < total:
            used = int((CGROUP / "memory.current").read_text())
            total, free, said = int(limit), min(free, int(limit) - used), " (limit of the container)"
    except (OSError, ValueError):
        pass
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}{said}"
    mend = "end other programs, or use a smaller preset and batch (docs/memory.md)"
    if free < LITTLE_MEMORY:
        return Finding("memory", FAIL if free < TOO_LITTLE_MEMORY else WARN, found, mend)
    return Finding("memory", OK, found)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "without limit" if hard == resource.RLIM_INFINITY else f"{hard}"
    found = f"{'without limit' if soft == resource.RLIM_INFINITY else soft} may be open at once (up to {most})"
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        return Finding("open files", OK, found)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    more = f"`ulimit -n {wanted}` before bmfm" if wanted > soft else "raise nofile in /etc/security/limits.conf"
    return Finding("open files", FAIL if soft < TOO_FEW_FILES else WARN, found, more)


def _file_size() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY:
        yield Finding(
            "size of files", WARN, f"a file may have {soft / GIB:.2g} GiB at most: checkpoints and data may be larger",
            "`ulimit -f unlimited` before bmfm",
        )  # fmt: skip


def _shared_memory() -> Iterator[Finding]:
    """Data workers hand batches over through /dev/shm, of which containers get 64 MiB."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return
    found = f"{free / GIB:.2g} GiB free in /dev/shm"
    if free < LITTLE_SHARED:
        mend = "give the container --shm-size=1g, or set data_module.num_workers=0"
        yield Finding("shared memory", WARN, found, mend)
    else:
        yield Finding("shared memory", OK, found)


def _accelerator() -> Iterator[Finding]:
    devices, trouble = _nvidia()
    usable = find_accelerator()
    if devices and usable:
        yield Finding("accelerator", OK, "; ".join(devices))
    elif devices:
        yield Finding(
            "accelerator", FAIL, f"{'; '.join(devices)}, which the installed torch cannot use: trainings would run on the CPU",
            "install torch's build for CUDA; the one of PyPI asks for driver 580 or later (docs/operations.md)",
        )  # fmt: skip
    elif trouble:
        yield Finding(
            "accelerator", FAIL, trouble, "mend the driver of the GPU: reboot after an update, and see `nvidia-smi`"
        )
    elif usable:
        yield Finding("accelerator", OK, usable)
    else:
        yield Finding("accelerator", OK, "none: the laptop preset is used where no sizes are written")


def _nvidia() -> tuple[list[str], str]:
    """(each GPU with memory and driver, what nvidia-smi complains about); nothing where there is no NVIDIA driver at all."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        there = Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()
        return [], "an NVIDIA driver is loaded, but nvidia-smi is missing" if there and not find_accelerator() else ""
    asked = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error}"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        said = (done.stderr or done.stdout).strip().splitlines()
        return [], f"nvidia-smi: {said[0] if said else f'ended with code {done.returncode}'}"
    found = []
    for line in lines:
        name, memory, driver = [*line.split(", "), "", ""][:3]
        found.append(f"{name}, {memory}, driver {driver}")
    return found, ""
