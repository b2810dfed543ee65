"""What the steps of a stage cost: wall time, time of the processors, the most memory, and on what machine."""

import contextlib
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bmfm_pipeline.stages.jobs import STEPS, Job
from bmfm_pipeline.storage import read_json, write_json_atomic

SAMPLE_SECONDS = 0.05
LIBRARIES = (
    "bmfm_pipeline",
    "torch",
    "transformers",
    "pytorch-lightning",
    "numpy",
    "scipy",
    "scikit-learn",
    "anndata",
    "scanpy",
)


@contextlib.contextmanager
def measured(job: Job, step: str) -> Iterator[None]:
    """Record the cost of a step beside its result; what an attempt cost that failed or was stopped is added to the next one's."""
    started, used, sampler = time.perf_counter(), _processor_seconds(), _Sampler()
    children = _peak("children")
    try:
        with sampler:
            yield
    finally:
        after = _peak("children")
        here = {
            "seconds": time.perf_counter() - started,
            "processor_seconds": _processor_seconds() - used,
            # Of child processes only the largest so far is known: one that was smaller than an earlier step's is not seen.
            "peak_bytes": max(sampler.peak, after if after > children else 0),
            "attempts": 1,
        }
        if job.run_dir.exists():
            with contextlib.suppress(OSError):  # a full disk is reported by the step itself
                write_json_atomic(_file(job, step), _sum(_read(job, step), here))


def cost_of(job: Job, until: str | None = None) -> dict[str, Any]:
    """{"steps": [{step, seconds, processor_seconds, peak_bytes, attempts}], "machine", "versions"} of what has run so far."""
    steps = STEPS[job.stage]
    found = [(step, _read(job, step)) for step in (steps[: steps.index(until)] if until else steps)]
    rows = [{"step": step, **_rounded(entry)} for step, entry in found if entry]
    return {"steps": rows, "machine": machine(), "versions": versions()}


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory and system, without any name of the machine."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    from bmfm_pipeline import __version__

    found = {"python": platform.python_version(), "bmfm_pipeline": __version__}
    for name in LIBRARIES[1:]:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class _Sampler:
    """The most memory this process holds while inside, without counting anew for everybody else in it."""

    def __init__(self):
        self.peak, self._before = 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory")

    def __enter__(self):
        self._before = _peak("self")
        self.peak = _held()
        self._thread.start()

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        ever = _peak("self")
        self.peak = max(self.peak, _held(), ever if ever > self._before else 0)

    def _watch(self):
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, _held())


def _peak(whose: str) -> int:
    """The most bytes that this process, or any child of it that has ended, has ever held."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF if whose == "self" else resource.RUSAGE_CHILDREN).ru_maxrss * unit


def _held() -> int:
    """Bytes that this process holds now; 0 on systems without /proc."""
    try:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _processor_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _file(job: Job, step: str) -> Path:
    return job.run_dir / "costs" / f"{step}.json"


def _read(job: Job, step: str) -> dict[str, Any]:
    file = _file(job, step)
    return read_json(file) if file.exists() else {}


def _sum(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    if not before:
        return now
    peak = max(before["peak_bytes"], now["peak_bytes"])
    return {**{name: before[name] + now[name] for name in now}, "peak_bytes": peak}


def _rounded(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in entry.items()}
