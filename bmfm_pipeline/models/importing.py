"""Any name of weights as a model folder: a folder or artefact as it is; a .ckpt file or a repository of the hub as a folder made once."""

import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import CheckpointError, ConfigError, StorageError
from bmfm_pipeline.storage import is_remote, load_artefact, local_path, localise, write_json_atomic
from bmfm_pipeline.storage.checkpoint_files import (
    BESIDE_WEIGHTS,
    checkpoint_hash,
    fetch_checkpoint,
    is_checkpoint_file,
    neighbours,
)
from bmfm_pipeline.storage.hub import HubName, fetch_repository, read_hub_name

# What the trainer section of a published checkpoint says that a run of ours can be told.
_OF_TRAINER = (
    "losses", "learning_rate", "betas", "epsilon", "weight_decay", "warmup_steps", "lr_decay_steps", "pooling_method",
)  # fmt: skip


def model_folder(uri: str | Path) -> Path:
    """The local model folder behind `uri`: config.json, model.safetensors and what travels with them.

    `uri` is a folder (or the artefact that has one), a `.ckpt` file of this pipeline or of bmfm_targets, or a repository `org/name`,
    `hf://org/name@revision`. Remote files are fetched, and what is no model folder yet is converted, once for each content.
    Raises CheckpointError or StorageError.
    """
    text = str(uri)
    if (name := read_hub_name(text)) is not None:
        return _of_repository(name)
    if is_checkpoint_file(text):
        return _converted(fetch_checkpoint(text), text)
    if is_remote(text):
        try:
            return load_artefact(text).local()
        except StorageError:
            return localise(text)
    folder = local_path(text)
    if folder.is_file():
        raise CheckpointError(
            f"{uri}: is a single file; name a model folder (config.json, model.safetensors, tokenizers/), or a .ckpt checkpoint"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{uri}: no such folder; give a folder written by save_pretrained, the URI of a model artefact, a .ckpt file, or a repository "
            "of the hub as org/name"
        )
    inner = folder / "model"
    return inner if not (folder / "config.json").exists() and (inner / "config.json").exists() else folder


def _of_repository(name: HubName) -> Path:
    folder = fetch_repository(name)
    if (folder / "config.json").exists() and any(folder.glob("model*.safetensors")):
        return folder
    return _converted(min(folder.glob("*.ckpt")), str(name))


def _converted(path: Path, source: str) -> Path:
    """The model folder made of a .ckpt file, from the cache where its content was converted before."""
    from bmfm_pipeline.storage import code_version
    from bmfm_pipeline.storage.cache import made_once

    version = code_version("bmfm_pipeline.models.importing")[:16]
    return made_once(
        "converted",
        checkpoint_hash(path)[:32],
        version,
        source,
        lambda folder: convert_checkpoint(path, folder, source),
    )


def convert_checkpoint(path: str | Path, folder: str | Path, source: str = "") -> None:
    """Write the model of a .ckpt file as a model folder into the empty `folder`.

    A checkpoint of bmfm_targets needs its tokenizers folder beside it, one of ours the model folder that it belongs to. What a published
    checkpoint does not carry (how cells are transformed, cut and ordered) is settled by defaults, which bmfm.json lists under `notes`.
    Raises CheckpointError.
    """
    from bmfm_pipeline.models.published import is_published, read_published
    from bmfm_pipeline.models.unpickling import CheckpointFile

    path, folder = Path(path), Path(folder)
    model, tokenizers = neighbours(path)
    with CheckpointFile(path) as file:
        if is_published(file):
            if tokenizers is None:
                raise CheckpointError(
                    f"{path}: needs the folder tokenizers that was written beside it; copy it there as well"
                )
            return _write_published(read_published(file), tokenizers, folder, source or str(path))
        if model is None:
            raise CheckpointError(
                f"{path}: holds weights without their configuration; name the model folder it belongs to, or leave the file where its "
                "training put it (MODEL/checkpoints/)"
            )
        _write_own(file, model, folder, source or str(path))


def _write_own(file: Any, model: Path, folder: Path, source: str) -> None:
    """A checkpoint of our own training: the model folder it belongs to, with its weights."""
    from bmfm_pipeline.models.loading import load_weights, read_config, refuse_misfits
    from bmfm_pipeline.models.registry import find_backbone

    state = {name: tensor for name, tensor in file.state_dict().items() if name.startswith("model.")}
    if any("lora_" in name for name in state):
        raise CheckpointError(
            f"{file.path}: holds adapters beside the weights; name the model folder {model}, where they are merged"
        )
    averages = file.averages()
    state |= {name: tensor for name, tensor in averages.items() if name in state}
    config = read_config(model)
    refuse_misfits(config, state, source)
    network = find_backbone(config.model_type).model_class(config)
    report = load_weights(network, state, source=source)
    if averages:
        report.notes.append("the moving averages of the weights are used, which validation scored")
    network.save_pretrained(folder)
    for name in BESIDE_WEIGHTS:
        if (model / name).is_dir():
            shutil.copytree(model / name, folder / name)
        elif (model / name).exists() and name != "config.json":
            shutil.copyfile(model / name, folder / name)
    write_json_atomic(folder / "loading_report.json", report.to_dict())


