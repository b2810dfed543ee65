"""From a model and cells, or a dataset whose chain makes the model, to the job that attributes its predictions."""

from collections.abc import Sequence
from typing import Any

from bmfm_pipeline.config import InterpretTaskConfig, RunConfig, compose, require_path
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages import planning
from bmfm_pipeline.stages.jobs import STAGES, Job, make_job
from bmfm_pipeline.stages.models import CheckpointSource, find_checkpoint
from bmfm_pipeline.storage import Workspace, content_hash, exists, load_artefact, read_json, strip_userinfo

OWN_SECTIONS = ("task", "dataset", "label_columns")


def plan_interpretation(
    target: str | None,
    config_name: str | None,
    config_dir: str | None,
    overrides: Sequence[str],
    label: str | None,
    place: Workspace,
) -> list[Job]:
    """The jobs that end in interpret.

    The model is the one that task.checkpoint names, or the fine-tuned one of the chain on `target`; its cells are test cells of its
    data, or those of the file task.cells. Raises ConfigError, also when captum is needed and not installed.
    """
    own = [word for word in overrides if _concerns(word)]
    run = planning.settled(
        compose(
            config_name or planning.DEFAULT_CONFIGS["interpret"],
            [*planning.target_overrides(target, label), *own],
            config_dir,
        )
    )
    others = [word for word in overrides if not _concerns(word)]
    if run.task.checkpoint:
        jobs = _of_named_model(run, others, place)
    elif target is None:
        raise ConfigError(
            "interpret: task.checkpoint must name a fine-tuned model artefact (or give a dataset to run the chain for)"
        )
    else:
        jobs = _of_chain(run, target, label, overrides, place)
    if not jobs[-1].cached:
        from bmfm_pipeline.evaluation.attributions.integrate import require_captum

        require_captum()
    return jobs


def _concerns(word: str) -> bool:
    """Whether an override can be applied to this stage's config."""
    parts = word.lstrip("+~").split("=", 1)[0].split(".")
    if parts[0] == "task" and len(parts) > 1:
        return parts[1] in (*InterpretTaskConfig.model_fields, *InterpretTaskConfig.absent)
    return parts[0] in OWN_SECTIONS


def _of_chain(run: RunConfig, target: str, label: str | None, overrides: Sequence[str], place: Workspace) -> list[Job]:
    """The chain without its evaluation, then the interpretation of its fine-tuned model."""
    for_chain = [
        word
        for word in overrides
        if word.split(".", 1)[0] in STAGES
        or not _concerns(word)
        or any(planning._belongs(word, stage) for stage in STAGES)
    ]
    chain = planning.plan_pipeline(target, label=label, overrides=for_chain, workspace=place.uri)
    data = next(job for job in chain if job.stage == "preprocess")
    model = next((job for job in reversed(chain) if job.stage == "finetune"), None)
    if model is None:
        raise ConfigError(
            f"interpret: {data.name} has no label column, and attributions are of predicted labels; give label=COLUMN"
        )
    before = [job for job in chain if job.stage in ("preprocess", "pretrain")]
    return [*before, model, _job(run, model.config, data.name, place, model.as_input(), data.as_input())]


def _of_named_model(run: RunConfig, others: Sequence[str], place: Workspace) -> list[Job]:
    source = find_checkpoint(
        run.task.checkpoint, place, planning.run_name(run) if _names_data(run) else None, "finetune"
    )
    if not source.artefact:
        return _of_weights_from_elsewhere(run, source, others, place)
    if others:
        raise ConfigError(
            f"interpret: {', '.join(others)} cannot be changed for a model that is trained already: fields, data and sizes are those "
            "it was trained with; task.* can be set"
        )
    model = load_artefact(source.artefact)
    trained = read_json(model.local_file("run_config.json"))
    name = model.summary.get("name", "model")
    return [_job(run, trained, name, place, source.as_input(), model.inputs["data"])]


def _names_data(run: RunConfig) -> bool:
    settings = run.data_module
    return bool(
        run.dataset or settings.transform_kwargs.source_h5ad_file_name or settings.dataset_kwargs.processed_data_source
    )


def _of_weights_from_elsewhere(
    run: RunConfig, source: CheckpointSource, others: Sequence[str], place: Workspace
) -> list[Job]:
    """Weights that no stage of this workspace has made, on the data that the config names, which are prepared for them first."""
    from bmfm_pipeline.models import model_folder
    from bmfm_pipeline.stages.prediction_settings import run_of_model

    if not _names_data(run) and not run.task.cells:
        raise ConfigError(
            "interpret: the model was not trained in this workspace, so say which cells: task.cells=FILE.h5ad, or a dataset or file as target"
        )
    folder = model_folder(source.uri)
    if run.task.cells:
        trained = read_json(folder / "run_config.json")
        return [_job(run, trained, "cells", place, source.as_input(), None)]
    own = run_of_model(folder, run, others)
    data = planning.plan_preprocess(own, place)
    return [data, _job(run, own.model_dump(mode="json"), data.name, place, source.as_input(), data.as_input())]


def _job(
    run: RunConfig,
    trained: dict[str, Any],
    name: str,
    place: Workspace,
    model: dict[str, Any],
    data: dict[str, Any] | None,
) -> Job:
    """The task of `run` on the data, fields and labels that the model was trained with; nothing is masked."""
    if not trained["label_columns"] or trained["data_module"]["collation_strategy"] == "language_modeling":
        raise ConfigError("interpret: the model predicts no label column, and attributions are of predicted labels")
    asked = run.task.attribute_filter or {}
    known = [entry["label_column_name"] for entry in trained["label_columns"]]
    if strange := [column for column in asked if column not in known]:
        raise ConfigError(
            f"task.attribute_filter: the model has no label column '{strange[0]}'; it has {', '.join(known)}"
        )
    if trained["data_module"].get("sequences") is not None:
        _check_for_sequences(run)
    module = {
        **trained["data_module"],
        "collation_strategy": "sequence_classification",
        "mlm": False,
        "masking_strategy": None,
    }
    task = run.model_dump(mode="json")["task"]
    merged = RunConfig.model_validate({**trained, "data_module": module, "task": task})
    inputs = {"model": model}
    if run.task.cells:
        inputs["cells"] = _cells_input(run.task.cells, place)
    else:
        inputs["data"] = data
    return make_job("interpret", name, place, merged.model_dump(mode="json"), merged.key_view("interpret"), inputs)


def _check_for_sequences(run: RunConfig) -> None:
    """Raise ConfigError for what only cells have."""
    if run.task.baseline == "zero":
        raise ConfigError(
            "task.baseline: zero is the same genes without expression, and sequences have no values; leave it out, so that padding "
            "stands in place of the sequence"
        )
    if run.task.layer is not None:
        raise ConfigError("task.layer: sequences have no layers; leave it out")


def _cells_input(named: str, place: Workspace) -> dict[str, Any]:
    path = require_path(named, "task.cells")
    if not exists(path):
        raise DataError(f"task.cells: {path} does not exist; name an h5ad file, or of sequences a table or FASTA file")
    return {"id": content_hash(path, place.memo), "uri": strip_userinfo(path)}
