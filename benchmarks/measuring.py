"""What all benchmarks share: the hardware in words, and a command's time and memory, its children included."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def hardware() -> str:
    """Processor name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def measured(command: list[str], **environment: str) -> dict[str, Any]:
    """Run a command to its end: wall and CPU seconds, peak memory of its largest process in MB, standard output.

    Raises RuntimeError with its last lines when it fails.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
    return {
        "wall_s": round(time.perf_counter() - began, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_mb": usage.ru_maxrss // 1024,
        "output": output,
    }


def bmfm(*words: str) -> list[str]:
    """The command line of this environment."""
    return [str(Path(sys.executable).parent / "bmfm"), *words]
