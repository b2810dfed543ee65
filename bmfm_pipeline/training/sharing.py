"""Where the workspace is remote: a copy of each checkpoint there, made in the background, from which any machine can go on."""

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError, TrainingError
from bmfm_pipeline.storage import SharedRun, read_json, write_json_atomic
from bmfm_pipeline.training.checkpoints import manifest_of, newest_valid, remove_checkpoint, valid_entry
from bmfm_pipeline.training.lease import Lease
from bmfm_pipeline.training.stopping import StopRequest, note

RENEW_EVERY = 20.0
LONGEST_WAIT = 600.0  # seconds, for the last upload of a training that has ended by itself
STOP_WITHIN = 18.0  # seconds from being asked to stop: whoever asked kills after twenty
_BESIDE = ("history.jsonl", "loading_report.json")
_WAITING, _ARRIVING = "uploading", "arriving"


class Sharing:
    """Uploads what `take` was given last, renews the lease of the copy, and counts what failed. Failures never end a training.

    The exception is another machine that has taken over: then `check` raises.
    """

    def __init__(self, shared: SharedRun, run_dir: Path):
        self.shared, self.run_dir = shared, run_dir
        self.uploads = self.failed = self.bytes = 0
        self._next: tuple[Path, int] | None = None
        self._lost: str | None = None
        self._busy = self._ending = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=work, daemon=True, name=name)
            for name, work in (("upload", self._upload_all), ("remote-lease", self._renew))
        ]
        self._numbers = 0

    def begin(self, about: dict[str, Any], stop: StopRequest) -> bool:
        """Become the one that trains, and bring the copy here where it is further than what lies here; False when asked to stop.

        Raises TrainingError when another machine trains, RemoteError when the store cannot be reached.
        """
        shutil.rmtree(self.run_dir / _WAITING, ignore_errors=True)
        if not self.shared.acquire(about, note, lambda: stop.reason is not None):
            return False
        try:
            self._bring()
        except BaseException:
            with contextlib.suppress(StorageError):
                self.shared.release()
            raise
        for thread in self._threads:
            thread.start()
        return True

    def _bring(self) -> None:
        checkpoints, there = self.run_dir / "checkpoints", self.shared.step
        if there is None or there <= _step(newest_valid(checkpoints, note)):
            return
        arriving = self.run_dir / _ARRIVING
        self.shared.fetch(arriving, note)
        found = newest_valid(arriving / "checkpoints", note)
        if _step(found) > _step(newest_valid(checkpoints, lambda text: None)):
            for path in checkpoints.glob("*.ckpt"):
                remove_checkpoint(path)
            checkpoints.mkdir(parents=True, exist_ok=True)
            # What says how far it has come is moved last.
            for path in sorted(arriving.rglob("*"), key=lambda path: path.name.startswith("last.ckpt")):
                if path.is_file():
                    os.replace(path, self.run_dir / path.relative_to(arriving))
            note(f"checkpoint of step {_step(found)} taken from {self.shared.place}")
        shutil.rmtree(arriving, ignore_errors=True)

    def take(self, step: int) -> None:
        """Have what lies in the run folder now uploaded; replaces what waits. The files get second names, so that nothing is copied."""
        folder = self.run_dir / _WAITING / str(self._numbers)
        self._numbers += 1
        try:
            (folder / "checkpoints").mkdir(parents=True)
            for path in sorted((self.run_dir / "checkpoints").glob("*.ckpt")):
                for file in (manifest_of(path), path):
                    _second_name(file, folder / "checkpoints" / file.name)
            for name in _BESIDE:
                if (self.run_dir / name).exists():
                    shutil.copyfile(self.run_dir / name, folder / name)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._count_failure(step, error)
            return
        with self._changed:
            replaced, self._next = self._next, (folder, step)
            self._changed.notify_all()
        if replaced is not None:
            shutil.rmtree(replaced[0], ignore_errors=True)

    def check(self) -> None:
        """TrainingError when another machine has taken this training over."""
        if self._lost:
            raise TrainingError(self._lost)

    def finish(self, stop: StopRequest) -> dict[str, int]:
        """Wait for the last upload, let the next one take over; {uploads, failures} for the summary."""
        asked = stop.asked
        deadline = time.monotonic() + LONGEST_WAIT if asked is None else max(asked + STOP_WITHIN, time.monotonic() + 1)
        with self._changed:
            self._changed.wait_for(
                lambda: self._lost or not (self._busy or self._next), max(0.0, deadline - time.monotonic())
            )
            late = bool(self._busy or self._next) and not self._lost
            self._ending = True
            self._changed.notify_all()
        if late:
            self.failed += 1
            note(f"the last checkpoint did not reach {self.shared.place} in time; on this machine it is kept")
        else:
            self._threads[1].join(max(1.0, deadline - time.monotonic()))
            shutil.rmtree(self.run_dir / _WAITING, ignore_errors=True)
        found = {"checkpoints_uploaded": self.uploads}
        return found | ({"checkpoint_uploads_failed": self.failed} if self.failed else {})

    def _upload_all(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._next or self._ending)
                if self._next is None or self._lost:
                    return
                (folder, step), self._next, self._busy = self._next, None, True
            try:
                self._upload(folder, step)
                self.uploads += 1
            except TrainingError as error:
                self._lost = str(error)
            except Exception as error:  # whatever it is, training is worth more than a copy of it
                self._count_failure(step, error)
            shutil.rmtree(folder, ignore_errors=True)

    def _upload(self, folder: Path, step: int) -> None:
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        hashes = {}
        for name in files:
            if name.endswith(".ckpt") and f"{name}.json" in files:
                hashes[name] = str(read_json(files[f"{name}.json"])["sha256"])
        self.bytes += self.shared.put(files, hashes, step)

    def _count_failure(self, step: int, error: BaseException) -> None:
        self.failed += 1
        note(f"the checkpoint of step {step} could not be copied to {self.shared.place}: {error}; training goes on")

    def _renew(self) -> None:
        while True:
            with self._changed:
                ending = self._changed.wait_for(lambda: self._ending or self._lost, RENEW_EVERY)
            try:
                if self._lost:
                    return
                if ending:
                    self.shared.release()
                    return
                self.shared.renew()
            except TrainingError as error:
                self._lost = str(error)
            except Exception as error:
                if ending:
                    return
                note(f"{self.shared.place}: the lease could not be renewed: {error}")


class BothLeases:
    """The lease on the local run folder and the one on its remote copy, as one."""

    def __init__(self, local: Lease, sharing: Sharing):
        self.local, self.sharing = local, sharing

    def renew(self) -> None:
        self.sharing.check()
        self.local.renew()

    def renew_if_old(self) -> None:
        self.sharing.check()
        self.local.renew_if_old()

    def release(self) -> None:
        self.local.release()


def wait_for_first(run_dir: Path, is_first: bool) -> None:
    """Of several processes the first brings the copy here; the others go on when it has. Each start of torchrun has a name of its own."""
    start, file = os.environ.get("TORCHELASTIC_RUN_ID"), run_dir / "brought.json"
    if start is None:
        return
    if is_first:
        write_json_atomic(file, {"start": start})
        return
    while True:  # torchrun ends us when the first one fails
        with contextlib.suppress(OSError, StorageError):
            if read_json(file).get("start") == start:
                return
        time.sleep(0.05)


def _step(checkpoint: Path | None) -> int:
    entry = valid_entry(checkpoint) if checkpoint is not None else None
    return -1 if entry is None else int(entry["step"])


def _second_name(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
