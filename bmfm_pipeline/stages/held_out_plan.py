"""Planning the test of a model of the workspace on data that it does not come from: another study's cells, with that study's labels."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.config.strict import readable
from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.errors import ConfigError, DataError, StorageError, did_you_mean
from bmfm_pipeline.stages.fitted_chain import transforms_input
from bmfm_pipeline.stages.inputs import cells_input, find_source, source_inputs
from bmfm_pipeline.stages.jobs import Job, make_job
from bmfm_pipeline.stages.prediction_settings import keep_labels
from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    content_hash,
    exists,
    is_remote,
    join_uri,
    load_artefact,
    localise,
    read_json,
    strip_userinfo,
)

# Roles among the inputs of an evaluation: the data that the model was trained on, and those that earlier trainings of it read.
TRAINING, EARLIER = "training_data", "earlier_data"
# The weights that its training began from, where how these were trained is not known.
UNKNOWN_START = "started_from"
MAPPING, ONTOLOGY = "label_mapping", "label_ontology"
# What may be said of how other data lie in their files.
READING = tuple(
    f"data_module.{name}" for name in ("data_dir", "transform_kwargs.layer", "transform_kwargs.cell_names", "transform_kwargs.duplicate_genes")
)  # fmt: skip


def says_how_to_read(word: str) -> bool:
    """Whether an override says how the cells lie in their file."""
    return word.lstrip("+~").split("=", 1)[0] in READING


def is_held_out(test: RunConfig, model: Artefact, place: Workspace) -> bool:
    """Whether the data that `test` names are others than those that the model comes from, by content."""
    source = cells_input(test, place)["id"]
    return source != _training_data(model).inputs.get("source", {}).get("id")


def _training_data(model: Artefact) -> Artefact:
    try:
        return load_artefact(model.inputs["data"]["uri"])
    except StorageError:
        raise StorageError(
            f"{strip_userinfo(model.uri)}: the data that it was trained on ({model.inputs['data']['uri']}) are missing or damaged; controls "
            "are fitted on them, and test cells compared with them. Run `bmfm preprocess` (or `bmfm run`) again to rebuild them"
        ) from None


def refuse_held_out_keys(test: RunConfig) -> None:
    """Raise ConfigError for keys that are read for other data alone, where a model is tested on its own split."""
    if found := test.evaluation.for_held_out:
        raise ConfigError(
            f"evaluation: {', '.join(found)} {'is' if len(found) == 1 else 'are'} for data that a model of the workspace does not come from; "
            "name another file (`bmfm evaluate OTHER.h5ad label=COLUMN task.checkpoint=MODEL`), or leave "
            f"{'it' if len(found) == 1 else 'them'} out"
        )


def plan_data(test: RunConfig, model: Artefact, name: str, place: Workspace) -> Job:
    """The preprocessing of other data for a model: nothing is fitted, no cell is filtered out, all cells are test cells."""
    run = preparing_run(test, model)
    inputs = source_inputs(run, place) | transforms_input(_address(model), place.memo)
    return make_job("preprocess", name, place, run.model_dump(mode="json"), run.key_view("preprocess"), inputs)


def _address(model: Artefact) -> str:
    """Where a model lies, from whichever folder the job is run."""
    return model.uri if is_remote(model.uri) else str(Path(model.uri).absolute())


def preparing_run(test: RunConfig, model: Artefact) -> RunConfig:
    """The run that prepares the cells which `test` names as the training cells of `model` were. Labels are looked at when it is tested."""
    stored = read_json(model.local_file("run_config.json"))
    own, named = stored["data_module"], test.model_dump(mode="json")["data_module"]
    if (own.get("sequences") is None) != (test.data_module.sequences is None):
        reads, holds = ("cells", "sequences") if own.get("sequences") is None else ("sequences", "cells")
        raise ConfigError(f"evaluate: the model reads {reads}, and the data hold {holds}; name data of {reads}")
    if own.get("sequences") is not None:
        from bmfm_pipeline.stages.sequences.held_out import sequences_to_prepare

        tokenizers = join_uri(_address(model), "tokenizers")
        return _valid(sequences_to_prepare(test, stored, tokenizers, _class_columns(test, model)))
    kwargs, theirs = own["transform_kwargs"], named["transform_kwargs"]
    raw, repeated = own["transform_datasets"], theirs["duplicate_genes"]
    values = {
        "seed": stored["seed"],
        "dataset": test.dataset,
        "tokenizer": {
            "identifier": join_uri(_address(model), "tokenizers"),
            "prepend_tokens": stored["tokenizer"].get("prepend_tokens"),
        },
        "data_module": {
            "data_dir": named["data_dir"],
            "transform_kwargs": {
                **{key: theirs[key] for key in ("source_h5ad_file_name", "layer", "cell_names")},
                "duplicate_genes": kwargs["duplicate_genes"] if repeated == "refuse" else repeated,
                "input_values": kwargs["input_values"] if raw else "any",
                "transforms": kwargs["transforms"] if raw else [],
                # As in prediction, a model that knows few of the counts is no reason to refuse: the share is told.
                "gene_names": {"duplicates": kwargs["gene_names"]["duplicates"], "min_share_of_counts": 0},
                "split": {"method": "random", "weights": {"train": 0, "dev": 0, "test": 1}},
            },
        },
    }
    return _valid(values)


def _class_columns(test: RunConfig, model: Artefact) -> list[str]:
    """The columns of the other data that hold one class each."""
    values, pairs = trained_run(test, model)
    plain = [entry for entry in values["label_columns"] if not (entry["is_regression_label"] or entry["is_multilabel"])]
    return [pairs[entry["label_column_name"]] for entry in plain]


def _valid(values: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise readable(error) from None


def trained_run(test: RunConfig, model: Artefact) -> tuple[dict[str, Any], dict[str, str]]:
    """(the model's stored run with the label columns that are tested, {label column of the model: obs column of the other data})."""
    values = read_json(model.local_file("run_config.json"))
    columns = [entry["label_column_name"] for entry in values["label_columns"]]
    pairs = dict(test.evaluation.label_from or {})
    asked = [column.label_column_name for column in test.label_columns]
    if strangers := [name for name in pairs if name not in columns]:
        hint = did_you_mean(strangers[0], columns, before="; ")
        raise ConfigError(
            f"evaluation.label_from: the model predicts {', '.join(columns) or 'no label'}, not {', '.join(strangers)}{hint}"
        )
    asked = [name for name in asked if name not in pairs.values()]
    same = [name for name in asked if name in columns]
    if same:
        pairs |= {name: name for name in same if name not in pairs}
    elif len(asked) == 1 and len(columns) == 1 and not pairs:
        pairs[columns[0]] = asked[0]
    elif asked and columns and not pairs:
        raise ConfigError(
            f"label={asked[0]}: the model predicts {', '.join(columns)}; say which of these obs['{asked[0]}'] holds with "
            f"evaluation.label_from={{{columns[0]}: {asked[0]}}}"
        )
    pairs = pairs or {name: name for name in columns}
    if pairs:
        keep_labels(values, list(pairs))
    return values, pairs


def held_out_inputs(test: RunConfig, model: Artefact, place: Workspace) -> dict[str, dict[str, Any]]:
    """Inputs of the evaluation beside model and data: training data, and what relates the labels."""
    data = _training_data(model)
    inputs = {TRAINING: {"id": data.key, "uri": data.uri, "stage": data.stage}}
    known = {data.key}
    earlier, unknown = _earlier_models(model)
    for artefact in earlier:
        entry = artefact.inputs.get("data", {})
        if entry.get("stage") and entry["id"] not in known:
            known.add(entry["id"])
            inputs[f"{EARLIER}_{len(known) - 1}"] = entry
    if unknown is not None:
        inputs[UNKNOWN_START] = {"id": unknown["id"], "uri": strip_userinfo(unknown["uri"])}
    settings = test.evaluation
    ontology = settings.label_ontology.file if settings.label_ontology else None
    for role, named in ((MAPPING, settings.label_mapping), (ONTOLOGY, ontology)):
        if named is None:
            continue
        key = f"evaluation.{role}"
        uri = require_path(named, key)
        if not exists(uri):
            raise DataError(f"{key}: {strip_userinfo(uri)} does not exist")
        inputs[role] = {"id": content_hash(uri, place.memo), "uri": strip_userinfo(str(uri))}
    return inputs


def _earlier_models(model: Artefact) -> tuple[list[Artefact], dict[str, Any] | None]:
    """(the models that training began from, the input that is the last of them where how that was trained is not known)."""
    found: list[Artefact] = []
    while (start := (found[-1] if found else model).inputs.get("checkpoint")) is not None:
        try:
            artefact = load_artefact(start["uri"]) if start.get("stage") else None
        except StorageError:
            artefact = None
        if artefact is None:
            return found, start
        found.append(artefact)
    return found, None


@contextmanager
def opened_sources(test: RunConfig, model: Artefact) -> Iterator[list]:
    """The files that `test` names, opened one by one, to look at their tables."""
    from bmfm_pipeline.data.sources import open_source
    from bmfm_pipeline.data.sources.converting import convert
    from bmfm_pipeline.stages.conversion import needs_conversion

    if test.data_module.sequences is not None:
        from bmfm_pipeline.stages.sequences.held_out import opened_tables

        yield list(opened_tables(test, _class_columns(test, model)))
        return
    source, settings = find_source(test), test.data_module.transform_kwargs
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: localise(uri) for name, uri in source.files.items()} or {"": source.open_path(Path(folder))}
        found = []
        for name, path in paths.items():
            if not source.builder and needs_conversion(path):
                target = Path(folder) / f"{len(found)}.h5ad"
                convert(path, target, settings.reading)
                path = target
            found.append(open_source(path, settings.layer, settings.duplicate_genes, scratch=Path(folder)))
            found[-1].named = name
        yield found


