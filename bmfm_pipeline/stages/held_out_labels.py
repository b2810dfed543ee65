"""Labels of other data beside the classes of a model, as an evaluation's settings relate them."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.data.label_files import few, read_label_dict
from bmfm_pipeline.data.label_ontology import FILE
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.evaluation.common_classes import CommonClasses, relate
from bmfm_pipeline.evaluation.label_mapping import LabelMapping
from bmfm_pipeline.storage import localise, read_json, strip_userinfo
from bmfm_pipeline.vocabulary.ontology import Ontology


def chosen_cells(
    only: Mapping[str, Sequence[str]] | None, column_of: Callable[[str], np.ndarray], columns: Sequence[str], n: int
) -> np.ndarray:
    """bool (n,): the cells that evaluation.only_cells names. ConfigError for a column, or a value, that there is not."""
    chosen = np.ones(n, dtype=bool)
    for name, values in (only or {}).items():
        if name not in columns:
            raise ConfigError(f"evaluation.only_cells: obs has no column '{name}' (columns: {few(columns, 30)})")
        own = column_of(name).astype(str)
        if absent := [value for value in values if value not in own]:
            raise ConfigError(
                f"evaluation.only_cells: no cell has {few(absent)} in obs['{name}']; there are {few(sorted(set(own)))}"
            )
        chosen &= np.isin(own, list(values))
    if not chosen.any():
        raise ConfigError("evaluation.only_cells: no cell has all of these values")
    return chosen


def relate_column(
    run: RunConfig,
    training: Path,
    column: str,
    obs_column: str,
    counts: Mapping[str, int],
    where: str,
    many: bool = False,
) -> CommonClasses:
    """How the labels `counts` {label: cells} of one obs column and the classes of the model's label column meet.

    `training` is the folder of the data that the model was trained on. Raises DataError and ConfigError.
    """
    settings = run.evaluation
    if not counts:
        raise DataError(f"{where}: no cell that is to be tested has a label in obs['{obs_column}']")
    classes = classes_of(training, column)
    mapping = ontology = None
    if settings.label_mapping is not None:
        if many:
            raise ConfigError(
                "evaluation.label_mapping: a mapping is about one label column, and several are tested; choose one with label=COLUMN"
            )
        uri = require_path(settings.label_mapping, "evaluation.label_mapping")
        mapping = LabelMapping.read(localise(uri), strip_userinfo(str(uri)))
    if settings.label_ontology is not None:
        uri = require_path(settings.label_ontology.file, "evaluation.label_ontology.file")
        ontology = _read(str(localise(uri)), strip_userinfo(str(uri)))
    return relate(
        column, obs_column, counts, classes, mapping, ontology, settings.label_ontology, _terms(training, column), where
    )


def classes_of(training: Path, column: str) -> list[str]:
    """The classes of a label column in id order, from the folder of the training data."""
    known = read_label_dict(training / "label_dict.json")[column]
    return sorted(known, key=known.get)


@lru_cache(maxsize=1)
def _read(path: str, name: str) -> Ontology:
    return Ontology.read(path, name)


def _terms(training: Path, column: str) -> dict[str, str | None]:
    """The terms of the model's classes, where its training placed them in an ontology."""
    file = training / FILE
    return read_json(file).get(column, {}).get("terms", {}) if file.exists() else {}


def already_known(
    run: RunConfig, training: Path, column: str, obs_column: str, counts: Mapping[str, int]
) -> dict[str, str | None]:
    """{label: class} of the labels that name and ontology relate by themselves, for a mapping that is begun."""
    classes = classes_of(training, column)
    found = {label: label for label in counts if label in classes}
    settings = run.evaluation.label_ontology
    if settings is None:
        return found
    lenient = settings.model_copy(update={"unmapped": "flat"})
    uri = require_path(settings.file, "evaluation.label_ontology.file")
    ontology = _read(str(localise(uri)), strip_userinfo(str(uri)))
    try:
        common = relate(column, obs_column, counts, classes, None, ontology, lenient, _terms(training, column))
    except DataError:
        return found
    return {label: common.names[place] for label, place in common.of_label.items()}