def _write_published(found: Any, tokenizers: Path, folder: Path, source: str) -> None:
    from transformers.utils.logging import disable_progress_bar

    from bmfm_pipeline.data.label_files import write_label_dict
    from bmfm_pipeline.models.published import build_published
    from bmfm_pipeline.vocabulary import MultiFieldVocabulary

    disable_progress_bar()
    vocabularies = MultiFieldVocabulary.load(tokenizers)
    for entry in found.fields:
        _add_vocabulary(entry, vocabularies, source)
    model, report = build_published(found, source)
    model.save_pretrained(folder)
    if any(vocabulary.subwords for vocabulary in vocabularies.values()):
        shutil.copytree(tokenizers, folder / "tokenizers")
    else:
        vocabularies.save(folder)
    labels = {}
    for entry in found.label_columns:
        name = entry["label_column_name"]
        if entry.get("is_regression_label"):
            continue
        if name not in found.label_dict:
            report.notes.append(f"label column {name}: the names of its classes are not stored, so they are numbers")
        labels[name] = found.label_dict.get(name) or {str(index): index for index in range(entry["n_unique_values"])}
    write_label_dict(folder / "label_dict.json", labels)
    steps, module, defaults = _default_settings(found)
    write_json_atomic(folder / "transforms.json", steps)
    run, more = _run_of(found, module)
    report.notes += more
    names = ("fields", "label_columns", "data_module", "tokenizer", "seed", "dataset", "preset_used")
    settings = {name: run[name] for name in names} | {"values_from": None, "defaults": defaults}
    write_json_atomic(folder / "bmfm.json", settings)
    write_json_atomic(folder / "run_config.json", run)
    write_json_atomic(folder / "loading_report.json", report.to_dict())


def _add_vocabulary(entry: dict[str, Any], vocabularies: Any, source: str) -> None:
    name, vocabulary = entry["field_name"], vocabularies.get(entry["field_name"])
    if vocabulary is None:
        if entry.get("tokenization_strategy", "tokenize") == "tokenize":
            raise CheckpointError(
                f"{source}: field {name} is read through a vocabulary, and the tokenizers beside the checkpoint are of "
                f"{', '.join(vocabularies)}"
            )
        return
    if entry.get("vocab_size") not in (None, len(vocabulary)) and "tokenize" in entry.get("tokenization_strategy", ""):
        raise CheckpointError(
            f"{source}: field {name} has {entry['vocab_size']} tokens, and the tokenizer beside the checkpoint {len(vocabulary)}; it belongs "
            "to another checkpoint"
        )
    entry["vocab_sha256"] = vocabulary.sha256


def _default_settings(found: Any) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """(transform chain, data module, what was chosen in words) for cells of a checkpoint that carries neither."""
    from bmfm_pipeline.config.catalogue import default_transforms, without_filters
    from bmfm_pipeline.data.transforms import build_chain

    continuous = any(
        entry.get("tokenization_strategy") == "continuous_value_encoder" and entry.get("is_input", True)
        for entry in found.fields
    )
    steps = [] if continuous else without_filters(default_transforms())
    length = max(16, int(found.settings.get("max_position_embeddings") or 512) // 16 * 16)
    module = {
        "max_length": length,
        "sequence_order": "sorted",
        "padding": "longest",
        "log_normalize_transform": continuous,
        "transform_kwargs": {"transforms": steps},
    }
    words = ", ".join(
        step["transform_name"].removesuffix("Transform")
        + "".join(f" {key}={value}" for key, value in step["transform_args"].items() if value is not None)
        for step in steps
    )
    said = [
        f"data_module.transform_kwargs.transforms: {words or 'none'}",
        f"data_module.log_normalize_transform: {str(continuous).lower()}",
        f"data_module.max_length: {length} (the model's max_position_embeddings)",
        "data_module.sequence_order: sorted (the most expressed genes first, equal ones as the file has them)",
    ]
    return build_chain(steps).to_json(), module, said


def _run_of(found: Any, module: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The run configuration that stands for a published checkpoint, as plain values, and notes on what it cannot say."""
    from bmfm_pipeline.config import RunConfig

    trainer = {name: found.trainer[name] for name in _OF_TRAINER if found.trainer.get(name) is not None}
    losses = trainer.get("losses") or []
    heads = {mode for entry in found.fields for mode in entry["decode_modes"]}
    module = dict(module)
    if "wced" in heads and any(entry.get("wced_target") for entry in losses):
        module |= {"masking_strategy": {"kind": "wced"}}
    of_fields = any(entry.get("field_name") for entry in losses)
    kind = "multitask" if of_fields else "sequence_classification"
    known = ("vocab_sha256", "class_names", "label_dict_hash")
    values = {
        "fields": [_run_field(entry, known) for entry in found.fields],
        "label_columns": [
            {key: value for key, value in entry.items() if key not in known} for entry in found.label_columns
        ],
        "model": {**found.settings, "model_type": found.model_type},
        "task": {"kind": "train"},
    }

    def run(trainer: dict[str, Any], kind: str) -> dict[str, Any]:
        own = {**module, "collation_strategy": kind, "mlm": kind == "multitask" and "masking_strategy" not in module}
        return RunConfig.model_validate({**values, "trainer": trainer, "data_module": own}).model_dump(mode="json")

    try:
        return run(trainer, kind), []
    except (ConfigError, ValueError) as error:
        reason = str(error).splitlines()[0]
    module.pop("masking_strategy", None)
    kept = {name: trainer[name] for name in ("pooling_method",) if name in trainer}
    return run(kept, "sequence_classification"), [f"its losses are not taken over ({reason})"]


def _run_field(entry: dict[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    field = {key: value for key, value in entry.items() if key not in left_out}
    return field | {"pretrained_embedding": None}  # its vectors are in the weights