@contextmanager
def _class_files(model: Artefact) -> Iterator[Path]:
    """A folder with what the training data of the model say of its classes; the cells stay where they are."""
    data = _training_data(model)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("label_dict.json", "label_ontology.json"):
            if name in data.files:
                shutil.copyfile(data.local_file(name), Path(folder) / name)
        yield Path(folder)


def look_at_labels(test: RunConfig, model: Artefact) -> None:
    """Raise DataError or ConfigError for labels that cannot be scored, before anything is computed."""
    from bmfm_pipeline.stages.held_out_labels import relate_column

    values, pairs = trained_run(test, model)
    with _class_files(model) as training, opened_sources(test, model) as sources:
        for entry in values["label_columns"]:
            if pairs and not (entry["is_regression_label"] or entry["is_multilabel"]):
                name = entry["label_column_name"]
                counts, where = label_counts(sources, entry, pairs, test)
                relate_column(test, training, name, pairs[name], counts, where, many=len(pairs) > 1)


def labels_without_mapping(test: RunConfig, model: Artefact) -> dict[str, dict[str, int]]:
    """{label column: {label: cells}} of labels that are no class of the model, where nobody says what they mean.

    Empty where a mapping or an ontology does, and for more than one label column, whose labels no mapping can relate.
    """
    from bmfm_pipeline.stages.held_out_labels import classes_of

    values, pairs = trained_run(test, model)
    entries = [
        entry for entry in values["label_columns"] if not (entry["is_regression_label"] or entry["is_multilabel"])
    ]
    if test.evaluation.label_mapping or test.evaluation.label_ontology or not pairs or len(pairs) > 1 or not entries:
        return {}
    column = entries[0]["label_column_name"]
    with _class_files(model) as training, opened_sources(test, model) as sources:
        counts, _ = label_counts(sources, entries[0], pairs, test)
        classes = set(classes_of(training, column))
    left = {label: count for label, count in counts.items() if label not in classes}
    return {column: left} if left and len(left) < len(counts) else {}


