"""What the MLflow store points to: models behind registry aliases, and what runs that go on now read."""

import time
from dataclasses import dataclass

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.tracking.locations import database_file
from bmfm_pipeline.tracking.redaction import redact_text
from bmfm_pipeline.tracking.runs import EXPERIMENT
from bmfm_pipeline.tracking.store import Store, Unreachable

# A run that began longer ago and never ended is that of a process that died.
LONGEST_RUN = 14 * 86400.0
_PAGE = 200


@dataclass(frozen=True)
class Reference:
    """Something that points into a workspace: what it is, for a person, and texts that hold addresses of artefacts."""

    what: str
    texts: tuple[str, ...]


def references_in_store(uri: str) -> list[Reference]:
    """Every model version that an alias of the registry at `uri` names, and every run that is going on.

    Raises StorageError when the store cannot be asked. A SQLite store that is not there yet holds nothing, and is not made.
    """
    database = database_file(uri)
    if database is not None and not database.exists():
        return []
    store = Store(uri)
    try:
        return store.ask(_aliases) + store.ask(_running)
    except Unreachable as error:
        raise StorageError(f"MLflow at {store.name} cannot be asked which models are registered ({error})") from error


def check_store(uri: str) -> None:
    """StorageError when the store at `uri` does not answer, or refuses to."""
    store = Store(uri)
    try:
        store.ask(lambda client: client.search_experiments(max_results=1))
    except Unreachable as error:
        raise StorageError(f"MLflow at {store.name} does not answer ({redact_text(str(error))})") from error


def _aliases(client) -> list[Reference]:
    found, token = [], None
    while True:
        page = client.search_registered_models(max_results=_PAGE, page_token=token)
        for model in page:
            for alias, version in client.get_registered_model(model.name).aliases.items():
                made = client.get_model_version(model.name, str(version))
                texts = [made.source or "", *made.tags.values()]
                if made.run_id:
                    texts += _texts_of_run(client.get_run(made.run_id).data.tags)
                found.append(Reference(f"{alias} of {model.name} (version {version})", tuple(texts)))
        token = page.token
        if not token:
            return found


def _running(client) -> list[Reference]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    since = int((time.time() - LONGEST_RUN) * 1000)
    asked = f"attributes.status = 'RUNNING' AND attributes.start_time > {since}"
    found, token = [], None
    while True:
        page = client.search_runs([experiment.experiment_id], asked, max_results=_PAGE, page_token=token)
        found += [Reference(f"run {run.info.run_name}", tuple(_texts_of_run(run.data.tags))) for run in page]
        token = page.token
        if not token:
            return found


def _texts_of_run(tags: dict[str, str]) -> list[str]:
    own = [value for name, value in tags.items() if name.startswith("bmfm.")]
    if "bmfm.stage" in tags and "bmfm.key" in tags:
        own.append(f"artefacts/{tags['bmfm.stage']}/{tags['bmfm.key']}")
    return own
