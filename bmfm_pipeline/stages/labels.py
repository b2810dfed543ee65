"""The user's label dictionary as an input of preprocessing, and as a file that runs add their columns to."""

from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.data.label_files import extend_label_dict, read_label_dict
from bmfm_pipeline.errors import DataError, StorageError
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.storage import (
    content_hash,
    exists,
    hash_json,
    is_remote,
    local_path,
    localise,
    place_copy,
    strip_userinfo,
)

KEY = "data_module.dataset_kwargs.label_dict_path"


def dictionary_path(run: RunConfig) -> str | None:
    """Where the config keeps its label dictionary."""
    path = run.data_module.dataset_kwargs.label_dict_path
    return require_path(path, KEY) if path else None


def label_input(run: RunConfig) -> dict[str, dict[str, Any]]:
    """The ids that the file at label_dict_path has for this run's label columns, by role; empty when it has none.

    Other columns of the file change nothing, so they do not enter: runs with other labels may share one file.
    """
    known = _stored(run)
    if not known:
        return {}
    return {"label_dict": {"id": hash_json(known), "uri": strip_userinfo(dictionary_path(run))}}


def _stored(run: RunConfig) -> dict[str, dict[str, int]]:
    path = dictionary_path(run)
    if path is None or not exists(path):
        return {}
    stored = read_label_dict(localise(path))
    names = [column.label_column_name for column in run.label_columns if not column.is_regression_label]
    return {name: stored[name] for name in names if name in stored}


def input_dictionary(job: Job, run: RunConfig) -> Path | None:
    """The file to take ids from; StorageError when it changed since the job was planned."""
    if "label_dict" not in job.inputs:
        return None
    if hash_json(_stored(run)) != job.inputs["label_dict"]["id"]:
        raise StorageError(f"{dictionary_path(run)}: changed since the run began; run again to use its ids")
    return localise(dictionary_path(run))


def ontology_inputs(run: RunConfig, memo) -> dict[str, dict[str, Any]]:
    """The ontologies of label columns by role, each with the hash of its content."""
    inputs = {}
    for index, column in enumerate(run.label_columns):
        if column.label_ontology is not None:
            key = f"label_columns.{index}.label_ontology.file"
            uri = require_path(column.label_ontology.file, key)
            if not exists(uri):
                raise DataError(f"{key}: {strip_userinfo(uri)} does not exist; name an OBO or OWL file")
            inputs[_ontology_role(column)] = {"id": content_hash(uri, memo), "uri": strip_userinfo(uri)}
    return inputs


def _ontology_role(column) -> str:
    return f"ontology_{column.label_column_name}"


def place_in_ontologies(job: Job, run: RunConfig, labels: dict[str, dict[str, int]]) -> dict[str, dict[str, Any]]:
    """{label column: its classes in its ontology} of the columns that name one; DataError where classes have no place in it."""
    from bmfm_pipeline.data.label_ontology import place_classes
    from bmfm_pipeline.vocabulary.ontology import Ontology

    placed, read = {}, {}
    for column in run.label_columns:
        if column.label_ontology is None:
            continue
        uri = require_path(column.label_ontology.file, "label_ontology.file")
        planned = job.inputs[_ontology_role(column)]["id"]
        if content_hash(uri) != planned:
            raise StorageError(
                f"{strip_userinfo(uri)}: changed since the run began; run again to use what is there now"
            )
        if planned not in read:
            read[planned] = Ontology.read(localise(uri), strip_userinfo(uri))
        name = column.label_column_name
        placed[name] = place_classes(column, labels[name], read[planned])
    return placed


def says_nothing_new(run: RunConfig, artefact_folder: Path) -> bool:
    """Whether the file at label_dict_path has the ids that an artefact made without it has: the file is then its own copy."""
    made = read_label_dict(artefact_folder / "label_dict.json")
    return all(made.get(name) == ids for name, ids in _stored(run).items())


def place_dictionary(run: RunConfig, file: Path) -> str:
    """Make the file at label_dict_path, or append the columns that it lacks; nothing that is there changes.

    A remote file cannot be appended to safely: StorageError names the columns that it lacks.
    """
    path, labels = dictionary_path(run), read_label_dict(file)
    if not is_remote(path):
        extend_label_dict(local_path(path), labels)
    elif not exists(path):
        place_copy(file, path)
    else:
        stored = read_label_dict(localise(path))
        if lacking := [name for name, ids in labels.items() if stored.get(name) != ids]:
            raise StorageError(
                f"{strip_userinfo(path)}: has no ids, or other ones, for {', '.join(lacking)}, and a remote dictionary is not extended; add "
                f"them from {file}, or name another file"
            )
    return path


def lost_classes(run: RunConfig, obs, processed: Path) -> dict[str, dict[str, int]]:
    """{label column: {class: its cells in the input}} of classes that no cell of the processed file has: filters removed them all."""
    from bmfm_pipeline.data.store import CellStore

    store, lost = CellStore(processed), {}
    for entry in run.label_columns:
        name = entry.label_column_name
        if entry.is_regression_label or entry.is_multilabel or name not in obs:
            continue
        left = {str(value) for value in store.column(name)}
        counts = obs[name].value_counts()
        if gone := {str(value): int(count) for value, count in counts.items() if count and str(value) not in left}:
            lost[name] = gone
    return lost
