"""A stage's run in MLflow: params, metrics, curves, artifacts and tags, buffered, redacted, and never in the way of the work."""

import contextlib
import json
import logging
import math
import os
import re
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import Preempted
from bmfm_pipeline.storage import Workspace
from bmfm_pipeline.tracking.locations import database_file, is_http, run_url
from bmfm_pipeline.tracking.redaction import redact, redact_text
from bmfm_pipeline.tracking.revision import git_revision
from bmfm_pipeline.tracking.spool import OFFLINE, Spool
from bmfm_pipeline.tracking.store import MAX_KEY, MAX_PARAM, Operation, Refused, Store, Unreachable, now

logger = logging.getLogger(__name__)
EXPERIMENT = "bmfm_pipeline"
FLUSH_ITEMS = 500
FLUSH_SECONDS = 10.0
RECONNECT_SECONDS = 60.0
_TEXT_SUFFIXES = {".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".tsv", ".md", ".html", ".log", ".toml"}
_TEXT_BYTES = 32 * 2**20
_warned: set[str] = set()


class StageTracker:
    """One MLflow run, used as a context manager: ends FINISHED, FAILED on an error, KILLED when stopped or preempted.

    `run_id` continues a run that an earlier step or process began. Metrics are buffered and sent in batches. When the store at
    `uri` does not answer, one warning is printed and everything is kept under `state_dir`/mlflow-spool until a later connection
    succeeds: no method raises because of MLflow. Secrets are replaced by [redacted] before anything is sent or kept.
    """

    def __init__(
        self,
        uri: str,
        experiment: str = EXPERIMENT,
        run_name: str = "run",
        parent_run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        run_id: str | None = None,
        state_dir: str | os.PathLike | None = None,
    ):
        self.uri, self.experiment, self.run_name = uri, experiment, run_name
        self.parent_run_id = parent_run_id
        self._tags = {**_revision_tags(), **(tags or {})}
        self._store = Store(uri)
        self._spool = Spool(state_dir if state_dir is not None else Workspace().state_dir)
        self._retry_at = 0.0
        self._buffer: list[tuple[str, float, int, int]] = []
        self._sent: set[tuple[str, int]] = set()
        self._flushed_at = time.monotonic()
        self._started = now()
        self._experiment_id = ""
        self.run_id = run_id or ""
        self._begin()

    # Life of the run

    def _begin(self) -> None:
        if self.run_id:
            self._do({"op": "resume"})
            return
        operation = {
            "op": "create",
            "run": OFFLINE + uuid.uuid4().hex,
            "experiment": self.experiment,
            "name": self.run_name,
            "parent": self.parent_run_id or "",
            "tags": redact({key: str(value) for key, value in self._tags.items()}),
            "time": self._started,
        }
        if self._connect():
            try:
                parent = self._spool.run_at(operation["parent"], self.uri) or ""
                self.run_id = self._store.apply({**operation, "parent": parent}) or ""
                return
            except (Unreachable, Refused) as error:
                self._lost(error)
        self.run_id = operation["run"]
        self._keep({**operation, "tags": {**operation["tags"], "bmfm.recorded_offline": "true"}})

    def __enter__(self) -> "StageTracker":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.end("FINISHED")
        elif issubclass(kind, Preempted) or not issubclass(
            kind, Exception
        ):  # Ctrl-C, and what a scheduler stops a run with
            self.end("KILLED")
        else:
            self.set_tags({"bmfm.error": f"{kind.__name__}: {error}"[:2000]})
            self.end("FAILED")

    def end(self, status: str = "FINISHED") -> None:
        """Send what is buffered and close the run: FINISHED, FAILED or KILLED."""
        self.flush()
        self._do({"op": "end", "status": status, "time": now()})

    @property
    def offline(self) -> bool:
        """True while the run exists only in the spool."""
        return self.run_id.startswith(OFFLINE)

    @property
    def url(self) -> str:
        """The run's page (for a store without a server, the page that `bmfm ui` serves); empty while it is only kept here."""
        if self.offline or not (is_http(self.uri) or database_file(self.uri)):
            return ""
        if not self._experiment_id:
            try:
                self._experiment_id = self._store.experiment_of(self.run_id)
            except (Unreachable, Refused):
                return ""
        return redact_text(run_url(self.uri, self._experiment_id, self.run_id))

    # What a stage records

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Flat {dotted name: value}; long values are cut to what MLflow takes (log_config keeps them whole)."""
        items = []
        for name, value in params.items():
            text = _as_text(redact(value, str(name)))
            items.append([_safe_key(str(name)), text if len(text) <= MAX_PARAM else text[: MAX_PARAM - 1] + "…"])
        if items:
            self._do({"op": "params", "items": items})

    def log_config(self, config: Mapping[str, Any], file: str = "config.json") -> None:
        """The whole resolved configuration: every leaf as a param, and the tree as the artifact `file`."""
        clean = redact(dict(config))
        self.log_params(_flatten(clean))
        self._do({"op": "text", "text": json.dumps(clean, indent=2, default=str), "file": file})

    def log_dataset(self, name: str, digest: str, source: str = "", context: str = "training") -> None:
        """Which data: shown by MLflow as the run's dataset, and searchable by the tag `bmfm.dataset_hash`."""
        self.set_tags({"bmfm.dataset": name, "bmfm.dataset_hash": digest})
        source = redact_text(source or name)
        self._do({"op": "dataset", "name": name, "digest": digest, "source": source, "context": context})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0, timestamp: int | None = None) -> None:
        """Buffered: sent in batches when enough have gathered, every few seconds, and at the end."""
        when = now() if timestamp is None else timestamp
        for name, value in metrics.items():
            if isinstance(value, bool | int | float) and not (isinstance(value, float) and math.isnan(value)):
                self._buffer.append((_safe_key(name), float(value), when, int(step)))
                self._sent.add((_safe_key(name), int(step)))
        if len(self._buffer) >= FLUSH_ITEMS or time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def log_history(self, path: str | os.PathLike) -> int:
        """Learning curves from a JSON-lines file of {step, metric: value, ...}; returns how many values were sent.

        Points that this tracker has sent already, live or from a shorter file, are not repeated. Timestamps come from the
        file (`time`, seconds), else from when it was last written.
        """
        count = 0
        path = Path(path)
        if not path.exists():
            return 0
        written = int(path.stat().st_mtime * 1000)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line a stopped training was writing
            step = int(record.get("step", number))
            when = int(float(record["time"]) * 1000) if "time" in record else written
            values = {
                name: float(value)
                for name, value in record.items()
                if name not in ("step", "time")
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and (_safe_key(name), step) not in self._sent
            }
            self.log_metrics(values, step, when)
            count += len(values)
        self.flush()
        return count

    def log_artifact(self, path: str | os.PathLike, folder: str = "") -> None:
        """A file or folder; text files are sent without the secrets they may hold."""
        path = Path(path)
        if path.is_dir():
            for entry in sorted(path.rglob("*")):
                if entry.is_file():
                    inner = entry.parent.relative_to(path)
                    self.log_artifact(entry, "/".join(part for part in (folder, path.name, *inner.parts) if part))
            return
        if not path.exists():
            logger.warning("artifact %s does not exist and is not recorded in MLflow", path)
            return
        with _without_secrets(path) as clean:
            self._do({"op": "artifact", "path": str(clean.absolute()), "folder": folder})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        clean = redact({_safe_key(str(key)): str(value) for key, value in tags.items() if value is not None})
        if clean:
            self._do({"op": "tags", "items": clean})

    def flush(self) -> None:
        """Send the buffered metrics now."""
        items, self._buffer = self._buffer, []
        self._flushed_at = time.monotonic()
        if items:
            self._do({"op": "metrics", "items": [list(item) for item in items]})

    # Sending and keeping

    def _do(self, operation: Operation) -> None:
        connected = self._connect()  # may give an offline run its final id
        operation = {**operation, "run": self.run_id}
        if connected:
            try:
                self._store.apply(operation)
                return
            except Refused as error:
                self._spool.refuse(operation, str(error))
                return
            except Unreachable as error:
                self._lost(error)
        self._keep(operation)

    def _connect(self) -> bool:
        """Whether the store answers, after sending what waits. An offline run that has been sent goes on under its new id."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            self._store.open()
            self._spool.replay(self._store)
        except Unreachable as error:
            self._lost(error)
            return False
        except OSError as error:
            logger.warning("records kept for MLflow in %s cannot be read: %s", self._spool.folder, error)
        if self.offline:
            found = self._spool.run_at(self.run_id, self.uri)
            if found is None:
                return False
            self.run_id = found
        return True

    def _lost(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RECONNECT_SECONDS
        self._store = Store(self.uri)
        if self.uri not in _warned:
            _warned.add(self.uri)
            logger.warning(
                "MLflow at %s cannot be reached (%s). The work goes on; its records are kept in %s and sent at the next "
                "run that reaches MLflow. Check MLFLOW_TRACKING_URI.",
                self._store.name,
                redact_text(str(error)),
                self._spool.folder,
            )

    def _keep(self, operation: Operation) -> None:
        try:
            self._spool.append(operation)
        except Exception as error:  # a full disk must not end a training through its bookkeeping
            logger.warning("a record for MLflow could not be kept in %s: %s", self._spool.folder, error)


def _revision_tags() -> dict[str, str]:
    revision = git_revision()
    if not revision:
        return {}
    return {
        "mlflow.source.git.commit": revision["commit"],
        "mlflow.source.git.branch": revision["branch"],
        "bmfm.git_dirty": revision["dirty"],
    }


def _safe_key(name: str) -> str:
    """MLflow takes letters, digits and _ - . space : / in names."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_KEY]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        pairs = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list) and value and any(isinstance(entry, dict | list) for entry in value):
        pairs = [(str(index), entry) for index, entry in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in pairs:
        flat.update(_flatten(entry, f"{prefix}.{key}" if prefix else key))
    return flat


@contextlib.contextmanager
def _without_secrets(path: Path):
    """`path` itself, or a redacted copy when it is a text file that holds a secret."""
    clean = None
    if path.suffix.lower() in _TEXT_SUFFIXES and path.stat().st_size <= _TEXT_BYTES:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        clean = redact_text(text)
        clean = None if clean == text else clean
    if clean is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(clean, encoding="utf-8", errors="surrogateescape")
        yield copy
