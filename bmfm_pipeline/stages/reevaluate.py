"""The champion of a dataset tested again on the data as they are now, and a challenger that may take its place. No Prefect is needed."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.promotion import PromotionConfig
from bmfm_pipeline.config.sections import HELD_OUT_ONLY
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.stages.held_out_plan import TRAINING, is_held_out, labels_without_mapping
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.planning import compose_stage, compose_test, plan_preprocess, plan_stage, run_name
from bmfm_pipeline.stages.registering import (
    RECORD,
    make_challenger,
    named_model,
    newest_model,
    own_evaluation,
    register_model,
    registry_of,
)
from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    hash_bytes,
    load_artefact,
    read_json,
    strip_userinfo,
    write_text_atomic,
)
from bmfm_pipeline.tracking import CHALLENGER, CHAMPION, ModelVersion, Registry, registered_name

logger = logging.getLogger(__name__)
OWN_SECTION = "promotion"
NO_CHAMPION = "no champion"


@dataclass
class Contestant:
    """A model that is tested: its version (None while it is not registered), the jobs of its test, of which the last is the evaluation.

    `prepared` is the dataset as it would be prepared for training now, where that changed since the model was trained. `left` are labels
    of the data that the model has no class for, by label column.
    """

    model: Artefact
    version: ModelVersion | None
    jobs: list[Job]
    prepared: Job | None = None
    left: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def evaluation(self) -> Job:
        return self.jobs[-1]

    @property
    def held_out(self) -> bool:
        """Whether the data are others than those that the model comes from."""
        return TRAINING in self.evaluation.inputs

    def prepared_folder(self) -> Path | None:
        if self.prepared is None:
            return None
        artefact = self.prepared.artefact()
        if artefact is None:
            raise StorageError(f"{self.prepared.uri}: the prepared data are gone; run the same command again")
        return artefact.local()


@dataclass
class Reevaluation:
    """What a re-evaluation will do. `jobs` are run first, in order; then `stages.reevaluate_decision.conclude` compares."""

    dataset: str
    place: Workspace
    settings: PromotionConfig
    seed: int
    registry: Registry
    champion: Contestant | None
    challenger: Contestant | None
    data: str | None = None
    only_promotion: bool = False

    @property
    def model(self) -> str:
        """The registered model."""
        return registered_name(self.dataset)

    @property
    def jobs(self) -> list[Job]:
        found: dict[str, Job] = {}
        for side in (self.champion, self.challenger):
            for job in () if side is None else (*([side.prepared] if side.prepared else []), *side.jobs):
                found.setdefault(job.key, job)
        return list(found.values())


def plan_reevaluation(
    target: str,
    *,
    label: str | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
    workspace: str | None = None,
) -> Reevaluation:
    """Plan the test of the champion of `target`, and of its challenger where there is one, on the data as they are now.

    `data` names other cells to test on (an h5ad file, a folder or pattern of them, or a dataset). Where no champion is registered, the
    challenger, else the newest model of the workspace that was evaluated, stands for a challenger. Raises StorageError where the
    registry or a model cannot be reached.
    """
    settings, rest, dataset, seed = _settled(target, label, overrides)
    place = Workspace(workspace)
    registry = registry_of(place)
    aliases = registry.aliases(registered_name(dataset))

    def contestant(version: ModelVersion | None, model: Artefact | None = None) -> Contestant | None:
        if version is None and model is None:
            return None
        model = model or _artefact_of(version)
        return _plan_contestant(model, version, target, label, data, rest, place)

    champion, challenger = contestant(aliases.get(CHAMPION)), contestant(aliases.get(CHALLENGER))
    if champion is None and challenger is None:
        challenger = contestant(None, newest_model(dataset, place, evaluated=True))
    return Reevaluation(dataset, place, settings, seed, registry, champion, challenger, data)


def plan_promotion(
    target: str,
    *,
    model: str = "latest",
    label: str | None = None,
    overrides: Sequence[str] = (),
    workspace: str | None = None,
    triggered_by: str,
) -> Reevaluation:
    """Register a model (by address, or the newest of the dataset) as the challenger, and plan its test beside the champion's."""
    settings, rest, dataset, seed = _settled(target, label, overrides)
    place = Workspace(workspace)
    registry = registry_of(place)
    artefact = named_model(model, dataset, place)
    version = register_model(registry, dataset, artefact, own_evaluation(artefact, place), triggered_by)
    alias = make_challenger(registry, version)
    champion = registry.at(version.model, CHAMPION)
    sides = [
        _plan_contestant(own, known, target, label, None, rest, place)
        for own, known in (
            *([(_artefact_of(champion), champion)] if champion is not None else []),
            *([(artefact, version)] if alias == CHALLENGER else []),
        )
    ]
    first = sides[0] if champion is not None else None
    second = sides[-1] if alias == CHALLENGER else None
    return Reevaluation(dataset, place, settings, seed, registry, first, second, None, only_promotion=True)


