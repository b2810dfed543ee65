"""One MLflow store: every change is a small plain operation that is either applied now or kept and applied later."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from bmfm_pipeline.storage import exclusive, strip_userinfo
from bmfm_pipeline.tracking.locations import artifact_folder, database_file, probe, set_environment

logger = logging.getLogger(__name__)
Operation = dict[str, Any]
Answer = TypeVar("Answer")

MAX_ITEMS = 100  # params and tags in one request
MAX_METRICS = 1000
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
# The store understood and refused: sending the same again would never succeed.
_REFUSALS = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "NOT_FOUND",
}  # fmt: skip


class Unreachable(Exception):
    """The store does not answer now; it may later."""


class Refused(Exception):
    """The store will never accept this operation."""


class Store:
    """A connection to the store at `uri`. Opening probes the address first, so that an absent server costs seconds."""

    def __init__(self, uri: str):
        self.uri = uri
        self.name = strip_userinfo(uri)
        self._client = None
        self._experiments: dict[str, str] = {}

    @property
    def connected(self) -> bool:
        return self._client is not None

    def open(self) -> None:
        """Connect, making and migrating a SQLite store under a lock: two processes that start together would both migrate."""
        if self._client is not None:
            return
        try:
            probe(self.uri)
        except OSError as error:
            raise Unreachable(str(error)) from error
        set_environment()
        for noisy in ("mlflow", "alembic", "mlflow.store.db.utils", "alembic.runtime.migration"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        if database := database_file(self.uri):
            try:
                database.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Unreachable(str(error)) from error
        with self._guarded():
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self.uri)
            client.search_experiments(max_results=1)
        self._client = client

    def experiment_id(self, name: str) -> str:
        """The experiment's id; it is made when absent, with its artifacts beside a SQLite file."""
        if name not in self._experiments:
            self.open()
            with self._guarded():
                self._experiments[name] = self._find_experiment(name)
        return self._experiments[name]

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, artifact_location=artifact_folder(self.uri))
            except MlflowException:  # made by another process in between
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        elif found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def ask(self, question: Callable[[Any], Answer]) -> Answer:
        """`question(client)`, for what only reads. Raises Unreachable, also where the store refuses to answer."""
        self.open()
        try:
            with self._guarded():
                return question(self._client)
        except Refused as error:
            raise Unreachable(str(error)) from error

    def experiment_of(self, run_id: str) -> str:
        self.open()
        with self._guarded():
            return self._client.get_run(run_id).info.experiment_id

    def apply(self, operation: Operation) -> str | None:
        """Carry out one operation; `create` returns the id of the new run. Raises Unreachable or Refused."""
        self.open()
        kind = operation["op"]
        experiment = self.experiment_id(operation["experiment"]) if kind == "create" else ""
        with self._guarded():
            if kind == "create":
                return self._create(operation, experiment)
            getattr(self, f"_{kind}")(operation)
        return None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """One process at a time writes a SQLite store, and every failure becomes Unreachable or Refused."""
        database = database_file(self.uri)
        try:
            with exclusive(Path(f"{database}.lock")) if database else contextlib.nullcontext():
                yield
        except (Unreachable, Refused):
            raise
        except Exception as error:  # MLflow, SQLAlchemy, requests and boto share no base class
            code = str(getattr(error, "error_code", ""))
            text = (str(error) or type(error).__name__).splitlines()[0][:300]
            if code in _REFUSALS:
                raise Refused(text) from error
            raise Unreachable(text) from error

    def _create(self, operation: Operation, experiment: str) -> str:
        tags = {key: str(value)[:MAX_TAG] for key, value in operation["tags"].items()}
        if operation.get("parent"):
            tags["mlflow.parentRunId"] = operation["parent"]
        run = self._client.create_run(experiment, start_time=operation["time"], tags=tags, run_name=operation["name"])
        return run.info.run_id

    def _resume(self, operation: Operation) -> None:
        self._client.update_run(operation["run"], status="RUNNING")

    def _params(self, operation: Operation) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        items = operation["items"]
        for start in range(0, len(items), MAX_ITEMS):
            batch = [Param(key, value) for key, value in items[start : start + MAX_ITEMS]]
            try:
                self._client.log_batch(operation["run"], params=batch)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                # A resumed run with another execution setting: params never change, so the first value stays.
                known = self._client.get_run(operation["run"]).data.params
                fresh = [param for param in batch if param.key not in known]
                if len(fresh) == len(batch):
                    raise
                if fresh:
                    self._client.log_batch(operation["run"], params=fresh)

    def _metrics(self, operation: Operation) -> None:
        from mlflow.entities import Metric

        items = operation["items"]
        for start in range(0, len(items), MAX_METRICS):
            batch = [
                Metric(key, float(value), when, step) for key, value, when, step in items[start : start + MAX_METRICS]
            ]
            self._client.log_batch(operation["run"], metrics=batch)

    def _tags(self, operation: Operation) -> None:
        from mlflow.entities import RunTag

        items = [RunTag(key, str(value)[:MAX_TAG]) for key, value in operation["items"].items()]
        for start in range(0, len(items), MAX_ITEMS):
            self._client.log_batch(operation["run"], tags=items[start : start + MAX_ITEMS])

    def _dataset(self, operation: Operation) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=operation["name"][:500],
            digest=operation["digest"][:36],
            source_type="uri",
            source=json.dumps({"uri": operation["source"]}),
        )
        self._client.log_inputs(
            operation["run"], [DatasetInput(dataset, [InputTag("mlflow.data.context", operation["context"])])]
        )

    def _text(self, operation: Operation) -> None:
        self._client.log_text(operation["run"], operation["text"], operation["file"])

    def _artifact(self, operation: Operation) -> None:
        path = Path(operation["path"])
        if not path.exists():
            raise Refused(f"artifact {path} is gone")
        self._client.log_artifact(operation["run"], str(path), operation.get("folder") or None)

    def _end(self, operation: Operation) -> None:
        self._client.set_terminated(operation["run"], status=operation["status"], end_time=operation["time"])


def now() -> int:
    """Milliseconds since the epoch, as MLflow counts."""
    return int(time.time() * 1000)
