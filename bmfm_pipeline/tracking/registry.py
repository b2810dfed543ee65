"""The registered model of a dataset: its versions, each an artefact of a workspace, and the aliases champion, challenger, previous."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import is_remote, strip_userinfo
from bmfm_pipeline.tracking.locations import database_file, is_http
from bmfm_pipeline.tracking.redaction import redact, redact_text
from bmfm_pipeline.tracking.runs import EXPERIMENT
from bmfm_pipeline.tracking.store import MAX_TAG, Refused, Store, Unreachable

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
# The tag of a version that says which artefact it is. Its source may not be a path of this machine where MLflow is a server.
ARTEFACT = "bmfm.artefact"
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
_PAGE = 200
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ModelVersion:
    """One version: `uri` is the address of its artefact, `run_id` the MLflow run that made it ('' where none is known)."""

    model: str
    version: str
    uri: str
    run_id: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"version {self.version} of {self.model}"


def registered_name(dataset: str) -> str:
    """The registered model of a dataset: bmfm-NAME, in letters that MLflow takes."""
    return "bmfm-" + re.sub(r"[^\w.-]", "-", dataset)


class Registry:
    """The model registry at `uri`. Every method raises StorageError when it cannot be asked, or refuses."""

    def __init__(self, uri: str):
        self._store = Store(uri)
        self._uri = uri

    def _do(self, action: Callable[[Any], Answer]) -> Answer:
        self.check()
        try:
            return self._store.ask(action)
        except Unreachable as error:
            refused = isinstance(error.__cause__, Refused)
            said = "refuses" if refused else "cannot be reached, and without it nobody knows which model is champion"
            cure = "" if refused else "; check MLFLOW_TRACKING_URI, and start the server when there is one"
            raise StorageError(f"MLflow at {self._store.name} {said} ({redact_text(str(error))}){cure}") from error

    def check(self) -> None:
        """Raise StorageError where this store has no registry."""
        if not (is_http(self._uri) or ("://" in self._uri and not self._uri.startswith("file:"))):
            raise StorageError(
                f"MLflow at {self._store.name}: a folder of files keeps no registered models with aliases; set MLFLOW_TRACKING_URI to "
                "sqlite:///FILE or to a server"
            )

    def exists(self) -> bool:
        """False where a SQLite store was never written: it is not made by asking."""
        database = database_file(self._uri)
        return database is None or database.exists()

    def at(self, model: str, alias: str) -> ModelVersion | None:
        """The version that an alias names; None where there is no such model or alias."""
        return self.aliases(model).get(alias) if self.exists() else None

    def aliases(self, model: str) -> dict[str, ModelVersion]:
        """{alias: version} of a model; empty where there is none."""

        def find(client) -> dict[str, ModelVersion]:
            try:
                known = client.get_registered_model(model).aliases
            except Exception as error:  # MLflow's own class is known inside this call only
                if str(getattr(error, "error_code", "")) in _ABSENT:
                    return {}
                raise
            return {alias: _of(client.get_model_version(model, str(version))) for alias, version in known.items()}

        return self._do(find) if self.exists() else {}

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions, newest first."""

        def find(client) -> list[ModelVersion]:
            found, token = [], None
            while True:
                page = client.search_model_versions(f"name = '{model}'", max_results=_PAGE, page_token=token)
                found += map(_of, page)
                token = page.token
                if not token:
                    return sorted(found, key=lambda version: int(version.version), reverse=True)

        return self._do(find) if self.exists() else []

    def register(
        self, model: str, uri: str, *, run_id: str = "", tags: Mapping[str, str] | None = None
    ) -> ModelVersion:
        """The version that the artefact at `uri` is: the one there is, with these tags too, or a new one."""
        shown = strip_userinfo(uri)
        known = next((version for version in self.versions(model) if version.uri == shown), None)
        if known is not None:
            self.tag(known, tags or {})
            return ModelVersion(known.model, known.version, shown, known.run_id, {**known.tags, **_clean(tags or {})})
        source = f"bmfm://{shown}" if is_http(self._uri) and not is_remote(shown) else shown
        own = _clean({ARTEFACT: shown, **(tags or {})})

        def make(client) -> ModelVersion:
            try:
                client.create_registered_model(model)
            except Exception as error:
                if str(getattr(error, "error_code", "")) != "RESOURCE_ALREADY_EXISTS":
                    raise
            made = client.create_model_version(model, source, run_id=run_id or None, tags=own, await_creation_for=None)
            return _of(made)

        return self._do(make)

    def point(self, alias: str, version: ModelVersion) -> None:
        """Let an alias name this version."""
        self._do(lambda client: client.set_registered_model_alias(version.model, alias, version.version))

    def unpoint(self, alias: str, model: str) -> None:
        """Take an alias away; nothing happens where there is none."""
        if alias in self.aliases(model):
            self._do(lambda client: client.delete_registered_model_alias(model, alias))

    def tag(self, version: ModelVersion, tags: Mapping[str, Any]) -> None:
        """Add tags to a version; secrets in them are replaced."""
        clean = _clean(tags)

        def write(client) -> None:
            for name, value in clean.items():
                client.set_model_version_tag(version.model, version.version, name, value)

        if clean:
            self._do(write)

    def attach(self, version: ModelVersion, file: str, text: str) -> bool:
        """Store a text as artifact `file` of the run that made the version; False where no run is known."""
        if not version.run_id:
            return False
        self._do(lambda client: client.log_text(version.run_id, redact_text(text), file))
        return True

    def run_of(self, key: str) -> str:
        """The newest run that made the artefact `key`; '' where MLflow knows none."""

        def find(client) -> str:
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                return ""
            found = client.search_runs([experiment.experiment_id], f"tags.`bmfm.key` = '{key}'", max_results=1)
            return found[0].info.run_id if found else ""

        return self._do(find)


def _of(made) -> ModelVersion:
    tags = dict(made.tags or {})
    uri = tags.get(ARTEFACT) or (made.source or "").removeprefix("bmfm://")
    return ModelVersion(made.name, str(made.version), uri, made.run_id or "", tags)


def _clean(tags: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value)[:MAX_TAG] for name, value in redact(dict(tags)).items() if value is not None}