def _settled(target: str, label: str | None, overrides: Sequence[str]) -> tuple[PromotionConfig, list[str], str, int]:
    """(settings, the other overrides, the name of the dataset, the seed)"""
    own = [word for word in overrides if _section(word) == OWN_SECTION]
    rest = [word for word in overrides if _section(word) != OWN_SECTION]
    seeds = [word for word in rest if _section(word) == "seed"]
    run = compose_stage("evaluate", target, overrides=[*own, *seeds], label=label)
    return run.promotion, rest, run_name(run), run.seed.seed_value


def _section(word: str) -> str:
    return word.lstrip("+~").split("=", 1)[0].split(".", 1)[0]


def _artefact_of(version: ModelVersion) -> Artefact:
    try:
        return load_artefact(version.uri)
    except StorageError:
        raise StorageError(
            f"{version.title} is registered, but its artefact {version.uri} is missing or damaged; restore it, or register another model "
            "with `bmfm promote`"
        ) from None


def _plan_contestant(
    model: Artefact,
    version: ModelVersion | None,
    target: str,
    label: str | None,
    data: str | None,
    overrides: Sequence[str],
    place: Workspace,
) -> Contestant:
    named = [f"task.checkpoint={json.dumps(model.uri)}", *overrides]
    tested_on = data or target
    test = compose_test(tested_on, None, None, named, label)
    if not is_held_out(test, model, place):
        own = [word for word in named if not _of_other_data(word)]
        return Contestant(
            model, version, plan_stage("evaluate", tested_on, overrides=own, label=label, workspace=place.uri)
        )
    if not any(word.lstrip("+").startswith("evaluation.seen_cells=") for word in named):
        named.append("evaluation.seen_cells=drop")
    left = labels_without_mapping(test, model)
    named += [f"evaluation.label_mapping={json.dumps(str(_mapping(left[name], place)))}" for name in left]
    jobs = plan_stage("evaluate", tested_on, overrides=named, label=label, workspace=place.uri)
    prepared = None if data else _plan_current(test, model, place)
    return Contestant(model, version, jobs, prepared, left)


def _of_other_data(word: str) -> bool:
    """Whether an override says nothing to a model that is tested on its own split."""
    section, _, name = word.lstrip("+~").split("=", 1)[0].partition(".")
    return section == "evaluation" and name.split(".")[0] in HELD_OUT_ONLY


def _mapping(labels: Mapping[str, int], place: Workspace) -> Path:
    """A label mapping that leaves out cells whose label is no class of the model; it enters keys by content."""
    text = json.dumps({"data": dict.fromkeys(labels)}, indent=1, ensure_ascii=False)
    file = place.state_dir / "reevaluation" / f"{hash_bytes(text.encode())[:16]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, text)
    return file


def _plan_current(test: RunConfig, model: Artefact, place: Workspace) -> Job | None:
    """The preprocessing of the dataset as the model's own training would do it now; None where it transforms nothing."""
    values = read_json(model.local_file("run_config.json"))
    module, named = values["data_module"], test.model_dump(mode="json")["data_module"]
    if not module["transform_datasets"]:
        return None
    module["data_dir"] = named["data_dir"]
    for name in ("source_h5ad_file_name", "layer", "cell_names"):
        module["transform_kwargs"][name] = named["transform_kwargs"][name]
    module["dataset_kwargs"] = {}  # copies are for the person who trained
    module["transform_kwargs"]["processed_data_source"] = None
    values["dataset"] = test.dataset
    return plan_preprocess(RunConfig.model_validate(values), place)


def recorded_evaluation(side: Contestant, place: Workspace) -> Artefact | None:
    """The evaluation that is the recorded score of a model; None where there is none, or it is gone."""
    uri = (side.version.tags if side.version else {}).get(RECORD)
    if uri:
        try:
            return load_artefact(uri)
        except StorageError:
            logger.warning("%s: the recorded evaluation is gone", strip_userinfo(uri))
            return None
    return own_evaluation(side.model, place)
