"""From stored predictions to the rows of metrics.json: model and controls side by side, per class, with verdicts in words."""

from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.intervals import RESAMPLING
from bmfm_pipeline.evaluation.metric_kinds.numbers import says_zero
from bmfm_pipeline.evaluation.metrics import Metric, confusion
from bmfm_pipeline.evaluation.pages.numbers import counted, with_interval
from bmfm_pipeline.evaluation.per_class import add_without_rare, per_class_table
from bmfm_pipeline.evaluation.predictions import TOP, LabelPredictions, Predictions
from bmfm_pipeline.evaluation.rows import Evaluation, Settings, add_score
from bmfm_pipeline.evaluation.several_classes import score_together
from bmfm_pipeline.evaluation.verdicts import class_verdicts, value_verdicts

LABEL_METRICS = ("accuracy", "f1", "precision", "recall", "mcc", "balanced_accuracy", "f1_weighted")
SCORE_METRICS = ("auroc", "auprc")
# Whether the truth is among the first few classes says something where there are many more than these.
TOP_FROM = {"top3_accuracy": 10, "top5_accuracy": 20}
VALUE_METRICS = ("mse", "mae", "pcc", "r2", "spearman")
FEW_RUNS = 100

LABELS = {
    "model": "this model",
    "majority": "commonest class",
    "logistic_l2": "logistic regression (L2)",
    "logistic_l1": "logistic regression (L1)",
    "pca50_logistic": "PCA-50 + logistic",
    "linear_probe": "linear probe (embeddings)",
    "knn": "nearest neighbours (embeddings)",
    "kmer6_logistic": "logistic regression, words of 1 to 6 letters",
    "kmer6_ridge": "ridge regression, words of 1 to 6 letters",
    "gc_logistic": "logistic regression, share of G and C",
    "cnn": "small convolutional network",
    "celltypist": "CellTypist",
    "no_pretrain": "without pretraining",
    "constant": "constant guess",
    "train_mean": "mean of training",
    "control_mean": "mean of controls",
    "additive": "sum of single effects",
    "ridge": "ridge regression",
}


def evaluate_predictions(
    model: Predictions, controls: dict[str, dict[str, LabelPredictions]], settings: Settings
) -> Evaluation:
    """Metrics with intervals of the model and of every control, for every label column."""
    result = Evaluation(level=settings.level)
    score_together(result, model.labels, controls, settings)
    for target, predictions in model.labels.items():
        known = predictions.known
        if not known.all():
            result.notes.append(unscored_note(target, predictions))
        if not known.any():
            result.notes.append(f"{target}: no cell of the {settings.split} split has a label; nothing to score")
            continue
        others = {name: labels[target] for name, labels in controls.items() if target in labels}
        groups = None if settings.groups is None else np.asarray(settings.groups)[known]
        if predictions.is_regression:
            _regression(result, target, predictions, others, settings, groups)
        else:
            _classification(result, target, predictions, others, settings, groups)
    if result.rows and settings.method in RESAMPLING and 0 < settings.bootstrap_runs < FEW_RUNS:
        result.notes.append(
            f"intervals come from {settings.bootstrap_runs} resamples (task.num_bootstrap_runs): their ends are rough; "
            "1000 cost a second or two"
        )
    return result


def unscored_note(target: str, predictions: LabelPredictions) -> str:
    """How many cells have no label to score."""
    known = predictions.known
    return f"{target}: {int((~known).sum())} of {len(known)} cells have no known label and are not scored"


