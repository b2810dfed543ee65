"""Two evaluations beside each other: paired where their test cells are the same, unpaired otherwise, and said which."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.field_predictions import FieldRows
from bmfm_pipeline.evaluation.intervals import interval_from_values
from bmfm_pipeline.evaluation.matching import Matched, match_cells, numbered_alike
from bmfm_pipeline.evaluation.metrics import ClassCounts, Metric, f1_by_class
from bmfm_pipeline.evaluation.predictions import TOP, LabelPredictions, Predictions
from bmfm_pipeline.evaluation.resampling import resampled_together
from bmfm_pipeline.evaluation.verdicts import difference_of, paired_test
from bmfm_pipeline.evaluation.wording import Difference, metric_name, verdict

LABEL_METRICS = ("accuracy", "f1", "precision", "recall", "mcc")
SCORE_METRICS = ("auroc", "auprc")
VALUE_METRICS = ("mse", "mae", "pcc")
# What the sentence tells; the first decides.
TOLD = {"accuracy": 0, "f1": 1, "mse": 0}
# Each resample ranks all cells anew for every class: areas take no more than these.
MOST_FOR_AREAS = 1000


@dataclass(frozen=True)
class Contender:
    """One side: what a model said of its test cells and of their masked fields, and the group of each cell (n,), of the obs column
    `group_column`."""

    predictions: Predictions
    groups: np.ndarray | None = None
    group_column: str | None = None
    fields: list[FieldRows] = field(default_factory=list)


@dataclass
class Comparison:
    """`targets` {target: {"paired", "sentence", "n_a", "n_b", "grouped_by", "test", "rows", "per_class"}}; a row of `rows` is {"metric",
    "a", "b", "difference", "kind", "kind_of_all"}, where a, b and difference (A minus B) are {"value", "ci_low", "ci_high"}, and kind is
    better, worse or open for A, by itself and with intervals widened for all rows there are."""

    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    level: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def compare_predictions(
    a: Contender, b: Contender, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Every label column and masked field that both sides predict, A against B.

    Raises DataError where they have nothing in common, or a label column with another label dictionary.
    """
    from bmfm_pipeline.evaluation.comparing_fields import compare_fields

    result = Comparison(level=level, resamples=resamples, seed=seed)
    ours, theirs = a.predictions.labels, b.predictions.labels
    common = [target for target in ours if target in theirs]
    if not common and not {rows.name for rows in a.fields} & {rows.name for rows in b.fields}:
        said = [
            ", ".join(dict.fromkeys([*side.predictions.labels, *(f"masked {rows.name}" for rows in side.fields)]))
            or "nothing"
            for side in (a, b)
        ]
        raise DataError(
            f"A and B have no label column and no masked field in common: A predicts {said[0]}, B {said[1]}; compare evaluations of the same"
        )
    for side, labels in (("A", ours), ("B", theirs)):
        if others := [target for target in labels if target not in common]:
            result.notes.append(f"only {side} predicts {', '.join(others)}: not compared")
    aligned = {target: numbered_alike(target, ours[target], theirs[target]) for target in common}
    for target in common:
        _compare_target(result, target, a, ours[target], b, aligned[target])
    compare_fields(result, a, b)
    _judge_all(result)
    return result


@dataclass(frozen=True)
class _Side:
    """The compared cells of one side."""

    truth: np.ndarray
    guess: np.ndarray
    scores: np.ndarray | None
    groups: np.ndarray | None

    @classmethod
    def of(cls, label: LabelPredictions, rows: np.ndarray, groups: np.ndarray | None) -> "_Side":
        scores = None if label.probabilities is None else label.probabilities[rows]
        if scores is not None and scores.shape[1] == 2:
            scores = scores[:, 1]
        return cls(label.truth[rows], label.predicted[rows], scores, groups)

    def metric(self, name: str) -> Metric:
        return Metric(name, self.truth, self.scores if name in SCORE_METRICS else self.guess)


