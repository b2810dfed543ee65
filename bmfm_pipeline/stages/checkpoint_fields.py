"""Fields of a training that starts from a checkpoint: what a field is, is said by the weights; what is learned of it, by the config."""

from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.sections import FieldInfo
from bmfm_pipeline.config.sequences import FIELD
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.models import CheckpointSource
from bmfm_pipeline.storage import load_artefact, read_json

# Special tokens and letters together are fewer than this.
MOST_LETTERS = 16
# Keys that shape the weights of a field's embedding.
OF_THE_WEIGHTS = ("tokenization_strategy", "encoder_kwargs", "pretrained_embedding", "is_input")


def with_static_vocabularies(run: RunConfig) -> RunConfig:
    """The run without dynamic vocabularies: weights that exist know no further tokens."""
    dynamic = [entry.field_name for entry in run.fields if entry.vocab_update_strategy == "dynamic"]
    if not dynamic:
        return run
    fields = [entry.model_copy(update={"vocab_update_strategy": "static"}) for entry in run.fields]
    run = run.model_copy(update={"fields": fields, "notes": list(run.notes)})
    run.note(
        f"fields: the vocabulary of {', '.join(dynamic)} stays as the checkpoint has it (vocab_update_strategy static)"
    )
    return run


def with_fields_of(run: RunConfig, source: CheckpointSource | Job | None) -> RunConfig:
    """The run with the fields of the checkpoint first, each as its weights need it, and fields of other names behind them.

    A definition in the config that differs is not used, and a note says so. Whether a field is masked and which heads it has are the
    config's to say. Raises ConfigError where its losses do not fit the fields of the checkpoint.
    """
    if source is None:
        return run
    run = _without_words_of_pieces(with_static_vocabularies(run), source)
    own = {entry.field_name: entry for entry in run.fields}
    fields, notes = [], []
    for stored in _fields(source):
        theirs = FieldInfo.model_validate({key: stored[key] for key in FieldInfo.model_fields if key in stored})
        mine = own.pop(theirs.field_name, None)
        if mine is not None:
            other = [key for key in OF_THE_WEIGHTS if getattr(mine, key) != getattr(theirs, key)]
            if other:
                notes.append(
                    f"fields: {theirs.field_name}: {', '.join(other)} as the checkpoint has it, not as the config says"
                )
            fields.append(mine.model_copy(update={key: getattr(theirs, key) for key in OF_THE_WEIGHTS}))
        elif theirs.is_input:
            notes.append(f"fields: {theirs.field_name} is added: the checkpoint reads it")
            rest = {"is_masked": False, "decode_modes": {}, "vocab_update_strategy": "static"}
            fields.append(theirs.model_copy(update=rest))
    fields += own.values()
    if fields == run.fields:
        return run
    plain = {**run.model_dump(mode="json"), "fields": [entry.model_dump(mode="json") for entry in fields]}
    if (
        run.preset_used
        and run.data_module.sqrt_normalize_transform
        and not any(x.continuous for x in fields if x.is_input)
    ):
        plain["data_module"]["sqrt_normalize_transform"] = plain["model"]["linear_path"] = False
        notes.append(
            f"preset {run.preset_used}: the checkpoint reads expressions as tokens, so nothing is read as numbers"
        )
    changed = RunConfig.model_validate(plain)
    for text in notes:
        changed.note(text)
    return changed


def _without_words_of_pieces(run: RunConfig, source: CheckpointSource | Job) -> RunConfig:
    """The run without the preset's linear path where the checkpoint reads pieces of sequences: it counts words of single letters."""
    if not (run.preset_used and run.data_module.sequences and run.model.linear_path) or isinstance(source, Job):
        return run
    size = next(
        (entry.get("vocab_size") or 0 for entry in _fields(source, "config.json") if entry["field_name"] == FIELD), 0
    )
    if size <= MOST_LETTERS:
        return run
    run = run.model_copy(
        update={"model": run.model.model_copy(update={"linear_path": False}), "notes": list(run.notes)}
    )
    run.note(
        f"preset {run.preset_used}: no linear path, for the checkpoint reads pieces of sequences, not single letters"
    )
    return run


def _fields(source: CheckpointSource | Job, of_stages: str = "bmfm.json") -> list[dict[str, Any]]:
    """The fields that a checkpoint was trained with; `of_stages` is the file of an artefact that is read."""
    if isinstance(source, Job):
        return source.config["fields"]
    if source.stage:
        return read_json(load_artefact(source.uri).local_file(of_stages))["fields"]
    from bmfm_pipeline.models import model_folder

    folder = Path(model_folder(source.uri))
    file = next(folder / name for name in ("bmfm.json", "config.json") if (folder / name).exists())
    return read_json(file)["fields"] or []
