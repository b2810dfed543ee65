"""What is predicted so far, on disk: a row for every cell done, so that a run that was stopped goes on where it was."""

import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import disk_errors, hash_json, read_json, write_json_atomic

PREFIX = ".predicting-"
_REASONS = "reasons"
logger = logging.getLogger(__name__)


class PredictedCells:
    """Arrays that grow by rows, float32 (cells, width) each, in files of a folder, with a count of the rows that are whole.

    `settings` is everything that the numbers follow from: rows written under others are never gone on with. Use as a context manager;
    another process at the same folder is refused (StorageError). Memory does not grow with cells.
    """

    def __init__(self, output: Path, settings: dict[str, Any], widths: dict[str, int]):
        self.settings, self.widths = settings, widths
        self.folder = output / f"{PREFIX}{hash_json([settings, widths])[:16]}"
        self.done, self.unknown_values = 0, 0
        self.reasons: list[str] = [""]
        self._lock: int | None = None

    def __enter__(self) -> "PredictedCells":
        self._leave_others()
        with disk_errors(self.folder, "--output"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StorageError(
                f"{self.folder.parent}: another process predicts these cells into this folder; wait for it, or name another --output"
            ) from None
        self._go_on()
        return self

    def __exit__(self, *error) -> None:
        os.close(self._lock)
        if not self.done:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _leave_others(self) -> None:
        """Unfinished work on other cells, or with other settings, is not of use here: removed, and said."""
        for other in sorted(self.folder.parent.glob(f"{PREFIX}*")):
            if other == self.folder or not other.is_dir() or _is_held(other):
                continue
            state = _state(other)
            theirs = (state or {}).get("settings", {})
            names = [name for name in {**theirs, **self.settings} if theirs.get(name) != self.settings.get(name)]
            logger.warning(
                "%s: %d cells predicted before with another %s are left aside and removed; all cells are predicted anew",
                other, (state or {}).get("done", 0), ", ".join(names) or "shape",
            )  # fmt: skip
            shutil.rmtree(other, ignore_errors=True)

    def _go_on(self) -> None:
        state = _state(self.folder)
        if state is None or state["settings"] != json.loads(json.dumps(self.settings)):
            state = {"done": 0, "reasons": [""], "unknown_values": 0}
        sizes = [self._size(name, state["done"]) for name in self._files]
        whole = all(
            (self._path(name).stat().st_size if self._path(name).exists() else 0) >= size
            for name, size in zip(self._files, sizes, strict=True)
        )
        if not whole:
            state = {"done": 0, "reasons": [""], "unknown_values": 0}
        self.done, self.reasons, self.unknown_values = state["done"], state["reasons"], state["unknown_values"]
        for name in self._files:
            with open(self._path(name), "ab") as stream:
                stream.truncate(self._size(name, self.done))

    @property
    def _files(self) -> list[str]:
        return [_REASONS, *self.widths]

    def _path(self, name: str) -> Path:
        number = self._files.index(name)
        return self.folder / f"{number}.bin"

    def _size(self, name: str, rows: int) -> int:
        return rows * (2 if name == _REASONS else 4 * self.widths[name])

    def add(self, arrays: dict[str, np.ndarray], reasons: list[str | None], unknown_values: int) -> None:
        """Rows of the next cells, safe on disk when this returns."""
        for reason in dict.fromkeys(filter(None, reasons)):
            if reason not in self.reasons:
                self.reasons.append(reason)
        codes = np.array([self.reasons.index(reason or "") for reason in reasons], dtype=np.uint16)
        for name in self._files:
            rows = codes if name == _REASONS else np.ascontiguousarray(arrays[name], dtype=np.float32)
            if name != _REASONS and rows.shape != (len(codes), self.widths[name]):
                raise ValueError(f"{name}: rows of {rows.shape}, expected {(len(codes), self.widths[name])}")
            with open(self._path(name), "r+b") as stream:
                stream.seek(self._size(name, self.done))
                stream.write(memoryview(rows).cast("B"))
                stream.flush()
                os.fsync(stream.fileno())
        self.done += len(codes)
        self.unknown_values += unknown_values
        write_json_atomic(
            self.folder / "state.json",
            {
                "settings": self.settings,
                "done": self.done,
                "reasons": self.reasons,
                "unknown_values": self.unknown_values,
            },
        )

    def rows(self, name: str) -> np.ndarray:
        """(cells done, width) float32, read from disk where it is touched."""
        return self._mapped(name, np.float32, (self.done, self.widths[name]))

    def reason_codes(self) -> np.ndarray:
        """(cells done,): 0 where a cell was used, else which of `reasons` it was not for."""
        return self._mapped(_REASONS, np.uint16, (self.done,))

    def _mapped(self, name: str, dtype, shape: tuple[int, ...]) -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self._path(name), dtype=dtype, mode="r", shape=shape)

    def counts_by_reason(self) -> dict[str, int]:
        counts = np.bincount(self.reason_codes(), minlength=len(self.reasons))
        return {reason: int(count) for reason, count in zip(self.reasons[1:], counts[1:], strict=True)}


def _state(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / "state.json")
    except (OSError, StorageError):
        return None


def _is_held(folder: Path) -> bool:
    """Whether a living process works in it."""
    try:
        handle = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
