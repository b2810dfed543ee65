"""Columns whose cells may have several classes at once, scored class by class: a cell has it, or has it not."""

import logging

import numpy as np

from bmfm_pipeline.evaluation.metric_kinds.several import several_metrics
from bmfm_pipeline.evaluation.predictions import LabelPredictions
from bmfm_pipeline.evaluation.rows import Evaluation, Settings, add_score

logger = logging.getLogger(__name__)
ANSWERS = ["no", "yes"]
# Each class has its own metrics, intervals and controls; beyond this many only the commonest are scored.
MOST_CLASSES = 50


def scored_classes(column: str, values: np.ndarray, names: list[str]) -> dict[str, int]:
    """{name of the target: position of the class}: the classes of `values` (cells, classes) that are scored, in their order."""
    counts = (values > 0).sum(axis=0)
    known = np.flatnonzero((values >= 0).any(axis=0))
    chosen = known[np.argsort(-counts[known], kind="stable")][:MOST_CLASSES]
    if len(chosen) < len(known):
        logger.warning("%s: the %d commonest of %d classes are scored", column, len(chosen), len(known))
    return {f"{column}: {names[position]}": int(position) for position in np.sort(chosen)}


def by_class(
    labels: dict[str, np.ndarray], class_names: dict[str, list[str]]
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Labels of all cells with one column of ids per class, 0 no, 1 yes, -100 unknown, where a column is (cells, classes)."""
    found, names = {}, {}
    for column, values in labels.items():
        if values.ndim == 1:
            found[column] = values
            if column in class_names:
                names[column] = class_names[column]
            continue
        for target, position in scored_classes(column, values, class_names[column]).items():
            found[target], names[target] = values[:, position].astype(np.int64), ANSWERS
    return found, names


def predictions_by_class(
    predicted: dict[str, LabelPredictions], labels: dict[str, np.ndarray]
) -> dict[str, LabelPredictions]:
    """The same for predictions; `labels` are those of all cells, which say the classes to score."""
    found = {}
    for column, entry in predicted.items():
        if not entry.has_several:
            found[column] = entry
            continue
        for target, position in scored_classes(column, labels[column], entry.class_names).items():
            yes = entry.probabilities[:, position]
            found[target] = LabelPredictions(
                entry.truth[:, position].astype(np.int64),
                entry.predicted[:, position].astype(np.int64),
                np.stack([1 - yes, yes], axis=1),
                ANSWERS,
                part_of=column,
            )
    return found


def score_together(
    result: Evaluation,
    model: dict[str, LabelPredictions],
    controls: dict[str, dict[str, LabelPredictions]],
    settings: Settings,
) -> None:
    """Rows of each column whose classes were split, over all its scored classes: model and the controls that have all of them."""
    columns: dict[str, list[str]] = {}
    for target, entry in model.items():
        if entry.part_of is not None:
            columns.setdefault(entry.part_of, []).append(target)
    for column, targets in columns.items():
        truth = np.stack([model[target].truth for target in targets], axis=1)
        labelled = (truth >= 0).any(axis=1)
        if not labelled.any():
            continue
        groups = None if settings.groups is None else np.asarray(settings.groups)[labelled]
        for name, labels in {"model": model, **controls}.items():
            if any(target not in labels for target in targets):
                continue
            said = np.stack([labels[target].predicted for target in targets], axis=1)
            scores = [labels[target].probabilities for target in targets]
            known = not any(entry is None for entry in scores)
            yes = np.stack([entry[:, 1] for entry in scores], axis=1)[labelled] if known else None
            for metric in several_metrics(truth[labelled], said[labelled], yes):
                add_score(result, metric, column, name, settings, groups)
        result.notes.append(
            f"{column}: scores over its {len(targets)} scored classes together, by cell; then each class by itself"
        )
