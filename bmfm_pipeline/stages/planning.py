"""From a dataset's name or a config to jobs with keys: composes and checks everything before any data is read."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig, compose, find_accelerator, list_entries, load_entry, settle_execution
from bmfm_pipeline.errors import ConfigError, DataError, did_you_mean
from bmfm_pipeline.stages.checkpoint_fields import with_fields_of, with_static_vocabularies
from bmfm_pipeline.stages.controls_plan import asks_for_it, refuse_foreign, twin_of_artefact, untrained_twin
from bmfm_pipeline.stages.held_out_plan import (
    TRAINING,
    held_out_inputs,
    is_held_out,
    look_at_labels,
    plan_data,
    refuse_held_out_keys,
    says_how_to_read,
    trained_run,
    write_mapping_template,
)
from bmfm_pipeline.stages.inputs import embedding_inputs, source_inputs, table_inputs
from bmfm_pipeline.stages.jobs import ASIDE, STAGES, Job, make_job
from bmfm_pipeline.stages.labels import says_nothing_new
from bmfm_pipeline.stages.models import CheckpointSource, find_checkpoint, with_policy, with_tokenizer_of
from bmfm_pipeline.stages.sequences.inputs import looks_like_sequences, name_of_sequences, usual_label
from bmfm_pipeline.stages.source_files import holds_cells, name_of_data, names_cells
from bmfm_pipeline.storage import Artefact, Workspace, is_pattern, is_remote, load_artefact, read_json

logger = logging.getLogger(__name__)
DEFAULT_CONFIGS = {
    "preprocess": "fine_tune_train_config",
    "pretrain": "pre_train_config",
    "finetune": "fine_tune_train_config",
    "evaluate": "test_config",
    "predict": "predict_config",
    "interpret": "interpret_config",
}
PAIRS_CONFIG = "perturbation_train_config"


def compose_stage(
    stage: str,
    target: str | None = None,
    *,
    config_name: str | None = None,
    config_dir: str | None = None,
    overrides: Sequence[str] = (),
    label: str | None = None,
) -> RunConfig:
    """The whole resolved and checked configuration of a stage, for a dataset name, an h5ad file, a folder or pattern of them, or as
    the config file says."""
    if config_name is None and target is None:
        raise ConfigError(f"{stage}: name a dataset (see `bmfm datasets`), an h5ad file, or a config with -cn")
    usual = PAIRS_CONFIG if _about_pairs(stage, target, overrides, label) else DEFAULT_CONFIGS[stage]
    run = compose(config_name or usual, [*target_overrides(target, label), *overrides], config_dir)
    return settled(run)


def is_about_pairs(config: dict[str, Any]) -> bool:
    """Whether a stored run predicts perturbed cells from control cells."""
    return config["data_module"].get("collation_strategy") == "sequence_labeling"


def _about_pairs(stage: str, target: str | None, overrides: Sequence[str], label: str | None) -> bool:
    """Whether perturbed cells are to be predicted from control cells: asked for by a key, or what the named dataset is for."""
    if stage not in ("preprocess", "finetune"):
        return False
    keys = [word.lstrip("+").partition("=") for word in overrides]
    if any(name.startswith("data_module.perturbation") or value == "sequence_labeling" for name, _, value in keys):
        return True
    return label is None and any(entry.name == target and entry.perturbation is not None for entry in list_entries())


def settled(run: RunConfig) -> RunConfig:
    """The run with the accelerator and precision this machine has: what is computed is what the key says."""
    task, notes = settle_execution(run.task, find_accelerator())
    for note in notes:
        run.note(note)
    return run.model_copy(update={"task": task})


def target_overrides(target: str | None, label: str | None = None) -> list[str]:
    """Hydra overrides that point a packaged config at `target`; `label` names the obs column to predict."""
    overrides = []
    if target is not None:
        names = [entry.name for entry in list_entries()]
        if target in names:
            overrides.append(f"dataset={target}")
        elif looks_like_sequences(target):
            path = str(Path(target).expanduser().absolute())
            overrides += ["dataset=null", f"++data_module.sequences.source={json.dumps(path)}"]
            label = label or usual_label(path)
            if label is None:
                overrides.append("++label_columns=[]")
        elif names_cells(target) or "/" in target or is_remote(target) or holds_cells(target):
            path = target if is_remote(target) else str(Path(target).expanduser().absolute())
            if not is_remote(path):
                if Path(path).is_dir() and not holds_cells(path):
                    raise DataError(f"{target}: is a folder; name an h5ad file in it (or a dataset of `bmfm datasets`)")
                if not Path(path).exists() and not is_pattern(path):
                    raise DataError(f"{target}: no such file; datasets known by name: {', '.join(names)}")
            overrides += ["dataset=null", f"++data_module.transform_kwargs.source_h5ad_file_name={json.dumps(path)}"]
            if label is None:
                overrides.append("++label_columns=[]")
        else:
            hint = did_you_mean(target, names, before="; ")
            raise ConfigError(f"'{target}' is neither an h5ad file nor a known dataset ({', '.join(names)}){hint}")
    if label is not None:
        column = json.dumps(label)
        overrides.append(f"++label_columns=[{{label_column_name: {column}, is_stratification_label: true}}]")
    return overrides


def run_name(run: RunConfig) -> str:
    """The name of the data a run is about: the catalogue's, else the file's."""
    settings = run.data_module
    if run.dataset:
        part = settings.sequences.part if settings.sequences is not None else None
        usual = load_entry(run.dataset).sequences.part if part is not None else None
        return run.dataset if part == usual else f"{run.dataset}-{part}"
    if settings.sequences is not None:
        return name_of_sequences(settings.sequences.source)
    return name_of_data(
        settings.transform_kwargs.source_h5ad_file_name or settings.dataset_kwargs.processed_data_source
    )


def plan_preprocess(run: RunConfig, workspace: Workspace) -> Job:
    """The preprocess job of a checked run; hashes its inputs.

    A label dictionary that an earlier run of the same kind wrote says nothing new, so that run's artefact is used again.
    """
    inputs, view = source_inputs(run, workspace), run.key_view("preprocess")

    def job_of(inputs: dict[str, dict[str, Any]]) -> Job:
        return make_job("preprocess", run_name(run), workspace, run.model_dump(mode="json"), view, inputs)

    if "label_dict" in inputs:
        without = job_of({role: entry for role, entry in inputs.items() if role != "label_dict"})
        if without.cached and says_nothing_new(run, load_artefact(without.uri).local_file("label_dict.json").parent):
            return without
    return job_of(inputs)


def _plan_training(
    stage: str, run: RunConfig, workspace: Workspace, data: Job, checkpoint: CheckpointSource | Job | None
) -> Job:
    if run.trainer.lora_config is not None and checkpoint is None:
        raise ConfigError(
            f"{stage}: trainer.lora_config adapts pretrained weights, and model.checkpoint is null; name a model there, or, with "
            "`bmfm run`, say finetune.trainer.lora_config=... to adapt the model that the chain has pretrained"
        )
    if stage == "pretrain" and run.data_module.train_fraction is not None:
        # No label is read, and one pretrained model serves every share of the labelled cells.
        run = run.model_copy(update={"data_module": run.data_module.model_copy(update={"train_fraction": None})})
    run = with_fields_of(run, checkpoint)
    inputs = {"data": data.as_input(), **embedding_inputs(run, workspace), **table_inputs(run, workspace)}
    run = with_policy(run, stage, checkpoint)
    if checkpoint is not None:
        inputs["checkpoint"] = checkpoint.as_input()
    return make_job(stage, data.name, workspace, run.model_dump(mode="json"), run.key_view(stage), inputs)


def _plan_evaluation(
    test: RunConfig, trained: dict[str, Any], name: str, workspace: Workspace, inputs: dict[str, dict[str, Any]]
) -> Job:
    """Test settings of `test` (task, evaluation) on the data, fields and labels that the model was trained with."""
    merged = {
        **trained,
        "task": test.model_dump(mode="json")["task"],
        "evaluation": test.model_dump(mode="json")["evaluation"],
    }
    run = RunConfig.model_validate(merged)
    if TRAINING not in inputs:
        refuse_held_out_keys(run)
    return make_job("evaluate", name, workspace, run.model_dump(mode="json"), run.key_view("evaluate"), inputs)


def plan_stage(
    stage: str,
    target: str | None = None,
    *,
    config_name: str | None = None,
    config_dir: str | None = None,
    overrides: Sequence[str] = (),
    label: str | None = None,
    workspace: str | None = None,
) -> list[Job]:
    """The jobs that end in `stage`, in the order they run: a stage started alone finds or makes what it needs.

    pretrain and finetune need preprocessed data; evaluate needs the model that task.checkpoint names, or, with a target, the
    fine-tuned model of the whole chain; interpret likewise.
    """
    if stage not in (*STAGES, *ASIDE):
        raise ConfigError(f"unknown stage '{stage}'; stages are {', '.join((*STAGES, *ASIDE))}")
    place = Workspace(workspace)
    if stage == "interpret":
        from bmfm_pipeline.stages.interpret_planning import plan_interpretation

        return plan_interpretation(target, config_name, config_dir, overrides, label, place)
    if stage == "evaluate":
        return _plan_evaluate_stage(target, config_name, config_dir, overrides, label, place)
    run = compose_stage(stage, target, config_name=config_name, config_dir=config_dir, overrides=overrides, label=label)
    data = plan_preprocess(run, place)
    checkpoint = find_checkpoint(_checkpoint(run), place, data.name)
    run, data = _with_its_tokenizer(run, data, checkpoint, place)
    if stage == "preprocess":
        return [data]
    return [data, _plan_training(stage, run, place, data, checkpoint)]


def _plan_evaluate_stage(target, config_name, config_dir, overrides, label, place: Workspace) -> list[Job]:
    test = compose_test(target, config_name, config_dir, overrides, label)
    named = getattr(test.task, "checkpoint", None)
    if not named:
        if target is None:
            raise ConfigError(
                "evaluate: task.checkpoint must name a fine-tuned model artefact (or give a dataset to run the chain for)"
            )
        return plan_pipeline(target, label=label, overrides=overrides, workspace=place.uri)
    source = find_checkpoint(named, place, run_name(test), stage="finetune")
    if not source.artefact:
        return _plan_evaluation_elsewhere(test, source, overrides, place)
    model = load_artefact(source.artefact)
    held_out = target is not None and is_held_out(test, model, place)
    if held_out and is_about_pairs(read_json(model.local_file("run_config.json"))):
        raise ConfigError(
            f"evaluate: {named} predicts perturbations, which are tested on the perturbations held out of its own data; leave the target out, "
            "or run the chain on the other data"
        )
    known = [word for word in overrides if held_out and says_how_to_read(word)]
    if strangers := [word for word in overrides if word not in known and not _belongs(word, "evaluate")]:
        raise ConfigError(
            f"evaluate: {', '.join(strangers)} cannot be changed for a model that is trained already: fields, data and sizes are "
            "those it was trained with; task.*, evaluation.* and seed.* can be set"
        )
    if held_out:
        return _plan_evaluation_on_held_out(test, source, model, place)
    trained = read_json(model.local_file("run_config.json"))
    inputs = {"model": source.as_input(), "data": model.inputs["data"]}
    twins = [twin_of_artefact(model, place)] if asks_for_it(test) else []
    inputs |= {twin.variant: twin.as_input() for twin in twins}
    return [*twins, _plan_evaluation(test, trained, model.summary.get("name", run_name(test)), place, inputs)]


def compose_test(target, config_name, config_dir, overrides, label) -> RunConfig:
    """The settings of an evaluation, and where the cells lie that it names."""
    own = [word for word in overrides if _belongs(word, "evaluate") or says_how_to_read(word)]
    base = config_name or DEFAULT_CONFIGS["evaluate"]
    return settled(compose(base, [*target_overrides(target, label), *own], config_dir))


def write_label_mapping(
    file: str,
    target: str | None,
    *,
    config_name: str | None = None,
    config_dir: str | None = None,
    overrides: Sequence[str] = (),
    label: str | None = None,
    workspace: str | None = None,
) -> dict[str, Any]:
    """Write the labels of `target` as a mapping to fill in for the model that task.checkpoint names: {file, labels, to_fill_in,
    model_classes}."""
    place = Workspace(workspace)
    test = compose_test(target, config_name, config_dir, overrides, label)
    named = getattr(test.task, "checkpoint", None)
    if target is None or not named:
        raise ConfigError("--write-label-mapping: name the other data, and the model with task.checkpoint=MODEL")
    source = find_checkpoint(named, place, run_name(test), stage="finetune")
    if not source.artefact:
        raise ConfigError(
            f"--write-label-mapping: {source.uri} was trained elsewhere; a model of a workspace is needed"
        )
    test = test.model_copy(update={"evaluation": test.evaluation.model_copy(update={"label_mapping": None})})
    return write_mapping_template(test, load_artefact(source.artefact), file)


def _plan_evaluation_on_held_out(
    test: RunConfig, source: CheckpointSource, model: Artefact, place: Workspace
) -> list[Job]:
    """Test a model of the workspace on data that it does not come from. Labels are looked at here, before anything is computed."""
    values, pairs = trained_run(test, model)
    settings = test.evaluation.model_copy(update={"label_from": pairs or None})
    test = test.model_copy(update={"evaluation": settings})
    data = plan_data(test, model, run_name(test), place)
    inputs = {"model": source.as_input(), "data": data.as_input(), **held_out_inputs(test, model, place)}
    job = _plan_evaluation(test, values, data.name, place, inputs)
    if not job.cached:
        look_at_labels(test, model)
    return [data, job]


def _plan_evaluation_elsewhere(
    test: RunConfig, source: CheckpointSource, overrides: Sequence[str], place: Workspace
) -> list[Job]:
    """Test weights that no stage of this workspace has made, on the data that `test` names: these are prepared for the model first."""
    from bmfm_pipeline.models import model_folder
    from bmfm_pipeline.stages.prediction_settings import run_of_model

    if asks_for_it(test):
        refuse_foreign(source.uri)
    folder = model_folder(source.uri)
    run = run_of_model(folder, test, [word for word in overrides if not _belongs(word, "evaluate")])
    run.note("the model was trained elsewhere: whether it has seen the cells it is tested on is not known")
    for note in run.notes:
        logger.warning("%s", note)
    data = plan_preprocess(run, place)
    inputs = {"model": source.as_input(), "data": data.as_input()}
    return [data, _plan_evaluation(test, run.model_dump(mode="json"), data.name, place, inputs)]


def plan_pipeline(
    target: str,
    *,
    label: str | None = None,
    overrides: Sequence[str] = (),
    workspace: str | None = None,
    controls: str | None = None,
) -> list[Job]:
    """preprocess, pretrain, finetune, evaluate on `target`, in order, each fed by the ones before; a second finetune where the controls
    name no_pretrain.

    Overrides of `task.*` go to the stages whose task has that key; `pretrain.KEY=VALUE` (or another stage's name in front)
    reaches that stage alone. A dataset without label columns is pretrained and its masked predictions are evaluated. Perturbed cells
    are not pretrained on.
    """
    place = Workspace(workspace)
    if controls is not None:
        overrides = [*overrides, f"evaluate.evaluation.controls={json.dumps(controls)}"]

    def composed(stage: str) -> RunConfig:
        return compose_stage(stage, target, overrides=stage_overrides(stage, overrides), label=label)

    finetune_run, test_run = composed("finetune"), composed("evaluate")
    data = plan_preprocess(finetune_run, place)
    if finetune_run.predicts_pairs:
        return _plan_pairs(finetune_run, test_run, data, place)
    pretrain_run = composed("pretrain")
    before = find_checkpoint(_checkpoint(pretrain_run), place, data.name)
    named = find_checkpoint(_checkpoint(finetune_run), place, data.name)
    finetune_run, data = _with_its_tokenizer(finetune_run, data, named or before, place)
    pretrain_run = pretrain_run.model_copy(update={"tokenizer": finetune_run.tokenizer})
    pretrain = _plan_training("pretrain", pretrain_run, place, data, before)
    if not finetune_run.label_columns:
        if asks_for_it(test_run):
            raise ConfigError(
                "evaluation.controls: no_pretrain compares fine-tuned models, and these cells have no label column to learn; name one with "
                "label=COLUMN, or leave it out"
            )
        inputs = {"model": pretrain.as_input(), "data": data.as_input()}
        return [data, pretrain, _plan_evaluation(test_run, pretrain.config, data.name, place, inputs)]
    start = named or pretrain
    finetune = _plan_training("finetune", finetune_run, place, data, start)
    twins = [untrained_twin(finetune, start)] if asks_for_it(test_run) else []
    inputs = {"model": finetune.as_input(), "data": data.as_input()}
    inputs |= {twin.variant: twin.as_input() for twin in twins}
    evaluate = _plan_evaluation(test_run, finetune.config, data.name, place, inputs)
    return [data, pretrain, finetune, *twins, evaluate]


def _plan_pairs(run: RunConfig, test: RunConfig, data: Job, place: Workspace) -> list[Job]:
    """The chain of perturbed cells: what is learned is the difference that a perturbation makes, which needs no pretraining."""
    if asks_for_it(test):
        raise ConfigError(
            "evaluation.controls: no_pretrain compares with a model that was not pretrained, and the chain of perturbed cells pretrains "
            "none; name a model with finetune.model.checkpoint=..., and compare two runs with `bmfm compare`"
        )
    source = find_checkpoint(_checkpoint(run), place, data.name)
    run, data = _with_its_tokenizer(run, data, source, place)
    finetune = _plan_training("finetune", run, place, data, source)
    inputs = {"model": finetune.as_input(), "data": data.as_input()}
    return [data, finetune, _plan_evaluation(test, finetune.config, data.name, place, inputs)]


def why_skipped(stage: str, jobs: Sequence[Job]) -> str:
    """Why a stage is not among the jobs of a chain, in words."""
    if stage == "pretrain" and any(job.stage == "finetune" for job in jobs):
        return "what perturbations change is learned from pairs of cells; finetune.model.checkpoint=... starts from a pretrained model"
    return f"{jobs[-1].name} has no label column"


def _with_its_tokenizer(
    run: RunConfig, data: Job, source: CheckpointSource | None, place: Workspace
) -> tuple[RunConfig, Job]:
    """(run, preprocess job) with the vocabularies of the checkpoint, unless it was trained on the very cells of `data`."""
    if source is None or source.data == data.key:
        return run, data
    changed = with_static_vocabularies(with_tokenizer_of(run, source))
    return changed, data if changed is run else plan_preprocess(changed, place)


def _checkpoint(run: RunConfig) -> str | None:
    return run.model.checkpoint if run.model else None


def stage_overrides(stage: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of `bmfm run` that concern one stage; one that concerns none is an error."""
    own = []
    for word in overrides:
        bare = word.lstrip("+~")
        head = bare.split(".", 1)[0]
        if head in STAGES:
            if head == stage:
                own.append(word.replace(head + ".", "", 1))
        elif _belongs(word, stage):
            own.append(word)
        elif not any(_belongs(word, other) for other in STAGES):
            raise ConfigError(f"{word}: no stage has such a task key; see docs/configuration.md")
    return own


def _belongs(word: str, stage: str) -> bool:
    """Whether an override can be applied to a stage's config: task keys differ between training and testing."""
    from bmfm_pipeline.config import TestTaskConfig, TrainingTaskConfig

    name = word.lstrip("+~").split("=", 1)[0]
    parts = name.split(".")
    if parts[0] == "promotion":
        return stage == "finetune"
    if parts[0] == "task" and len(parts) > 1:
        model = TestTaskConfig if stage == "evaluate" else TrainingTaskConfig
        return parts[1] in model.model_fields
    if stage == "evaluate":
        return parts[0] in ("task", "evaluation", "seed", "dataset", "label_columns")
    return True
