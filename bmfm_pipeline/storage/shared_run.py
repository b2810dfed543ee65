"""The copy of a run's scratch beside the artefacts of a remote workspace: one writer at a time, and always a whole set of files.

Below WORKSPACE/runs/KEY/ lie `job.json` (what is made), `lease.json` (who works on it), `files/SHA256` (bytes, never changed), and
`state.json`, which names the files that belong together and is written after them.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import StorageError, TrainingError
from bmfm_pipeline.storage import remote
from bmfm_pipeline.storage.conditional import Versioned, read_versioned, write_over
from bmfm_pipeline.storage.failures import RemoteError
from bmfm_pipeline.storage.hashing import hash_file
from bmfm_pipeline.storage.holders import EXPIRES_AFTER, identity, lives_here
from bmfm_pipeline.storage.listing import list_files
from bmfm_pipeline.storage.transfer import PARTS, ObjectChanged, fetch_object
from bmfm_pipeline.storage.uris import join_uri, strip_userinfo

JOB, LEASE, STATE, FILES = "job.json", "lease.json", "state.json", "files"
_LOOK_EVERY = 2.0
_TRIES = 5
Tell = Callable[[str], None]


class SharedRun:
    """A run folder at `uri`, held from `acquire` to `release`. Only the holder with the highest number can write `state.json`."""

    def __init__(self, uri: str):
        self.uri, self.number = uri, 0
        self._lease: Versioned | None = None
        self._state: Versioned | None = None
        self._renewals = 0

    @property
    def place(self) -> str:
        return strip_userinfo(self.uri)

    @property
    def step(self) -> int | None:
        """How far the copy has come, as it stood when the run was acquired or last written; None when there is none."""
        return self._state.value.get("step") if self._state else None

    def acquire(
        self, about: Mapping[str, Any], tell: Tell = print, stopped: Callable[[], bool] = lambda: False
    ) -> bool:
        """Become the writer. `about` (stage, name, key ...) is kept beside it for who looks after the workspace.

        Waits for a holder on another machine that gives no sign of life until its lease has expired; False when `stopped` says so
        meanwhile. TrainingError when it does give one, RemoteError when the store cannot be reached.
        """
        for _ in range(_TRIES):
            before = self._wait_for_holder(tell, stopped)
            if stopped():
                return False
            state = read_versioned(self._at(STATE))
            known = [0, *(int(entry.value.get("number", 0)) for entry in (before, state) if entry)]
            self.number = max(known) + 1
            try:
                self._write_lease(before.etag if before else None)
                # From here on the holder before us cannot write it: the version that it knows is gone.
                value = {**(state.value if state else {}), "number": self.number}
                self._state = Versioned(value, write_over(self._at(STATE), value, state.etag if state else None))
            except FileExistsError:
                continue
            remote.write_json(self._at(JOB), dict(about))
            self._remove_unnamed()
            return True
        raise TrainingError(f"{self.place}: other processes take it over and over again; run the same command again")

    def _wait_for_holder(self, tell: Tell, stopped: Callable[[], bool]) -> Versioned | None:
        lease = read_versioned(self._at(LEASE))
        said, first = False, lease.etag if lease else ""
        while lease is not None and lease.value and not lease.value.get("released") and not stopped():
            who = f"process {lease.value.get('pid')} on {lease.value.get('host')}"
            here = lives_here(lease.value)
            if here or lease.etag != first:
                raise TrainingError(f"{self.place}: {who} is training here; wait for it, or stop it and run again")
            if here is False or lease.age >= EXPIRES_AFTER:
                break
            if not said:
                tell(f"{self.place}: waiting up to {EXPIRES_AFTER - lease.age:.0f} s for a sign of life of {who}")
                said = True
            time.sleep(min(_LOOK_EVERY, EXPIRES_AFTER - lease.age + 0.1))
            lease = read_versioned(self._at(LEASE))
        return lease

    def renew(self) -> None:
        """Say that we live; TrainingError when another process has taken over, RemoteError when the store cannot be reached."""
        self._renewals += 1
        self._write_lease(self._lease.etag if self._lease else None)

    def release(self) -> None:
        """Let the next one take over at once."""
        with contextlib.suppress(TrainingError):
            self._write_lease(self._lease.etag if self._lease else None, released=True)

    def _write_lease(self, etag: str | None, released: bool = False) -> None:
        value = {"number": self.number, **identity(os.getpid()), "released": released, "renewals": self._renewals}
        try:
            self._lease = Versioned(value, write_over(self._at(LEASE), value, etag))
        except FileExistsError:
            if self._lease is None or self._lease.value["number"] != self.number:  # not ours yet
                raise
            raise self._taken_over() from None

    def _taken_over(self) -> TrainingError:
        now = read_versioned(self._at(LEASE))
        if now is None:
            return TrainingError(f"{self.place}: is gone: the run was published or deleted while training went on")
        return TrainingError(
            f"{self.place}: taken over by process {now.value.get('pid')} on {now.value.get('host')}; this process stops so that only one "
            "writes checkpoints"
        )

    def put(self, files: Mapping[str, Path], hashes: Mapping[str, str], step: int) -> int:
        """Make `files` ({name: where it lies here}) the content, and forget what was there before; bytes that were uploaded.

        `hashes` has the sha256 of those that are known. Nothing changes for a reader until all have arrived. TrainingError when another
        process has taken over.
        """
        held = {entry["sha256"] for entry in self._named().values()}
        entries, sent = {}, 0
        for name, path in files.items():
            sha256, size = hashes.get(name) or hash_file(path), path.stat().st_size
            entries[name] = {"sha256": sha256, "bytes": size}
            if sha256 not in held:
                remote.upload(path, self._at(FILES, sha256))
                held.add(sha256)
                sent += size
        value, before = {"number": self.number, "step": step, "files": entries}, self._named()
        try:
            self._state = Versioned(value, write_over(self._at(STATE), value, self._state.etag))
        except FileExistsError:
            raise self._taken_over() from None
        now = {entry["sha256"] for entry in entries.values()}
        for sha256 in {entry["sha256"] for entry in before.values()} - now:
            with contextlib.suppress(RemoteError):  # whoever takes over, or publishes, removes what is named nowhere
                remote.remove(self._at(FILES, sha256))
        return sent

    def fetch(self, folder: Path, tell: Tell = print) -> None:
        """Make the files of `state.json` the content of `folder`; one that is gone or damaged is named to `tell` and left out.

        What an earlier attempt has brought there is kept.
        """
        named = self._named()
        for file in list_files(str(folder)):
            if file.name.removesuffix(PARTS) not in named:
                (folder / file.name).unlink()
        for name, entry in named.items():
            target, uri = folder / name, self._at(FILES, entry["sha256"])
            try:
                item = remote.describe(uri)
                if item is None:
                    tell(f"{self.place}: {name} is missing, not used")
                    continue
                fetch_object(item, target, entry["sha256"])
            except RemoteError:
                raise
            except (StorageError, ObjectChanged) as error:
                target.unlink(missing_ok=True)
                tell(f"{self.place}: {name} is incomplete or damaged, not used ({error})")

    def _named(self) -> dict[str, dict[str, Any]]:
        return dict(self._state.value.get("files") or {}) if self._state else {}

    def _remove_unnamed(self) -> None:
        """Bytes that a holder uploaded and did not come to name."""
        named = {entry["sha256"] for entry in self._named().values()}
        for file in list_files(self._at(FILES)):
            if file.name not in named:
                with contextlib.suppress(RemoteError):
                    remote.remove(self._at(FILES, file.name))

    def remove(self) -> None:
        """Delete everything: what names the files first."""
        names = [file.name for file in list_files(self.uri)]
        first = (STATE, LEASE)
        for name in sorted(names, key=lambda name: (name not in first, name)):
            remote.remove(self._at(*name.split("/")))

    def _at(self, *parts: str) -> str:
        return join_uri(self.uri, *parts)