def _compare_target(
    result: Comparison, target: str, a: Contender, mine: LabelPredictions, b: Contender, theirs: LabelPredictions
) -> None:
    matched = match_cells(a.predictions.cells, mine, b.predictions.cells, theirs)
    if matched is None:
        result.notes.append(f"{target}: a side has no cell with a known label; not compared")
        return
    result.notes += [f"{target}: {note}" for note in matched.notes]
    groups_a, groups_b, column = _groups(result, target, a, b, matched)
    left, right = _Side.of(mine, matched.rows_a, groups_a), _Side.of(theirs, matched.rows_b, groups_b)
    batches: list[Sequence[str]] = [VALUE_METRICS if mine.is_regression else LABEL_METRICS]
    if left.scores is not None and right.scores is not None:
        batches.append(SCORE_METRICS)
    elif not mine.is_regression:
        result.notes.append(f"{target}: a side keeps no probabilities, so no areas under curves are compared")
    rows: list[dict[str, Any]] = []
    told: dict[str, Difference] = {}
    for names in batches:
        of_a, of_b = ([side.metric(name) for name in names] for side in (left, right))
        resamples = min(result.resamples, MOST_FOR_AREAS) if names is SCORE_METRICS else result.resamples
        values_a, values_b = _resampled(result, of_a, of_b, left, right, matched, resamples)
        for name, ours, others, drawn, drawn_b in zip(names, of_a, of_b, values_a, values_b, strict=True):
            difference = difference_of(name, ours.value(), drawn, others.value(), drawn_b, result.level)
            told |= {name: difference} if name in TOLD else {}
            rows.append(
                {
                    "metric": name,
                    "a": entry_of(ours.value(), drawn, result.level),
                    "b": entry_of(others.value(), drawn_b, result.level),
                    "difference": plain_difference(difference),
                    "kind": difference.kind,
                }
            )
    tested: dict[str, Any] = {"remarks": ["unpaired"] + ([] if column is None else ["groups are resampled together"])}
    if matched.paired:
        tested = paired_test(
            left.truth, left.guess, right.guess, left.groups, numbers=mine.is_regression, seed=result.seed
        )
    if matched.paired and np.array_equal(left.guess, right.guess):
        n = len(left.truth)
        sentence = (
            f"{target}: no evidence that A is better or worse than B: both say the same of each of the {n:,} cells"
        )
    else:
        differences = [told[name] for name in sorted(told, key=TOLD.get)]
        sentence = verdict(target, "B", differences, level=result.level, subject="A", **tested)
    several = not mine.is_regression and mine.part_of is None
    add_target(
        result,
        target,
        sentence,
        paired=matched.paired,
        sentence=matched.sentence,
        n=(len(left.truth), len(right.truth)),
        grouped_by=column,
        rows=rows,
        test={"name": tested.get("test", "McNemar"), "p": tested["p"]} if "p" in tested else None,
        per_class=_per_class(result, mine.class_names, left, right, matched) if several else [],
    )
    if mine.only_top or theirs.only_top:
        result.notes.append(f"{target}: areas rank the {TOP} most probable classes of each cell")


def add_target(
    result: Comparison,
    target: str,
    conclusion: str,
    *,
    paired: bool,
    sentence: str,
    n: tuple[int, int],
    grouped_by: str | None,
    rows: list[dict[str, Any]],
    test: dict[str, Any] | None = None,
    per_class: Sequence[dict[str, Any]] = (),
) -> None:
    """Add what was found of a label column or a masked field, and its verdict."""
    result.verdicts.append(conclusion)
    result.targets[target] = {
        "paired": paired,
        "sentence": sentence,
        "n_a": n[0],
        "n_b": n[1],
        "grouped_by": grouped_by,
        "test": test,
        "rows": rows,
        "per_class": list(per_class),
    }


def _groups(
    result: Comparison, target: str, a: Contender, b: Contender, matched: Matched
) -> tuple[np.ndarray | None, np.ndarray | None, str | None]:
    """(groups of the cells of A, of B, the column they are of): grouped where either side was."""
    groups_a = None if a.groups is None else a.groups[matched.rows_a]
    groups_b = None if b.groups is None else b.groups[matched.rows_b]
    columns = list(dict.fromkeys(side.group_column for side in (a, b) if side.groups is not None))
    if not columns:
        return None, None, None
    if matched.paired:
        chosen = groups_a if groups_a is not None else groups_b
        if len(columns) > 1:
            result.notes.append(
                f"{target}: A groups cells by {columns[0]}, B by {columns[1]}; the groups of A are resampled"
            )
        groups_a = groups_b = chosen
    elif groups_a is None or groups_b is None:
        alone = "A" if groups_a is None else "B"
        result.notes.append(
            f"{target}: only the cells of one side are grouped (by {columns[0]}); those of {alone} count one by one, which may make the "
            "interval too narrow"
        )
    if any(groups is not None and len(set(groups)) < 2 for groups in (groups_a, groups_b)):
        result.notes.append(
            f"{target}: all compared cells of a side have the same {columns[0]}: cells count one by one, and nothing is said about others"
        )
        return None, None, None
    return groups_a, groups_b, columns[0]


def _resampled(result: Comparison, of_a: list, of_b: list, left: _Side, right: _Side, matched: Matched, count: int):
    """Values of the metrics of A and of B in the same resamples of the same cells, or in resamples of their own."""
    if matched.paired:
        values = resampled_together([*of_a, *of_b], count, result.seed, left.groups)
        return values[: len(of_a)], values[len(of_a) :]
    return (
        resampled_together(of_a, count, result.seed, left.groups),
        resampled_together(of_b, count, result.seed + 1, right.groups),
    )


