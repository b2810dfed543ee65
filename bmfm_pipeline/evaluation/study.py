"""Several trainings side by side: shares of the training cells, seeds, or both; what they have in common, and what differs by luck."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.resampling import resampled_together
from bmfm_pipeline.evaluation.study_collapse import FLOORS, collapsed_seeds
from bmfm_pipeline.evaluation.study_words import (
    collapsed_sentence,
    curve_sentences,
    mean_sentences,
    passing_sentences,
    spread_sentences,
)
from bmfm_pipeline.evaluation.verdicts import difference_of, paired_differences
from bmfm_pipeline.evaluation.wording import SMALLER_IS_BETTER, Difference

# What a model is measured against: the first of these that was fitted.
REFERENCES = ("logistic_l2", "ridge", "train_mean", "majority")


@dataclass
class PointScores:
    """One training and its test.

    `truth` and `guesses` hold, by label column, the known cells: (n,), and {model or control: (n,)}. `cells` are their names, `groups`
    (n,) what is resampled whole, both by label column. `rows` are those of metrics.json, `facts` what else is told of the point.
    """

    name: str
    fraction: float
    seed: int
    n_train: int
    rows: list[dict[str, Any]]
    truth: dict[str, np.ndarray]
    guesses: dict[str, dict[str, np.ndarray]]
    cells: dict[str, list[str]]
    groups: dict[str, np.ndarray | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def value(self, target: str, metric: str, model: str = "model") -> float | None:
        return next(
            (
                row["value"]
                for row in self.rows
                if (row["target"], row["metric"], row["model"]) == (target, metric, model)
            ),
            None,
        )


def study_of(
    points: Sequence[PointScores],
    *,
    seeds_of: str = "finetuning",
    missing: Sequence[str] = (),
    level: float = 0.95,
    resamples: int = 1000,
    stratified: bool = False,
) -> dict[str, Any]:
    """study.json: {kind, points, summary, differences, collapsed, verdicts, findings, notes, level, seeds_of, missing}.

    `summary`: of each target, metric, share and model the mean over seeds with an interval. `differences`: the model minus the control
    that it is measured against, of each point and of all seeds of a share together.
    """
    fractions = sorted({point.fraction for point in points})
    seeds = list(dict.fromkeys(point.seed for point in points))
    kinds = [name for name, several in (("few_shot", len(fractions) > 1), ("seeds", len(seeds) > 1)) if several]
    study: dict[str, Any] = {
        "kind": "_and_".join(kinds) or "single",
        "seeds_of": seeds_of,
        "level": level,
        "points": [_plain_point(point) for point in points],
        "missing": list(missing),
        "summary": _summary(points, seeds_of, level),
        "differences": [],
        "collapsed": [],
        "verdicts": [],
        "findings": [],
        "notes": _notes(points, seeds_of, missing, len(seeds)),
    }
    for target in _targets(points):
        metrics = ("mse",) if _is_regression(points, target) else ("accuracy", "f1")
        for fraction in fractions:
            own = [point for point in points if point.fraction == fraction and target in point.truth]
            study["differences"] += _differences(target, fraction, own, metrics, seeds_of, level, resamples, stratified)
            study["collapsed"] += collapsed_seeds(
                target, fraction, own, metrics[0], reference_of(own, target) if own else None
            )
            _add_intervals_over_cells(study["summary"], target, fraction, own, metrics, level, resamples, stratified)
        if len(fractions) > 1:
            study["verdicts"] += passing_sentences(study, target, metrics)
            study["findings"] += curve_sentences(study, target, metrics[0])
        if len(seeds) > 1:
            study["verdicts"] += mean_sentences(study, target, metrics, fractions[-1])
            study["findings"] += spread_sentences(study, target, metrics, fractions[-1])
    study["verdicts"] += [collapsed_sentence(entry) for entry in study["collapsed"]]
    return study


def _targets(points: Sequence[PointScores]) -> list[str]:
    return list(dict.fromkeys(target for point in points for target in point.truth))


def _is_regression(points: Sequence[PointScores], target: str) -> bool:
    return any(point.value(target, "mse") is not None for point in points)


def _plain_point(point: PointScores) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    kept = ("value", "ci_low", "ci_high", "ci_method", "n")
    for row in point.rows:
        by_metric = metrics.setdefault(row["target"], {}).setdefault(row["metric"], {})
        by_metric[row["model"]] = {name: row.get(name) for name in kept}
    own = {"name": point.name, "fraction": point.fraction, "seed": point.seed, "n_train": point.n_train}
    return {**own, **point.facts, "metrics": metrics}


def student_t(values: Sequence[float], level: float = 0.95, test_to_train: float = 0.0) -> dict[str, Any]:
    """Mean, sd, min and max of the scores of several seeds, and the interval of their mean by Student t with n - 1 degrees of freedom.

    `test_to_train`: test cells by training cells, where every seed has a split of its own. Such splits share most of their cells, and
    the variance of the mean is then sd^2 (1/n + test/train) in place of sd^2 / n (Nadeau and Bengio 2003).
    """
    found = np.asarray(values, dtype=np.float64)
    n, mean = len(found), float(found.mean())
    entry = {"mean": mean, "sd": None, "min": float(found.min()), "max": float(found.max()), "n_seeds": n}
    entry |= {"ci_low": None, "ci_high": None, "ci_method": "student_t_resampled" if test_to_train else "student_t"}
    if n < 2:
        return entry
    from scipy import stats

    sd = float(found.std(ddof=1)) if entry["min"] < entry["max"] else 0.0
    margin = float(stats.t.ppf(0.5 + level / 2, n - 1)) * sd * float(np.sqrt(1 / n + test_to_train))
    return {**entry, "sd": sd, "ci_low": mean - margin, "ci_high": mean + margin}


def _summary(points: Sequence[PointScores], seeds_of: str, level: float) -> list[dict[str, Any]]:
    rows = [(point, row) for point in points for row in point.rows if row["value"] is not None]
    keys = dict.fromkeys((row["target"], row["metric"], point.fraction, row["model"]) for point, row in rows)
    found = []
    for key in keys:
        own = [(p, row) for p, row in rows if (row["target"], row["metric"], p.fraction, row["model"]) == key]
        entry = student_t([row["value"] for _, row in own], level, _test_to_train(own, seeds_of))
        if (
            entry["min"] == entry["max"]
        ):  # of one seed, or of seeds that agree to the last digit, what their test cells say
            entry |= {name: own[0][1][name] for name in ("ci_low", "ci_high", "ci_method")}
        named = dict(zip(("target", "metric", "fraction", "model"), key, strict=True))
        values = [{"seed": p.seed, "value": row["value"]} for p, row in own]
        cells = round(np.mean([p.n_train for p, _ in own]))
        found.append({**named, "n_train": cells, **entry, "over_cells": None, "values": values})
    return found


def _add_intervals_over_cells(
    summary: list[dict[str, Any]],
    target: str,
    fraction: float,
    own: list[PointScores],
    metrics: Sequence[str],
    level: float,
    resamples: int,
    stratified: bool,
) -> None:
    """What other test cells would have said of the mean over seeds: `over_cells` of the rows of the model and the controls shown with it."""
    shown = {"model", *FLOORS, reference_of(own, target) if own else None}
    for row in summary:
        if (row["target"], row["fraction"]) != (target, fraction) or row["model"] not in shown:
            continue
        name, metric = row["model"], row["metric"]
        if row["n_seeds"] == 1:
            row["over_cells"] = [row["ci_low"], row["ci_high"]]
        elif metric in metrics and all(name in point.guesses[target] for point in own):
            pairs = [(point.guesses[target][name],) for point in own]
            found = _drawn_together(own, target, metric, pairs, resamples, stratified)
            if found is not None:
                tail = (1 - level) / 2
                row["over_cells"] = np.quantile(np.nanmean(found[1], axis=0), [tail, 1 - tail]).tolist()


def _test_to_train(own: list[tuple[PointScores, dict[str, Any]]], seeds_of: str) -> float:
    if seeds_of != "split":
        return 0.0
    return float(np.mean([(row["n"] or 0) / max(1, point.n_train) for point, row in own]))


def reference_of(points: Sequence[PointScores], target: str) -> str | None:
    """The control that the model is measured against: one that every point has."""
    return next((name for name in REFERENCES if all(name in point.guesses[target] for point in points)), None)


def _differences(
    target: str,
    fraction: float,
    own: list[PointScores],
    metrics: Sequence[str],
    seeds_of: str,
    level: float,
    resamples: int,
    stratified: bool,
) -> list[dict[str, Any]]:
    """Model minus control: a row per metric and point, and one per metric for all seeds, whose `seed` is None."""
    control = reference_of(own, target) if own else None
    if control is None:
        return []
    of_points = [_of_point(point, target, metrics, control, level, resamples, stratified) for point in own]
    together = _of_all(own, target, metrics, control, level, resamples, stratified) if len(own) > 1 else of_points[0]
    found = []
    for at, metric in enumerate(metrics):
        base = {"target": target, "metric": metric, "control": control, "fraction": fraction}
        values = [differences[at].value for differences in of_points]
        for point, differences in zip(own, of_points, strict=True):
            found.append({**base, "seed": point.seed, **_plain_difference(differences[at])})
        entry = student_t(values, level, _ratio(own, target, seeds_of))
        over_cells = None if together is None else together[at]
        found.append(
            {
                **base,
                "seed": None,
                "n_seeds": len(own),
                "value": entry["mean"],
                "sd": entry["sd"],
                "above": sum(_better(metric, value) for value in values),
                "over_cells": None if over_cells is None else [over_cells.low, over_cells.high],
                "over_seeds": None if entry["sd"] is None else [entry["ci_low"], entry["ci_high"]],
                "kind": _decided(metric, entry, over_cells),
            }
        )
    return found


def _of_point(
    point: PointScores,
    target: str,
    metrics: Sequence[str],
    control: str,
    level: float,
    resamples: int,
    stratified: bool,
) -> list[Difference]:
    """As the evaluation of the point has it."""
    truth, groups = point.truth[target], point.groups.get(target)
    return paired_differences(
        metrics,
        truth,
        point.guesses[target]["model"],
        point.guesses[target][control],
        resamples=resamples,
        level=level,
        seed=point.seed,
        groups=groups,
        strata=truth if stratified and groups is None else None,
    )


def _of_all(
    own: list[PointScores],
    target: str,
    metrics: Sequence[str],
    control: str,
    level: float,
    resamples: int,
    stratified: bool,
) -> list[Difference] | None:
    """Of the means over seeds: what other test cells would have said of these very models. None where they have no cells in common."""
    found = []
    for metric in metrics:
        pairs = [(point.guesses[target]["model"], point.guesses[target][control]) for point in own]
        drawn = _drawn_together(own, target, metric, pairs, resamples, stratified)
        if drawn is None:
            return None
        values, resampled = drawn
        means = [value for at in (0, 1) for value in (float(np.mean(values[at::2])), np.mean(resampled[at::2], axis=0))]
        found.append(difference_of(metric, *means, level))
    return found


def _drawn_together(
    own: list[PointScores], target: str, metric: str, guesses: Sequence[tuple], resamples: int, stratified: bool
) -> tuple[list[float], list[np.ndarray]] | None:
    """(values, values in the same resamples (R,)) of a metric of all guesses of all points; None where the points have other cells."""
    first = own[0]
    if any(point.cells[target] != first.cells[target] for point in own):
        return None
    truth, groups = first.truth[target], first.groups.get(target)
    prepared = [Metric(metric, truth, guess) for each in guesses for guess in each]
    strata = truth if stratified and groups is None else None
    drawn = resampled_together(prepared, resamples, first.seed, groups, strata)
    return [metric.value() for metric in prepared], drawn


def _plain_difference(difference: Difference) -> dict[str, Any]:
    return {
        "value": difference.value,
        "ci_low": difference.low,
        "ci_high": difference.high,
        "ci_method": "bootstrap_quantiles",
    }


def _ratio(own: list[PointScores], target: str, seeds_of: str) -> float:
    if seeds_of != "split":
        return 0.0
    return float(np.mean([len(point.truth[target]) / max(1, point.n_train) for point in own]))


def _better(metric: str, difference: float) -> bool:
    return difference < 0 if metric in SMALLER_IS_BETTER else difference > 0


def _decided(metric: str, entry: dict[str, Any], over_cells: Difference | None) -> str:
    """better or worse where both kinds of luck are ruled out, as far as they can be told: that of the cells and that of the seeds."""
    kinds = [] if over_cells is None else [over_cells.kind]
    if entry["sd"] is not None:
        kinds.append(Difference(metric, entry["mean"], entry["ci_low"], entry["ci_high"]).kind)
    return kinds[0] if kinds and len(set(kinds)) == 1 else "open"


def _notes(points: Sequence[PointScores], seeds_of: str, missing: Sequence[str], n_seeds: int) -> list[str]:
    notes = []
    if missing:
        what = "point is missing, because it" if len(missing) == 1 else "points are missing, because they"
        notes.append(f"{len(missing)} {what} failed: {', '.join(missing)}")
    if n_seeds > 1:
        what = {
            "finetuning": "a seed changes fine-tuning alone (order, masks, fresh heads); all start from one pretrained model and are "
            "tested on the same cells",
            "training": "a seed changes pretraining and fine-tuning; all are tested on the same cells",
            "split": "a seed changes the split too, so that each is tested on cells of its own; the interval over seeds allows for "
            "splits that share cells (Nadeau and Bengio 2003)",
        }
        notes.append(what[seeds_of])
        few = "; of so few seeds it is rough" if n_seeds < 5 else ""
        notes.append(f"intervals over {n_seeds} seeds are of the mean, by Student t{few}")
    if len({point.fraction for point in points}) > 1:
        notes.append(
            "shares of the training cells are drawn by class, at least one cell of each, and contain the smaller ones; the controls learn "
            "from the same cells. Pretraining, which sees no labels, and the dev cells, which choose the checkpoint, are the same for all"
        )
    return notes
