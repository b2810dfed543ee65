"""One trainer at a time on a run folder: a lease file with a fencing number, renewed while its holder lives."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError, TrainingError
from bmfm_pipeline.storage import exclusive, write_json_atomic
from bmfm_pipeline.storage.holders import identity, is_alive, lives_here, silence

RENEW_EVERY = 10.0
# A trainer whose parent is gone saves and leaves; whoever tries again meanwhile waits for it.
LEAVES_WITHIN = 30.0


@dataclass
class Lease:
    """Holds `folder` until `release`. The number grows with every holder: a writer whose number is no longer the file's must stop."""

    folder: Path
    number: int
    _renewed: float = 0.0

    @property
    def file(self) -> Path:
        return self.folder / "lease.json"

    def renew(self) -> None:
        """Say that we live; TrainingError when another process has taken the folder over."""
        current = _read(self.file)
        if not current:
            raise TrainingError(f"{self.file}: is gone, so the run folder was deleted while training went on")
        if current.get("number") != self.number:
            raise TrainingError(
                f"{self.folder}: taken over by process {current.get('pid')} on {current.get('host')}; this process stops so that "
                "only one writes checkpoints"
            )
        self._renewed = time.monotonic()
        os.utime(self.file)  # the time of the file, so that a full disk does not end a training

    def renew_if_old(self) -> None:
        if time.monotonic() - self._renewed > RENEW_EVERY:
            self.renew()

    def _write(self, released: bool = False) -> None:
        write_json_atomic(self.file, {"number": self.number, **identity(os.getpid()), "released": released})

    def release(self) -> None:
        if _read(self.file).get("number") == self.number:
            # On a full disk it stays as it is: that of a process that is gone.
            with contextlib.suppress(OSError, StorageError):
                self._write(released=True)


def acquire(
    folder: Path,
    patience: float = 0.0,
    tell: Callable[[str], None] = print,
    stopped: Callable[[], bool] = lambda: False,
) -> Lease | None:
    """Take the lease on `folder`; TrainingError naming the holder when a living process still has it after `patience` seconds.

    A holder on another machine that gives no sign of life is waited for until its lease has expired. None when `stopped` says yes
    while waiting.
    """
    folder, began, said = Path(folder), time.monotonic(), False
    while True:
        with exclusive(folder):  # two that come at once: the second sees what the first wrote
            current = _read(folder / "lease.json")
            if not current or current.get("released") or not is_alive(current, folder / "lease.json"):
                lease = Lease(folder, int(current.get("number", 0)) + 1)
                lease._write()
                return lease
            quiet = lives_here(current) is None and silence(folder / "lease.json") > 3 * RENEW_EVERY
        holder = f"process {current['pid']} on {current['host']}"
        if time.monotonic() - began > patience and not (patience and quiet):
            raise TrainingError(f"{folder}: {holder} is training here; wait for it, or stop it and run again")
        if stopped():
            return None
        if not said:
            tell(f"waiting for {holder}, which still holds {folder}")
            said = True
        time.sleep(0.2)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
