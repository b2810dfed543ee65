"""A dataset's models in the registry of MLflow: which one is registered as what, and what is written on its version."""

import datetime
import json
import logging
from collections.abc import Mapping
from typing import Any

from bmfm_pipeline.errors import ConfigError, StorageError
from bmfm_pipeline.storage import Artefact, Workspace, list_artefacts, load_artefact, read_json, strip_userinfo
from bmfm_pipeline.tracking import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    ModelVersion,
    Registry,
    registered_name,
    tracking_uri,
)

logger = logging.getLogger(__name__)
# Tags of a version: the evaluation that is its recorded score, which `bmfm workspace gc` keeps with it.
RECORD = "bmfm.evaluation"
NOT_ASIDE = "training_data"  # an input that only evaluations on other data have


def registry_of(place: Workspace) -> Registry:
    return Registry(tracking_uri(place.state_dir))


def own_evaluation(model: Artefact, place: Workspace) -> Artefact | None:
    """The newest evaluation of a model on the test cells of its own data."""
    for test in list_artefacts(place, "evaluate"):
        if test.inputs.get("model", {}).get("id") == model.key and NOT_ASIDE not in test.inputs:
            return test
    return None


def newest_model(dataset: str, place: Workspace, evaluated: bool = False) -> Artefact | None:
    """The newest fine-tuned model of a dataset in this workspace, or the newest that was also evaluated."""
    for model in list_artefacts(place, "finetune"):
        if model.summary.get("name") != dataset or model.summary.get("variant"):
            continue
        if not evaluated or own_evaluation(model, place) is not None:
            return model
    return None


def named_model(uri: str, dataset: str, place: Workspace) -> Artefact:
    """The model artefact at `uri`, or the newest of the dataset for `latest`. Raises ConfigError for what is no fine-tuned model."""
    if uri == "latest":
        found = newest_model(dataset, place)
        if found is None:
            raise ConfigError(
                f"{dataset}: no fine-tuned model in {strip_userinfo(place.uri)}; make one with `bmfm run {dataset}`, or name one with --model"
            )
        return found
    try:
        found = load_artefact(uri.rstrip("/"))
    except StorageError as error:
        raise ConfigError(f"--model {strip_userinfo(uri)}: no artefact of a model ({error})") from None
    if found.stage != "finetune":
        raise ConfigError(
            f"--model {strip_userinfo(uri)}: is a {found.stage} artefact; only fine-tuned models are registered"
        )
    return found


def register_model(
    registry: Registry, dataset: str, model: Artefact, test: Artefact | None, triggered_by: str
) -> ModelVersion:
    """The version that is this model, with its recorded evaluation where there is one; no alias names it yet."""
    tags: dict[str, Any] = {"bmfm.dataset": dataset, "bmfm.key": model.key, "bmfm.code_version": model.code_version}
    known = {version.uri: version for version in registry.versions(registered_name(dataset))}
    old = known.get(strip_userinfo(model.uri))
    if old is None:
        tags |= {"bmfm.registered_by": triggered_by, "bmfm.registered_at": now_text()}
    if test is not None and not (old and old.tags.get(RECORD)):
        tags |= record_tags(test)
    return registry.register(registered_name(dataset), model.uri, run_id=registry.run_of(model.key), tags=tags)


def record_tags(test: Artefact) -> dict[str, Any]:
    """What a version says of the evaluation that is its recorded score."""
    rows = read_json(test.local_file("metrics.json"))
    scores = {
        f"bmfm.score.{row['target']}.{row['metric']}": f"{row['value']:.6g}"
        for row in rows
        if row["model"] == "model" and row["metric"] in ("accuracy", "f1", "mse") and row["value"] is not None
    }
    return {RECORD: strip_userinfo(test.uri), "bmfm.evaluated_at": test.created, **scores}


def make_champion(registry: Registry, version: ModelVersion) -> None:
    """Let the champion be this version; the one before becomes `previous`, and stays where it is for a way back."""
    aliases = registry.aliases(version.model)
    before = aliases.get(CHAMPION)
    registry.point(CHAMPION, version)
    if before is not None and before.version != version.version:
        registry.point(PREVIOUS, before)
    if CHALLENGER in aliases and aliases[CHALLENGER].version == version.version:
        registry.unpoint(CHALLENGER, version.model)


def make_challenger(registry: Registry, version: ModelVersion) -> str:
    """Let the challenger be this version, unless it is the champion already; returns the alias that names it now."""
    champion = registry.at(version.model, CHAMPION)
    if champion is not None and champion.version == version.version:
        return CHAMPION
    registry.point(CHALLENGER, version)
    return CHALLENGER


def offer_model(job: Any, test: Artefact | None, triggered_by: str) -> str:
    """What happens with the model of a finished fine-tuning `job` when its promotion.after_finetune says so; returns it in words.

    It becomes the challenger, or, where there is no champion yet, it was evaluated, and promotion.first says so, the champion. A
    registry that does not answer is no reason to lose the run: it is said.
    """
    settings = job.config["promotion"]
    model = job.artefact()
    if settings["after_finetune"] != CHALLENGER or job.variant or model is None or not job.config["label_columns"]:
        return ""
    try:
        registry = registry_of(job.place)
        test = test or own_evaluation(model, job.place)
        version = register_model(registry, job.name, model, test, triggered_by)
        if test is not None and settings["first"] == CHAMPION and registry.at(version.model, CHAMPION) is None:
            make_champion(registry, version)
            write_decision(registry, [version], first_champion(version, triggered_by))
            alias = CHAMPION
        else:
            alias = make_challenger(registry, version)
    except StorageError as error:
        logger.warning("the model was not registered (promotion.after_finetune): %s", error)
        return ""
    said = f"{version.title} is {alias}"
    logger.info("%s: %s", said, strip_userinfo(model.uri))
    return said


def first_champion(version: ModelVersion, triggered_by: str) -> dict[str, Any]:
    """The decision on a model that had no champion to compare with."""
    return {
        "decision": "first",
        "promoted": True,
        "reasons": [f"there was no champion of {version.model}, and promotion.first is champion"],
        "challenger": version.version,
        "champion": None,
        "triggered_by": triggered_by,
        "at": now_text(),
    }


def write_decision(registry: Registry, versions: list[ModelVersion], decision: Mapping[str, Any]) -> None:
    """A decision as tags on each version, and whole as an artifact promotion/TIME.json of the run that made it."""
    tags = {
        "bmfm.promotion.decision": decision["decision"],
        "bmfm.promotion.reasons": "; ".join(decision["reasons"]),
        "bmfm.promotion.champion": decision["champion"],
        "bmfm.promotion.challenger": decision["challenger"],
        "bmfm.promotion.triggered_by": decision["triggered_by"],
        "bmfm.promotion.at": decision["at"],
        **{f"bmfm.promotion.{name}": value for name, value in (decision.get("numbers") or {}).items()},
    }
    text = json.dumps(decision, indent=2, default=str)
    for version in versions:
        registry.tag(version, tags)
        registry.attach(version, f"promotion/{decision['at'].replace(':', '')}.json", text)


def now_text() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
