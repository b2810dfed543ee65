"""One trainer at a time on a run folder: a lease file with a fencing number, renewed while its holder lives."""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.storage import write_json_atomic

EXPIRES_AFTER = 120.0  # seconds without renewal; a holder renews at every progress report


@dataclass
class Lease:
    """Holds `folder` until `release`. The number grows with every holder: a writer whose number is no longer the file's must stop."""

    folder: Path
    number: int

    @property
    def file(self) -> Path:
        return self.folder / "lease.json"

    def renew(self) -> None:
        """Say that we live; TrainingError when another process has taken the folder over."""
        if (current := _read(self.file)).get("number") != self.number:
            raise TrainingError(
                f"{self.folder}: taken over by process {current.get('pid')} on {current.get('host')}; this process stops so that "
                "only one writes checkpoints"
            )
        self._write()

    def _write(self, released: bool = False) -> None:
        holder = {
            "number": self.number,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "renewed": time.time(),
            "released": released,
        }
        write_json_atomic(self.file, holder)

    def release(self) -> None:
        if _read(self.file).get("number") == self.number:
            self._write(released=True)


def acquire(folder: Path) -> Lease:
    """Take the lease on `folder`; TrainingError naming the holder when a living process has it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    current = _read(folder / "lease.json")
    if current and not current.get("released") and _alive(current):
        raise TrainingError(
            f"{folder}: process {current['pid']} on {current['host']} is training here; wait for it, or stop it and run again"
        )
    lease = Lease(folder, int(current.get("number", 0)) + 1)
    lease._write()
    return lease


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _alive(holder: dict) -> bool:
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except (ProcessLookupError, ValueError):
            return False
        except PermissionError:
            return True
        return not _zombie(int(holder["pid"]))
    return time.time() - float(holder.get("renewed", 0)) < EXPIRES_AFTER


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (OSError, IndexError):
        return False