def entry_of(value: float, values: np.ndarray, level: float) -> dict[str, float | None]:
    values = values[np.isfinite(values)]
    low, high = interval_from_values(values, method="bootstrap_quantiles", level=level) if len(values) else (None, None)
    return {"value": value if np.isfinite(value) else None, "ci_low": low, "ci_high": high}


def plain_difference(difference: Difference) -> dict[str, float | None]:
    value = difference.value if np.isfinite(difference.value) else None
    return {"value": value, "ci_low": difference.low, "ci_high": difference.high}


class F1OfClasses:
    """The F1 of every class, for resampled_together: values are (R, C), nan where a class is neither there nor predicted."""

    def __init__(self, truth: np.ndarray, guess: np.ndarray, size: int):
        self.truth, self.guess, self.size = truth, guess, size

    @property
    def n(self) -> int:
        return len(self.truth)

    def at(self, rows: np.ndarray) -> "F1OfClasses":
        return F1OfClasses(self.truth[rows], self.guess[rows], self.size)

    def alike(self) -> tuple[np.ndarray, np.ndarray]:
        _, first, sets = np.unique(self.truth * self.size + self.guess, return_index=True, return_inverse=True)
        return first, sets

    def values(self, weights: np.ndarray) -> np.ndarray:
        from scipy import sparse

        def sums(ids: np.ndarray, cells: np.ndarray) -> np.ndarray:
            table = sparse.csr_matrix((np.ones(len(ids)), (ids, cells)), shape=(self.size, self.n))
            return (table @ weights.T).T

        every, right = np.arange(self.n), np.flatnonzero(self.truth == self.guess)
        counts = ClassCounts(sums(self.truth[right], right), sums(self.truth, every), sums(self.guess, every))
        return np.where(counts.true + counts.predicted > 0, f1_by_class(counts), np.nan)

    def value(self) -> np.ndarray:
        return self.values(np.ones((1, self.n)))[0]


def _per_class(
    result: Comparison, names: list[str], left: _Side, right: _Side, matched: Matched
) -> list[dict[str, Any]]:
    """F1 of every class that a side has, the largest class first."""
    ours, theirs = (F1OfClasses(side.truth, side.guess, len(names)) for side in (left, right))
    (drawn,), (drawn_b,) = _resampled(result, [ours], [theirs], left, right, matched, result.resamples)
    points, points_b = ours.value(), theirs.value()
    support, support_b = (np.bincount(side.truth, minlength=len(names)) for side in (left, right))
    there = np.flatnonzero(support + support_b)
    rows = []
    for index in there[np.argsort(-(support + support_b)[there], kind="stable")]:
        difference = difference_of(
            "f1", points[index], drawn[:, index], points_b[index], drawn_b[:, index], result.level
        )
        rows.append(
            {
                "class": names[index],
                "n_a": int(support[index]),
                "n_b": int(support_b[index]),
                "a": _finite(points[index]),
                "b": _finite(points_b[index]),
                "difference": plain_difference(difference),
                "kind": difference.kind,
            }
        )
    return rows


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _judge_all(result: Comparison) -> None:
    """Of several differences some show by chance: which remain when the intervals are widened for all of them (Bonferroni)."""
    rows = [(target, row) for target, entry in result.targets.items() for row in entry["rows"]]
    _widen([row for _, row in rows], result.level, lambda row: row["metric"])
    for entry in result.targets.values():
        _widen(entry["per_class"], result.level, lambda row: "f1")
    if len(rows) < 2:
        return
    shown = [f"{target} {metric_name(row['metric'])}" for target, row in rows if row["kind"] != "open"]
    remain = [f"{target} {metric_name(row['metric'])}" for target, row in rows if row["kind_of_all"] != "open"]
    after = (
        "all of them remain" if remain == shown else f"these remain: {', '.join(remain)}" if remain else "none remains"
    )
    each = f"{100 * result.level:g} %"
    result.notes.append(
        f"{len(rows)} differences are listed, each at {each}: where there is none, about one in {1 / (1 - result.level):.0f} still shows by "
        f"chance. {len(shown) or 'None'} leave{'s' if len(shown) < 2 else ''} out 0"
        + (f"; with intervals widened for all {len(rows)} (Bonferroni), {after}" if shown else "")
        + ". Decide which metric counts before you look"
    )


def _widen(rows: list[dict[str, Any]], level: float, metric_of) -> None:
    """Set kind_of_all: intervals stretched about their value as normal ones would be. Quantiles so far out need too many resamples."""
    from scipy import stats

    tail = (1 - level) / 2
    for row in rows:
        stretch = stats.norm.ppf(tail / len(rows)) / stats.norm.ppf(tail)
        value, low, high = (row["difference"][name] for name in ("value", "ci_low", "ci_high"))
        if low is not None:
            low, high = value - (value - low) * stretch, value + (high - value) * stretch
        row["kind_of_all"] = Difference(metric_of(row), value, low, high).kind