def _classification(
    result: Evaluation,
    target: str,
    model: LabelPredictions,
    others: dict[str, LabelPredictions],
    settings: Settings,
    groups,
) -> None:
    known, names = model.known, model.class_names
    truth = model.truth[known]
    contenders = {"model": model, **others}
    guesses = {name: predictions.predicted[known] for name, predictions in contenders.items()}
    for name, predictions in contenders.items():
        for metric in LABEL_METRICS:
            add_score(result, Metric(metric, truth, guesses[name]), target, name, settings, groups)
        if (allowed := settings.allowed.get(target)) is not None:
            within = np.where(allowed[truth, guesses[name]], truth, guesses[name])
            prepared, note = Metric("accuracy", truth, within), "right where the label's term stands for the class"
            add_score(result, prepared, target, name, settings, groups, shown_as="hierarchical_accuracy", note=note)
        if predictions.probabilities is not None:
            scores = predictions.probabilities[known]
            for metric in (*SCORE_METRICS, *(name for name, least in TOP_FROM.items() if len(names) >= least)):
                prepared = Metric(metric, truth, scores[:, 1] if len(names) == 2 else scores)
                add_score(result, prepared, target, name, settings, groups)
    if model.probabilities is not None and len(names) == 2:
        result.notes.append(f"{target}: auroc and auprc are those of class {names[1]} against {names[0]}")
    if model.only_top:
        result.notes.append(
            f"{target}: auroc and auprc rank the {TOP} most probable classes of each cell, the others count as probability 0"
        )
    support = np.bincount(truth, minlength=len(names))
    rare = [names[index] for index in np.flatnonzero((support > 0) & (support < settings.rare_class_floor))]
    absent = [names[index] for index in np.flatnonzero(support == 0)]
    if rare:
        listed = ", ".join(f"{name} ({support[names.index(name)]})" for name in rare)
        result.notes.append(
            f"{target}: classes with fewer than {settings.rare_class_floor} test cells, scored with wide error: {listed}"
        )
    add_without_rare(result, target, truth, guesses, support, settings, groups)
    if absent:
        result.notes.append(f"{target}: classes without a test cell, not scored: {', '.join(absent)}")
    matrix = confusion(truth, guesses["model"], len(names))
    result.confusion[target] = {"classes": names, "counts": matrix.tolist()}
    scores = None if model.probabilities is None else model.probabilities[known]
    result.per_class[target] = per_class_table(names, truth, guesses, scores, settings, groups)
    result.verdicts += class_verdicts(
        target,
        truth,
        guesses.pop("model"),
        guesses,
        **_comparing(settings, groups),
        strata=truth if settings.stratified and groups is None else None,
    )


def _comparing(settings: Settings, groups) -> dict[str, Any]:
    """How differences to the controls are resampled."""
    return {"resamples": settings.resamples, "level": settings.level, "seed": settings.seed, "groups": groups}


def _regression(
    result: Evaluation,
    target: str,
    model: LabelPredictions,
    others: dict[str, LabelPredictions],
    settings: Settings,
    groups,
) -> None:
    known = model.known
    truth = model.truth[known]
    guesses = {name: predictions.predicted[known] for name, predictions in {"model": model, **others}.items()}
    zero = truth == 0
    zeros = ("zero_accuracy",) if zero.any() and not zero.all() else ()
    for name, guess in guesses.items():
        for metric in (*VALUE_METRICS, *zeros):
            add_score(result, Metric(metric, truth, guess), target, name, settings, groups)
    if zeros:
        counts = confusion(zero, says_zero(guesses["model"]), 2)
        result.confusion[target] = {"classes": ["not zero", "zero"], "counts": counts.tolist()}
    result.verdicts += value_verdicts(
        target,
        truth,
        guesses.pop("model"),
        guesses,
        **_comparing(settings, groups),
    )


def text_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy and macro-F1 (mse and pcc for numbers) of model and controls, with intervals, for a terminal."""
    shown = {"accuracy": "accuracy", "subset_accuracy": "all right", "f1": "macro-F1", "mse": "mse", "pcc": "pcc"}
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        there = list(dict.fromkeys(row["metric"] for row in own))
        metrics = [name for name in shown if name in there] or there[:2]
        table = [["", *(shown.get(name, name) for name in metrics), counted(own)]]
        for model in dict.fromkeys(row["model"] for row in own):
            found = {row["metric"]: row for row in own if row["model"] == model}
            n = next((row["n"] for row in found.values() if row["n"]), "")
            table.append([LABELS.get(model, model), *(with_interval(found.get(name)) for name in metrics), str(n)])
        if not any(row[-1] for row in table[1:]):
            table = [row[:-1] for row in table]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines.append(target)
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
    return "\n".join(lines)
