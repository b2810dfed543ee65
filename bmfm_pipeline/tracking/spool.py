"""What could not be sent to MLflow: kept in order in state_dir/mlflow-spool, sent at the next successful connection."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.storage import exclusive, write_json_atomic, write_text_atomic
from bmfm_pipeline.tracking.locations import tracking_uri
from bmfm_pipeline.tracking.store import Operation, Refused, Store, Unreachable

logger = logging.getLogger(__name__)
OFFLINE = "offline-"
_KEPT_BYTES = 200 * 2**20  # a larger artifact is remembered by its path only


class Spool:
    """One JSON-lines file per run under `state_dir`/mlflow-spool, and the MLflow ids that offline runs got when they were sent."""

    def __init__(self, state_dir: str | os.PathLike):
        self.folder = Path(state_dir) / "mlflow-spool"

    @property
    def _sent_file(self) -> Path:
        return self.folder / "sent.json"

    def pending(self) -> list[Path]:
        """Files that wait, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob("*.jsonl"), key=lambda path: (path.stat().st_mtime, path.name))

    def append(self, operation: Operation) -> None:
        """Keep one operation; a file it refers to is copied, because its run folder may be gone by the time it is sent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run = operation["run"]
        with exclusive(self.folder):
            if operation["op"] == "artifact":
                operation = {**operation, "path": str(self._keep(run, Path(operation["path"])))}
            with open(self.folder / f"{run}.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(operation) + "\n")

    def _keep(self, run: str, path: Path) -> Path:
        files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
        if sum(entry.stat().st_size for entry in files) > _KEPT_BYTES:
            return path.absolute()
        folder = self.folder / "files" / run
        kept = folder / path.name
        count = 1
        while kept.exists():  # two reports of one name, in different artifact folders
            kept = folder / str(count) / path.name
            count += 1
        kept.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, kept)
        else:
            shutil.copy2(path, kept)
        return kept

    def sent(self) -> dict[str, dict[str, Any]]:
        """Offline id -> {"uri", "run", "create"}: where it was sent, as which run, and how it began."""
        try:
            return json.loads(self._sent_file.read_text())
        except (OSError, ValueError):
            return {}

    def run_at(self, run: str, uri: str) -> str | None:
        """The id at `uri` of a run that began offline, None while it waits; any other id is itself."""
        if not run.startswith(OFFLINE):
            return run
        entry = self.sent().get(run)
        return entry["run"] if entry and entry["uri"] == uri else None

    def replay(self, store: Store) -> int:
        """Send everything that waits; returns how many operations arrived. What the store refuses moves to refused/.

        Raises Unreachable, keeping all that has not arrived yet in its order. A crash in between repeats at most one operation
        of each kind that MLflow takes twice without harm (same params, same timed metrics); a run is never made twice.
        """
        if not self.pending():
            return 0
        store.open()
        arrived = 0
        with exclusive(self.folder):
            sent = self.sent()
            # Parents first: a child names its parent, and both may have begun offline.
            waiting = {path: _read(path) for path in self.pending()}
            for path in sorted(waiting, key=lambda path: (_has_offline_parent(waiting[path]), path.name)):
                arrived += self._replay_file(path, waiting[path], store, sent)
        if arrived:
            logger.info("%d kept records were sent to MLflow at %s", arrived, store.name)
        return arrived

    def _replay_file(
        self, path: Path, operations: list[Operation], store: Store, sent: dict[str, dict[str, Any]]
    ) -> int:
        run, done = path.stem, 0
        if run in sent and sent[run]["uri"] != store.uri:  # its beginning went to another store
            self._send(sent[run]["create"], store, sent)
        try:
            for operation in operations:
                try:
                    self._send(operation, store, sent)
                except Refused as error:
                    self.refuse(operation, str(error))
                done += 1
        except Unreachable:
            rest = "".join(json.dumps(operation) + "\n" for operation in operations[done:])
            write_text_atomic(path, rest)
            raise
        path.unlink()
        shutil.rmtree(self.folder / "files" / run, ignore_errors=True)
        return done

    def _send(self, operation: Operation, store: Store, sent: dict[str, dict[str, Any]]) -> None:
        run = operation["run"]
        if operation["op"] == "create":
            if run in sent and sent[run]["uri"] == store.uri:
                return
            parent = operation.get("parent") or ""
            if parent.startswith(OFFLINE):
                parent = sent[parent]["run"] if parent in sent else ""
            made = store.apply({**operation, "parent": parent})
            sent[run] = {"uri": store.uri, "run": made, "create": operation}
            write_json_atomic(self._sent_file, sent)
            return
        if run.startswith(OFFLINE):
            if run not in sent:
                raise Refused(f"nothing is known of how {run} began")
            run = sent[run]["run"]
        store.apply({**operation, "run": run})

    def refuse(self, operation: Operation, reason: str) -> None:
        """Set aside what the store will never take, with its reason."""
        folder = self.folder / "refused"
        folder.mkdir(parents=True, exist_ok=True)
        logger.warning("MLflow refused %s of run %s: %s; kept in %s", operation["op"], operation["run"], reason, folder)
        with open(folder / f"{operation['run']}.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps({**operation, "reason": reason}) + "\n")


def _read(path: Path) -> list[Operation]:
    operations = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            operations.append(json.loads(line))
        except ValueError:  # the last line of a process that was killed while writing it
            logger.warning("%s: an incomplete line was left out", path)
    return operations


def _has_offline_parent(operations: list[Operation]) -> bool:
    first = operations[0] if operations else {}
    return str(first.get("parent") or "").startswith(OFFLINE)


def replay_spool(state_dir: str | os.PathLike, uri: str | None = None) -> int:
    """Send what waits under `state_dir` to `uri` (default: the configured store); returns how many operations arrived.

    A store that does not answer leaves everything in place and returns 0.
    """
    spool = Spool(state_dir)
    if not spool.pending():
        return 0
    try:
        return spool.replay(Store(uri or tracking_uri(state_dir)))
    except Unreachable as error:
        logger.warning("MLflow cannot be reached (%s); %d runs wait in %s", error, len(spool.pending()), spool.folder)
        return 0
