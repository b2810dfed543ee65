"""The control no_pretrain: the fine-tuning of an evaluation's model once more, from weights that know nothing."""

from typing import Any

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.models import LINEAR_PATH, WHERE_WEIGHTS_START, read_model
from bmfm_pipeline.config.sections import read_controls
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.jobs import Job, make_job
from bmfm_pipeline.stages.models import CheckpointSource
from bmfm_pipeline.storage import Artefact, Workspace, load_artefact, read_json

# The role of its model among the inputs of an evaluation, and the variant of its job.
ROLE = "no_pretrain"


def check_controls(value: str) -> None:
    """Raise ConfigError for a value of controls=... that names what there is not."""
    try:
        read_controls(value)
    except ValueError as error:
        raise ConfigError(f"controls={value}: {error}") from None


def asks_for_it(test: RunConfig) -> bool:
    """Whether the controls of an evaluation name no_pretrain."""
    asked = test.evaluation.controls
    return ROLE in ([asked] if isinstance(asked, str) else asked)


def untrained_twin(finetune: Job, start: CheckpointSource | Job) -> Job:
    """A fine-tuning with the same data, architecture and settings as `finetune`, without the checkpoint `start` that it begins with."""
    return _twin(finetune.config, finetune.inputs, start, finetune.name, finetune.place)


def twin_of_artefact(model: Artefact, workspace: Workspace) -> Job:
    """The same for a model that is fine-tuned already. Raises ConfigError where it was not pretrained, or how it was made is unknown."""
    if model.stage != "finetune":
        raise ConfigError(
            f"evaluation.controls: no_pretrain compares fine-tuned models, and {model.uri} is a {model.stage} artefact; leave it out"
        )
    config, start = read_json(model.local_file("run_config.json")), model.inputs.get("checkpoint")
    return _twin(config, model.inputs, start, model.summary.get("name", ""), workspace)


def refuse_foreign(uri: str) -> None:
    """Raise ConfigError for a model whose training this workspace does not know."""
    raise ConfigError(
        f"evaluation.controls: no_pretrain trains the same model once more without pretraining, and {uri} was trained elsewhere: how is not "
        "known; leave it out"
    )


def _twin(
    config: dict[str, Any],
    inputs: dict[str, Any],
    start: CheckpointSource | Job | dict[str, Any] | None,
    name: str,
    workspace: Workspace,
) -> Job:
    run = RunConfig.model_validate(config)
    if start is None:
        raise ConfigError(
            "evaluation.controls: no_pretrain shows what pretraining is worth, and this model was not pretrained (it has no checkpoint): "
            "leave no_pretrain out, or fine-tune from a pretrained model (model.checkpoint)"
        )
    if run.trainer.lora_config is not None:
        raise ConfigError(
            "evaluation.controls: no_pretrain cannot be made for a model with trainer.lora_config, whose adapters change weights that are "
            "kept: without pretraining there are none to keep. Leave it out, or fine-tune without adapters"
        )
    if run.task.freeze_layers:
        raise ConfigError(
            "evaluation.controls: no_pretrain cannot be made for a model with task.freeze_layers, for without pretraining the frozen layers "
            "would stay random. Leave it out, or fine-tune all layers"
        )
    if run.sizes_from_checkpoint:
        run = _with_architecture(run, _architecture(start))
    model = run.model.model_copy(update={"checkpoint": None, "load": None})
    run = run.model_copy(update={"model": model, "notes": [text for text in run.notes if "model.load" not in text]})
    run.note(
        "no_pretrain: the control of a pretrained model, with the same architecture and settings and no checkpoint"
    )
    own = {role: entry for role, entry in inputs.items() if role != "checkpoint"}
    return make_job(
        "finetune", name, workspace, run.model_dump(mode="json"), run.key_view("finetune"), own, variant=ROLE
    )


def _with_architecture(run: RunConfig, stored: dict[str, Any]) -> RunConfig:
    """The run with the sizes of the model it would start from, as its training takes them."""
    kept = {name: getattr(run.model, name) for name in (*WHERE_WEIGHTS_START, *LINEAR_PATH)}
    known = type(read_model({"model_type": stored["model_type"]})).model_fields
    sizes = {name: stored[name] for name in known if name in stored and name not in kept}
    model = read_model({"model_type": stored["model_type"], **sizes, **kept})
    return run.model_copy(update={"model": model, "sizes_from_checkpoint": False})


def _architecture(start: CheckpointSource | Job | dict[str, Any]) -> dict[str, Any]:
    """The model section that a checkpoint was trained with; of a planned training it is known before the model is there."""
    if isinstance(start, CheckpointSource):
        start = start.as_input()
    if isinstance(start, Job):
        config, inputs = start.config, start.inputs
    elif start.get("stage"):
        artefact = load_artefact(start["uri"])
        config, inputs = read_json(artefact.local_file("run_config.json")), artefact.inputs
    else:
        from bmfm_pipeline.models import model_folder

        return read_json(model_folder(start["uri"]) / "config.json")
    run = RunConfig.model_validate(config)
    if run.sizes_from_checkpoint and "checkpoint" in inputs:
        run = _with_architecture(run, _architecture(inputs["checkpoint"]))
    return {**run.model.model_dump(mode="json"), "model_type": run.model.model_type}
