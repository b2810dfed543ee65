"""Decisions about a dataset's model, from stored predictions alone: whether it still does as recorded, and whether another takes its place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bmfm_pipeline.config.promotion import PromotionConfig
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.comparing import Contender, F1OfClasses, entry_of, plain_difference
from bmfm_pipeline.evaluation.drift import Drift
from bmfm_pipeline.evaluation.matching import Matched, match_cells, numbered_alike
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.resampling import resampled_together
from bmfm_pipeline.evaluation.verdicts import difference_of, paired_test
from bmfm_pipeline.evaluation.wording import SMALLER_IS_BETTER, Difference, metric_name, verdict

HELD, IMPROVED, REGRESSED, DRIFTED = "held", "improved", "regressed", "drifted"
_LISTED = 5


@dataclass(frozen=True)
class Judgement:
    """A metric of one side beside that of another, `kind` better, worse or open for the first, with the sentence that says so."""

    target: str
    cells: str
    paired: bool
    metric: str
    n: tuple[int, int]
    a: dict[str, float | None]
    b: dict[str, float | None]
    difference: Difference
    kind: str
    sentence: str
    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "n": list(self.n), "difference": plain_difference(self.difference)}

    @property
    def gain(self) -> tuple[float, float | None]:
        """(how much better the first side is, the least that the interval allows), whichever way the metric goes."""
        value, low, high = self.difference.value, self.difference.low, self.difference.high
        if self.metric in SMALLER_IS_BETTER:
            return -value, None if high is None else -high
        return value, low


@dataclass
class Decision:
    """Whether a challenger becomes champion, `reasons` in words, and the numbers behind them."""

    promoted: bool
    reasons: list[str] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    rare: dict[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        return "; ".join(self.reasons)

    def to_dict(self) -> dict[str, Any]:
        judged = [one.to_dict() for one in self.judgements]
        return {"promoted": self.promoted, "reasons": self.reasons, "judgements": judged, "rare": self.rare}


def without_cells(side: Contender, keep: np.ndarray) -> Contender:
    """The same evaluation of the cells where `keep` (n,) bool is true."""
    rows = np.flatnonzero(keep)
    labels = {name: _rows_of(label, rows) for name, label in side.predictions.labels.items()}
    predictions = Predictions([side.predictions.cells[row] for row in rows], labels)
    return Contender(predictions, None if side.groups is None else side.groups[rows], side.group_column)


def _rows_of(label: LabelPredictions, rows: np.ndarray) -> LabelPredictions:
    scores = None if label.probabilities is None else label.probabilities[rows]
    return replace(label, truth=label.truth[rows], predicted=label.predicted[rows], probabilities=scores)


@dataclass(frozen=True)
class _Pair:
    """The predictions of one label column by both sides; of a column with several classes a cell, those of each class."""

    target: str
    mine: list[LabelPredictions]
    theirs: list[LabelPredictions]

    def matched(self, a: Contender, b: Contender) -> Matched | None:
        return match_cells(a.predictions.cells, self.mine[0], b.predictions.cells, self.theirs[0])


@dataclass(frozen=True)
class _Cells:
    truth: np.ndarray
    guess: np.ndarray
    groups: np.ndarray | None
    n: int

    @classmethod
    def of(cls, labels: Sequence[LabelPredictions], rows: np.ndarray, own: np.ndarray | None) -> "_Cells":
        """`own` are the groups of these rows."""
        truth = np.stack([label.truth[rows] for label in labels], axis=1)
        guess = np.stack([label.predicted[rows] for label in labels], axis=1)
        if len(labels) > 1:  # the answers about one cell belong together
            own = np.repeat(np.arange(len(rows)) if own is None else own, len(labels))
        if own is not None and len(set(own)) < 2:
            own = None
        return cls(truth.ravel(), guess.ravel(), own, len(rows))


def compare_with_record(
    recorded: Contender, now: Contender, settings: PromotionConfig, seed: int = 0
) -> tuple[list[Judgement], list[str]]:
    """(judgements of `now` against what was recorded of the same model, notes).

    Cells that both have are compared paired. Cells that are new are compared, unpaired, with all that were recorded; so are all where
    too few are the same. Intervals and tests are widened for the number of comparisons (Bonferroni). Raises DataError where nothing can
    be compared.
    """
    wanted, notes = [], []
    for pair in _pairs(now.predictions, recorded.predictions):
        matched = pair.matched(now, recorded)
        if matched is None:
            notes.append(f"{pair.target}: a side has no cell with a known label; not compared")
            continue
        known = np.flatnonzero(pair.mine[0].known)
        everything = np.flatnonzero(pair.theirs[0].known)
        notes += [f"{pair.target}: {note}".replace(" in B than in A", " now") for note in matched.notes]
        if not matched.paired:
            wanted.append((pair, "these cells", known, everything, False))
            continue
        wanted.append((pair, "the same cells", matched.rows_a, matched.rows_b, True))
        before = set(recorded.predictions.cells)
        new = np.array([row for row in known if now.predictions.cells[row] not in before], dtype=np.int64)
        if len(new) >= settings.min_cells:
            wanted.append((pair, "new cells", new, everything, False))
        elif len(new):
            notes.append(
                f"{pair.target}: {len(new)} new cells are too few to be judged (promotion.min_cells {settings.min_cells})"
            )
    if not wanted:
        raise DataError("the evaluations have no label column in common; there is nothing to compare")
    level = 1 - (1 - settings.level) / len(wanted)
    judged = []
    for pair, cells, rows, others, paired in wanted:
        groups, theirs_groups = _groups(now, rows, recorded, others, paired)
        ours, theirs = _Cells.of(pair.mine, rows, groups), _Cells.of(pair.theirs, others, theirs_groups)
        judged.append(
            _judge(pair, cells, ours, theirs, settings, level, seed, paired, f"the model on {cells}", "recorded")
        )
    return judged, notes


def outcome_of(judgements: Sequence[Judgement], drifts: Sequence[Drift]) -> str:
    """regressed where any score is shown to be worse; else drifted where any number of the data is beyond its limit; else improved where
    any is shown to be better; else held."""
    kinds = {one.kind for one in judgements}
    if "worse" in kinds:
        return REGRESSED
    if any(one.drifted for one in drifts):
        return DRIFTED
    return IMPROVED if "better" in kinds else HELD


def decide(champion: Contender, challenger: Contender, settings: PromotionConfig, seed: int = 0) -> Decision:
    """Whether the challenger has shown enough on cells that both were tested on and neither has learned from.

    The least gain of the first label column must exceed promotion.margin, with the exact test agreeing; no other column may be shown
    worse; the mean F1 of rare classes may not fall by more than promotion.rare_tolerance.
    """
    decision, refusals = Decision(promoted=False), []
    pairs = list(_pairs(challenger.predictions, champion.predictions))
    missing = [name for name in _columns(champion.predictions) if name not in {pair.target for pair in pairs}]
    if missing or not pairs:
        decision.reasons = [f"it does not predict {', '.join(missing) or 'what the champion predicts'}"]
        return decision
    for place, pair in enumerate(pairs):
        matched = pair.matched(challenger, champion)
        if matched is None or not matched.paired or len(matched.rows_a) < settings.min_cells:
            count = 0 if matched is None or not matched.paired else len(matched.rows_a)
            refusals.append(
                f"{pair.target}: {count} cells were tested with both, and {settings.min_cells} are needed (promotion.min_cells)"
            )
            continue
        rows = (matched.rows_a, matched.rows_b)
        groups, _ = _groups(challenger, rows[0], champion, rows[1], True)
        ours, theirs = (
            _Cells.of(labels, own, groups) for labels, own in zip((pair.mine, pair.theirs), rows, strict=True)
        )
        one = _judge(
            pair, "the same cells", ours, theirs, settings, settings.level, seed, True, "the challenger", "the champion"
        )
        decision.judgements.append(one)
        if place == 0:
            refusals += _too_little(one, settings)
        elif one.kind == "worse":
            refusals.append(one.sentence)
        if not pair.mine[0].is_regression and len(pair.mine) == 1:
            rare = rare_classes(pair.mine[0].class_names, ours, theirs, settings.rare_share)
            decision.rare[pair.target] = rare
            if rare["difference"] < -settings.rare_tolerance - 1e-12:
                refusals.append(
                    f"{pair.target}: {_said_of_rare(rare)}, which is worse (promotion.rare_tolerance {settings.rare_tolerance:g})"
                )
    more = _other_classes(champion.predictions, challenger.predictions)
    decision.promoted = not refusals
    if decision.promoted:
        first = decision.judgements[0]
        said = [first.sentence, f"the least gain, {first.gain[1]:.4g}, exceeds promotion.margin {settings.margin:g}"]
        said += [f"{target}: {_said_of_rare(rare)}" for target, rare in decision.rare.items()]
        decision.reasons = [*said, *more]
    else:
        decision.reasons = [*refusals, *more]
    return decision


def _other_classes(champion: Predictions, challenger: Predictions) -> list[str]:
    """What one side knows and the other does not, in words."""
    found = []
    for name, label in challenger.labels.items():
        if name not in champion.labels:
            continue
        known, before = set(label.class_names), set(champion.labels[name].class_names)
        for word, classes in (("also knows", known - before), ("no longer knows", before - known)):
            if classes:
                found.append(f"{name}: the challenger {word} {', '.join(sorted(classes))}")
    return found


def _groups(a: Contender, rows_a: np.ndarray, b: Contender, rows_b: np.ndarray, paired: bool) -> tuple[Any, Any]:
    """The groups of the compared cells of both sides; of the same cells those that either side knows."""
    found = [None if side.groups is None else side.groups[rows] for side, rows in ((a, rows_a), (b, rows_b))]
    if paired:
        found = [found[0] if found[0] is not None else found[1]] * 2
    return found[0], found[1]


def _too_little(one: Judgement, settings: PromotionConfig) -> list[str]:
    low = one.gain[1]
    if low is not None and low > settings.margin and one.kind == "better":
        return []
    least = "no interval can be given" if low is None else f"the least gain is {low:.4g}"
    return [f"{one.sentence}; {least}, and more than promotion.margin {settings.margin:g} is needed"]


def rare_classes(names: Sequence[str], ours: _Cells, theirs: _Cells, share: float) -> dict[str, Any]:
    """{"classes", "a", "b", "difference"}: mean F1 of the classes with less than `share` of the cells, else of the rarest one."""
    counts = np.bincount(ours.truth, minlength=len(names))
    there = np.flatnonzero(counts)
    rare = there[counts[there] < share * counts.sum()]
    if not len(rare):
        rare = there[counts[there] == counts[there].min()]
    a, b = (
        float(np.nan_to_num(F1OfClasses(side.truth, side.guess, len(names)).value()[rare]).mean())
        for side in (ours, theirs)
    )
    return {"classes": [names[place] for place in rare], "a": a, "b": b, "difference": a - b}


def _said_of_rare(rare: dict[str, Any]) -> str:
    named, more = rare["classes"][:_LISTED], len(rare["classes"]) - _LISTED
    classes = ", ".join(named) + (f" and {more} more" if more > 0 else "")
    return f"mean F1 of rare classes ({classes}) {rare['a']:.3f} against {rare['b']:.3f}"


def _pairs(ours: Predictions, theirs: Predictions) -> Iterator[_Pair]:
    """Label columns that both predict, in the order of the first. Raises DataError for one with other classes."""
    others = _columns(theirs)
    for target, names in _columns(ours).items():
        if target not in others:
            continue
        if names != others[target] and len(names) + len(others[target]) > 2:
            raise DataError(f"{target}: the two sides have other classes; they cannot be compared")
        both = [_in_all_classes(name, ours.labels[name], theirs.labels[name]) for name in names]
        yield _Pair(target, [mine for mine, _ in both], [other for _, other in both])


def _in_all_classes(
    name: str, mine: LabelPredictions, theirs: LabelPredictions
) -> tuple[LabelPredictions, LabelPredictions]:
    """Both with the ids of all classes that either knows: a model that learned another kind of cell is compared on the cells of both."""
    if mine.is_regression or theirs.is_regression or set(mine.class_names) == set(theirs.class_names):
        return mine, numbered_alike(name, mine, theirs)
    names = [*mine.class_names, *(other for other in theirs.class_names if other not in mine.class_names)]
    ids = np.array([names.index(other) for other in theirs.class_names], dtype=np.int64)
    truth = np.where(theirs.truth >= 0, ids[np.maximum(theirs.truth, 0)], theirs.truth)
    return (
        LabelPredictions(mine.truth, mine.predicted, None, names, part_of=mine.part_of),
        LabelPredictions(truth, ids[theirs.predicted], None, names, part_of=theirs.part_of),
    )


def _columns(predictions: Predictions) -> dict[str, list[str]]:
    """{label column: names of its predictions}, which are several where a cell may have several classes."""
    found: dict[str, list[str]] = {}
    for name, label in predictions.labels.items():
        found.setdefault(label.part_of or name, []).append(name)
    return found


def _judge(
    pair: _Pair,
    cells: str,
    ours: _Cells,
    theirs: _Cells,
    settings: PromotionConfig,
    level: float,
    seed: int,
    paired: bool,
    subject: str,
    other: str,
) -> Judgement:
    numbers = pair.mine[0].is_regression
    name = "mse" if numbers else settings.metric
    a, b = Metric(name, ours.truth, ours.guess), Metric(name, theirs.truth, theirs.guess)
    if paired:
        drawn, drawn_b = resampled_together([a, b], settings.resamples, seed, ours.groups)
    else:
        (drawn,) = resampled_together([a], settings.resamples, seed, ours.groups)
        (drawn_b,) = resampled_together([b], settings.resamples, seed + 1, theirs.groups)
    difference = difference_of(name, a.value(), drawn, b.value(), drawn_b, level)
    tested = _tested(name, ours, theirs, paired, numbers, seed)
    p = tested.get("p")
    kind = difference.kind if p is None or p < 1 - level else "open"
    where = f"{ours.n:,} cells" if paired else f"{ours.n:,} cells, {theirs.n:,} recorded, unpaired"
    target = f"{pair.target}, {'paired on ' if paired else ''}{where}"
    if paired and np.array_equal(ours.guess, theirs.guess):
        sentence = (
            f"{target}: no evidence that {subject} is better or worse than {other}: both say the same of each cell"
        )
        kind = "open"
    else:
        sentence = verdict(target, other, [difference], level=level, subject=subject, **tested)
        sentence += f"; {metric_name(name)} {a.value():.4g} against {b.value():.4g}"
    return Judgement(
        pair.target,
        cells,
        paired,
        name,
        (ours.n, theirs.n),
        entry_of(a.value(), drawn, settings.level),
        entry_of(b.value(), drawn_b, settings.level),
        difference,
        kind,
        sentence,
        p,
    )


def _tested(name: str, ours: _Cells, theirs: _Cells, paired: bool, numbers: bool, seed: int) -> dict[str, Any]:
    """The exact test of a difference in accuracy as `verdict` takes it; {} where there is none for the question."""
    if paired and (numbers or name == "accuracy"):
        return paired_test(ours.truth, ours.guess, theirs.guess, ours.groups, numbers=numbers, seed=seed)
    if paired or name != "accuracy" or ours.groups is not None or theirs.groups is not None:
        return {}
    from scipy import stats

    table = [[int((side.guess == side.truth).sum()), int((side.guess != side.truth).sum())] for side in (ours, theirs)]
    return {"p": float(stats.fisher_exact(table).pvalue), "test": "Fisher's exact test"}
