"""Who holds a run folder: a process named in its lease, and whether that process still lives."""

import os
import socket
import time
from pathlib import Path
from typing import Any

EXPIRES_AFTER = 120.0  # seconds without renewal, for a holder on another machine


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from a later one with the same number, as containers hand out again and again."""
    return {"pid": pid, "host": socket.gethostname(), "boot": _boot(), "started": _start_time(pid)}


def is_alive(holder: dict[str, Any], file: Path) -> bool:
    """Whether the process that a lease names runs; one on another machine is believed while its lease `file` is renewed."""
    if holder.get("host") != socket.gethostname():
        return time.time() - file.stat().st_mtime < EXPIRES_AFTER
    pid = int(holder["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = identity(pid)
    return not _zombie(pid) and all(holder.get(name) in (None, now[name]) for name in ("boot", "started"))


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _status(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; none where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def _start_time(pid: int) -> str | None:
    fields = _status(pid)
    return fields[19] if len(fields) > 19 else None


def _zombie(pid: int) -> bool:
    return _status(pid)[:1] == ["Z"]
