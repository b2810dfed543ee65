"""`_target_` lines of existing configs: an allow-list of names. Nothing named in a config is ever imported."""

from typing import Any

from bmfm_pipeline.errors import ConfigError, closest

_CONFIG = "bmfm_targets.config."
_DATASETS = "bmfm_targets.datasets."

BUILDABLE_MODELS = ("scbert", "scmodernbert", "scperformer", "scnystromformer", "scllama")
_LLAMA = ("LlamaForMultiTaskConfig", "LlamaForMaskedLMConfig", "LlamaForSequenceClassification")
_PLACES_OF_LLAMA = (_CONFIG, "bmfm_targets.models.predictive.llama.")
MODEL_TARGETS = {
    _CONFIG + "SCBertConfig": "scbert",
    _CONFIG + "SCModernBertConfig": "scmodernbert",
    _CONFIG + "SCPerformerConfig": "scperformer",
    _CONFIG + "SCNystromformerConfig": "scnystromformer",
    **{place + name: "scllama" for place in _PLACES_OF_LLAMA for name in _LLAMA},
}
TASK_TARGETS = {
    _CONFIG + "TrainingTaskConfig": "train",
    _CONFIG + "TestTaskConfig": "test",
    _CONFIG + "PredictTaskConfig": "predict",
    _CONFIG + "InterpretTaskConfig": "interpret",
}
# Data modules: the dataset of the catalogue that each stands for; None is any h5ad file.
DATA_MODULE_TARGETS: dict[str, str | None] = {
    "bmfm_targets.training.data_module.DataModule": None,
    _DATASETS + "zheng68k.Zheng68kDataModule": "zheng68k",
    _DATASETS + "panglaodb.PanglaoDBDataModule": "panglaodb",
    _DATASETS + "scp1884.SCP1884DataModule": "scp1884",
}
SECTION_TARGETS: dict[str, tuple[str, ...]] = {
    "seed": (_CONFIG + "SeedConfig",),
    "tokenizer": (_CONFIG + "TokenizerConfig",),
    "fields": (_CONFIG + "FieldInfo",),
    "pretrained_embedding": (_CONFIG + "PreTrainedEmbeddingConfig",),
    "label_columns": (_CONFIG + "LabelColumnInfo",),
    "data_module": tuple(DATA_MODULE_TARGETS),
    "model": tuple(MODEL_TARGETS),
    "trainer": (_CONFIG + "TrainerConfig",),
    "lora_config": (_CONFIG + "LoraConfigWrapper",),
    "task": tuple(TASK_TARGETS),
}


def check_targets(value: Any, path: str = "") -> None:
    """Refuse every `_target_` that is not the known name for the section it stands in.

    Raises ConfigError naming the target and its place; the name is compared, never imported or run.
    """
    if isinstance(value, list):
        for index, entry in enumerate(value):
            check_targets(entry, f"{path}.{index}")
    elif isinstance(value, dict):
        if "_target_" in value:
            _check_one(str(value["_target_"]), path)
        for name, entry in value.items():
            check_targets(entry, f"{path}.{name}" if path else str(name))


def _check_one(target: str, path: str) -> None:
    names = [part for part in path.split(".") if not part.isdigit()]
    section = names[-1] if names else ""
    allowed = SECTION_TARGETS.get(section, ())
    if target in allowed:
        return
    # The last part is compared: a package path differs less from another than a class does from its neighbour.
    by_class = {name.rpartition(".")[2]: name for name in allowed}
    close = closest(target.rpartition(".")[2], by_class, 0.75)
    hint = (
        f"did you mean '{by_class[close]}'?"
        if close
        else f"allowed here: {', '.join(allowed)}"
        if allowed
        else "no _target_ may stand here"
    )
    raise ConfigError(
        f"{path or 'config'}._target_: '{target}' is refused: it is not a known name for this section, and nothing was run; {hint}"
    )