def label_counts(
    sources: Sequence[Any], entry: dict[str, Any], pairs: dict[str, str], test: RunConfig
) -> tuple[dict[str, int], str]:
    """({label: cells}, what messages call the data) of one label column over all files; ConfigError where there is no such column."""
    import pandas as pd

    from bmfm_pipeline.data.sources.several import FILE_COLUMN
    from bmfm_pipeline.evaluation.common_classes import count_labels
    from bmfm_pipeline.stages.held_out_labels import chosen_cells

    column, only = pairs[entry["label_column_name"]], test.evaluation.only_cells
    tables = []
    for source in sources:
        columns = [str(name) for name in source.obs.columns]
        refuse_missing_column(column, columns, str(source.path))
        needed = [name for name in dict.fromkeys([column, *(only or {})]) if name in columns]
        tables.append(source.obs[needed].astype(object))
        if len(sources) > 1:
            tables[-1][FILE_COLUMN] = source.named
    obs = pd.concat(tables, ignore_index=True)
    chosen = chosen_cells(only, lambda name: obs[name].to_numpy(), list(obs.columns), len(obs))
    where = str(sources[0].path) if len(sources) == 1 else f"{len(sources)} files"
    return count_labels(obs[column].to_numpy()[chosen], entry["silent_label_values"]), where


def refuse_missing_column(column: str, columns: list[str], where: str) -> None:
    if column not in columns:
        hint = did_you_mean(column, columns, before="; ")
        raise ConfigError(
            f"{where}: obs has no column '{column}'{hint} (columns: {few(columns, 30) or 'none'}); name the one that holds the labels with "
            "label=COLUMN"
        )


def write_mapping_template(test: RunConfig, model: Artefact, file: str) -> dict[str, Any]:
    """Write the labels of the data that `test` names as a csv file to fill in: {file, labels, to_fill_in, model_classes}."""
    from bmfm_pipeline.evaluation.label_mapping import write_template
    from bmfm_pipeline.stages.held_out_labels import already_known, classes_of

    values, pairs = trained_run(test, model)
    entries = [
        entry for entry in values["label_columns"] if not (entry["is_regression_label"] or entry["is_multilabel"])
    ]
    if len(entries) != 1:
        names = ", ".join(entry["label_column_name"] for entry in entries)
        raise ConfigError(
            f"--write-label-mapping: a mapping is about one label column with one class a cell, and the model predicts {names or 'none'}; "
            "choose one with label=COLUMN"
        )
    column = entries[0]["label_column_name"]
    with _class_files(model) as training, opened_sources(test, model) as sources:
        counts, _ = label_counts(sources, entries[0], pairs, test)
        classes = classes_of(training, column)
        known = already_known(test, training, column, pairs[column], counts)
    left = write_template(file, counts, classes, known)
    return {"file": str(Path(file).expanduser().absolute()), "labels": len(counts), "to_fill_in": left, "model_classes": classes}  # fmt: skip
