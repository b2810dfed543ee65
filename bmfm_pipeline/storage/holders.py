"""Who holds a run folder: a process named in its lease, and whether that process still lives."""

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

EXPIRES_AFTER = 120.0  # seconds without renewal, for a holder on another machine


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from a later one with the same number, as containers hand out again and again."""
    return {"pid": pid, "host": socket.gethostname(), "boot": _boot(), "started": _start_time(pid)}


def is_alive(holder: dict[str, Any], file: Path) -> bool:
    """Whether the process that a lease names runs; one on another machine is believed while its lease `file` is renewed."""
    here = lives_here(holder)
    return silence(file) < EXPIRES_AFTER if here is None else here


def silence(file: Path) -> float:
    """Seconds since `file` was written, by the clock that stamps files there: on a shared disk its server's, and that of the machine
    that wrote may be wrong by hours."""
    try:
        handle, probe = tempfile.mkstemp(dir=file.parent, prefix=".now.")
        try:
            os.utime(probe)
            now = os.fstat(handle).st_mtime
        finally:
            os.close(handle)
            os.unlink(probe)
    except OSError:  # a folder that is closed to us, or full
        now = time.time()
    return now - file.stat().st_mtime


def lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether the process that a lease names runs on this machine; None when it names one on another."""
    if holder.get("host") != socket.gethostname():
        return None
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
