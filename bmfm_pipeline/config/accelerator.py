"""Is there an accelerator, and what to do when a config asks for one that is not there. Imports no torch."""

import ctypes
import functools
from importlib.metadata import PackageNotFoundError, version

from bmfm_pipeline.config.tasks import TaskConfig
from bmfm_pipeline.errors import ConfigError


@functools.cache
def find_accelerator() -> str | None:
    """'gpu' when an NVIDIA device is visible and the installed torch can use it, else None. Costs a millisecond."""
    try:
        if version("torch").endswith("+cpu"):
            return None
        driver = ctypes.CDLL("libcuda.so.1")
    except (PackageNotFoundError, OSError):
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None
    return "gpu" if count.value > 0 else None


def settle_execution(task: TaskConfig, accelerator: str | None) -> tuple[TaskConfig, list[str]]:
    """The task with an accelerator and precision that this machine has, and one note for each thing that had to change.

    `auto` precision is 16-mixed on a GPU (bf16-mixed with strategy fsdp) and 32-true elsewhere. Raises ConfigError when task.require_accelerator is set in vain.
    """
    notes: list[str] = []
    changes: dict[str, object] = {}
    asked = "gpu" if task.accelerator == "cuda" else task.accelerator
    if task.require_accelerator:
        if accelerator is None:
            raise ConfigError("task.require_accelerator is true, but no GPU is usable here; unset it to run on the CPU")
        if asked == "cpu":
            raise ConfigError("task.require_accelerator is true, but task.accelerator is cpu; set it to gpu or auto")
    if accelerator is None and asked == "gpu":
        notes.append(f"task.accelerator is {task.accelerator}, but NO GPU IS USABLE here: running on the CPU")
    chosen = (accelerator or "cpu") if asked in ("auto", "gpu") else asked
    if chosen != task.accelerator:
        changes["accelerator"] = chosen
    if task.precision == "auto":
        mixed = "bf16-mixed" if task.strategy == "fsdp" else "16-mixed"  # sharded gradients have no scaler
        changes["precision"] = mixed if chosen == "gpu" else "32-true"
    elif chosen == "cpu" and task.precision in ("16-mixed", "16-true"):
        notes.append(f"task.precision is {task.precision}, which needs a GPU: using 32-true")
        changes["precision"] = "32-true"
    elif chosen == "mps" and task.precision == "64-true":
        notes.append("task.precision is 64-true, which MPS devices do not have: using 32-true")
        changes["precision"] = "32-true"
    return task.model_copy(update=changes), notes
