"""Scores at masked positions beside the constant guess, from stored rows. Positions of a cell are not independent, so intervals
resample whole cells; what a cell adds to a score is summed once, so that a resample costs a product."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bmfm_pipeline.evaluation.field_predictions import FieldRows
from bmfm_pipeline.evaluation.intervals import RESAMPLING, interval_from_resamples
from bmfm_pipeline.evaluation.metric_kinds.classes import BY_CLASS, ClassCounts, divided, macro, mcc_of
from bmfm_pipeline.evaluation.metric_kinds.sums import Sums, SumsMetric
from bmfm_pipeline.evaluation.resampling import resampled
from bmfm_pipeline.evaluation.rows import FALLBACK, Evaluation, Settings, metric_row
from bmfm_pipeline.evaluation.verdicts import difference_of
from bmfm_pipeline.evaluation.wording import Difference, verdict

# With more tokens than these among labels and predictions there are no averages over tokens: each has too few positions.
MOST_TOKENS = 128
# What the sentence is about, and what it adds: the first of these that a field has.
DECIDING = (("accuracy", "perplexity"), ("mse", "mae"), ("zero_accuracy",))


@dataclass(frozen=True)
class Score:
    """A metric of the model and of the constant guess, as functions of the same sums; `count` is how many positions it is of."""

    name: str
    model: Callable[[np.ndarray], np.ndarray]
    constant: Callable[[np.ndarray], np.ndarray] | None
    count: int


def evaluate_fields(result: Evaluation, fields: Sequence[FieldRows], cells: Sequence[str], settings: Settings) -> None:
    """Add rows, verdicts and notes of every field. `cells` are the test cells in the order of `settings.groups`."""
    place = {cell: number for number, cell in enumerate(cells)} if settings.groups is not None else {}
    for rows in fields:
        groups = None
        if settings.groups is not None:
            groups = np.asarray(settings.groups)[[place[cell] for cell in rows.cells]]
        sums, scores = (token_scores if rows.kind == "token" else number_scores)(rows)
        _add(result, rows, sums, scores, settings, groups)
        if rows.baseline.share < 1:
            result.notes.append(
                f"{rows.name}: {100 * rows.baseline.share:.2g} % of the predicted positions, chosen at random, are stored and scored "
                "(evaluation.masked_positions)"
            )


def _add(
    result: Evaluation, rows: FieldRows, sums: np.ndarray, scores: list[Score], settings: Settings, groups
) -> None:
    method, note = settings.method, f"masked positions of {len(rows.cells)} cells, which are resampled whole"
    resamples = settings.bootstrap_runs or settings.resamples
    if method not in RESAMPLING:
        note += f"; {method} does not fit several positions of a cell: {FALLBACK} is used"
        method, resamples = FALLBACK, max(settings.bootstrap_runs, settings.resamples)
    drawn = resampled(Sums(sums), resamples, settings.seed, groups)
    for model in ("model", "constant"):
        for score in scores:
            function = getattr(score, model)
            if function is None:
                continue
            metric = SumsMetric(score.name, sums, function)
            options = {"method": method, "level": settings.level, "groups": groups}
            interval = replace(interval_from_resamples(metric, function(drawn), **options), n=score.count)
            result.rows.append(metric_row(score.name, rows.name, interval, resamples, settings, model, note))
    if resamples != settings.resamples:  # a verdict is not left to a few resamples
        drawn = resampled(Sums(sums), settings.resamples, settings.seed, groups)
    differences = _differences(scores, sums.sum(axis=0, keepdims=True), drawn, settings.level)
    told = next((names for names in DECIDING if names[0] in differences), None)
    if told is None:
        return
    chosen = [differences[name] for name in told if name in differences]
    if groups is not None and len(np.unique(groups.astype(str))) == 1:
        chosen = [replace(difference, low=None, high=None) for difference in chosen]
    remark = "cells are resampled whole" if groups is None else "groups of cells are resampled together"
    result.verdicts.append(verdict(rows.name, "constant", chosen, level=settings.level, remarks=[remark]))


def _differences(scores: list[Score], total: np.ndarray, drawn: np.ndarray, level: float) -> dict[str, Difference]:
    """Each score of the model minus that of the constant guess, where it has one."""
    found = {}
    for score in scores:
        if score.constant is not None:
            ours, theirs = ((function(total)[0], function(drawn)) for function in (score.model, score.constant))
            found[score.name] = difference_of(score.name, *ours, *theirs, level)
    return found


def token_scores(rows: FieldRows) -> tuple[np.ndarray, list[Score]]:
    """(cells, S) sums, and the scores that are made of them: accuracy, perplexity, and averages over tokens where they are few."""
    label, said, known = rows.label.astype(np.int64), rows.prediction.astype(np.int64), rows.baseline
    tokens = np.unique(np.concatenate([label, said, [] if known.token is None else [known.token]])).astype(np.int64)
    columns = [np.ones(len(rows)), label == said, -rows.log_probability]
    guess = None
    if known.token is not None:
        guess = int(np.searchsorted(tokens, known.token))
        columns += [label == known.token, -_log_shares(known.token_counts)[np.minimum(label, len(known.token_counts))]]
    sums = _by_cell(rows, columns)
    scores = [
        Score("accuracy", _mean(1), None if guess is None else _mean(3), len(rows)),
        Score("perplexity", _perplexity(2), None if guess is None else _perplexity(4), len(rows)),
    ]
    if len(tokens) <= MOST_TOKENS:
        label, said, first = np.searchsorted(tokens, label), np.searchsorted(tokens, said), sums.shape[1]
        right = label == said
        tallies = [
            _tally(rows, label, right, len(tokens)),
            _tally(rows, label, None, len(tokens)),
            _tally(rows, said, None, len(tokens)),
        ]
        sums = np.concatenate([sums, *tallies], axis=1)
        scores += [_over_tokens(name, first, len(tokens), guess, len(rows)) for name in (*BY_CLASS, "mcc")]
    return sums, scores


def _log_shares(counts: np.ndarray) -> np.ndarray:
    """(V + 1,) logarithm of each token's share, one of each added so that none is impossible; the last is of tokens beyond."""
    padded = np.append(np.nan_to_num(counts), 0) + 1
    return np.log(padded / padded[:-1].sum())


def _over_tokens(name: str, first: int, size: int, guess: int | None, count: int) -> Score:
    def score(counts: ClassCounts) -> np.ndarray:
        return mcc_of(counts) if name == "mcc" else macro(name, counts)

    def model(sums: np.ndarray) -> np.ndarray:
        return score(ClassCounts(*np.split(sums[:, first : first + 3 * size], 3, axis=1)))

    def constant(sums: np.ndarray) -> np.ndarray:
        true = sums[:, first + size : first + 2 * size]
        hits, said = np.zeros_like(true), np.zeros_like(true)
        hits[:, guess], said[:, guess] = true[:, guess], true.sum(axis=1)
        return score(ClassCounts(hits, true, said))

    return Score(name, model, None if guess is None else constant, count)


def number_scores(rows: FieldRows) -> tuple[np.ndarray, list[Score]]:
    """(cells, S) sums, and the scores that are made of them: errors, correlation, and whether zeros are told from the rest."""
    known, label, said = rows.baseline, rows.label, rows.prediction
    counted = (label != 0) if known.ignores_zero else np.ones(len(rows), dtype=bool)
    zero = label == 0
    columns, scores = [], []

    def put(*new: np.ndarray) -> int:
        columns.extend(np.asarray(values, dtype=np.float64) for values in new)
        return len(columns) - len(new)

    if known.has_number and counted.any():
        count, error = int(counted.sum()), np.where(counted, said - label, 0.0)
        # Moments around the means: those around zero would lose digits.
        x, y = (np.where(counted, values - values[counted].mean(), 0.0) for values in (label, said))
        at = put(counted, error**2, np.abs(error), x, y, x * x, y * y, x * y)
        guess = [None] * 4
        if known.mean is not None:
            away = np.where(counted, label - known.mean, 0.0) ** 2, np.where(counted, np.abs(label - known.median), 0.0)
            own = put(*away)
            guess = [_mean(own, at), _mean(own + 1, at), _explained(own, at), _none]
        scores += [
            Score("mse", _mean(at + 1, at), guess[0], count),
            Score("mae", _mean(at + 2, at), guess[1], count),
            Score("pcc", _correlation(at), guess[3], count),
            Score("r2", _explained(at + 1, at), guess[2], count),
        ]
        if zero[counted].any() and (nonzero := counted & ~zero).any():
            own = put(nonzero, np.where(nonzero, np.abs(error), 0.0))
            constant = None
            if known.median is not None:
                constant = _mean(put(np.where(nonzero, np.abs(label - known.median), 0.0)), own)
            scores.append(Score("mae_nonzero", _mean(own + 1, own), constant, int(nonzero.sum())))
    if known.says_zero or (zero.any() and not known.ignores_zero):
        says = rows.says_zero
        at = put(np.ones(len(rows)), says == zero, says & zero, says, zero)
        always = None
        if known.zero is not None:
            always = _mean(at + 4 if known.zero else put(~zero), at)
        scores.append(Score("zero_accuracy", _mean(at + 1, at), always, len(rows)))
        if zero.any():
            scores.append(
                Score(
                    "zero_f1", _f1(at + 2, at + 3, at + 4), _f1(at + 4, at, at + 4) if known.zero else None, len(rows)
                )
            )
    return _by_cell(rows, columns), scores


def _by_cell(rows: FieldRows, columns: Sequence[np.ndarray]) -> np.ndarray:
    size = len(rows.cells)
    found = [np.bincount(rows.cell, np.asarray(values, dtype=np.float64), minlength=size) for values in columns]
    return np.stack(found, axis=1) if found else np.zeros((size, 0))


def _tally(rows: FieldRows, tokens: np.ndarray, where: np.ndarray | None, size: int) -> np.ndarray:
    """(cells, tokens) how often each token occurs in each cell, `where` it is true."""
    flat = rows.cell * size + tokens
    counts = np.bincount(flat if where is None else flat[where], minlength=len(rows.cells) * size)
    return counts.reshape(len(rows.cells), size)


def _mean(column: int, count: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: divided(sums[:, column], sums[:, count], np.nan)


def _f1(right: int, said: int, true: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: divided(2 * sums[:, right], sums[:, said] + sums[:, true])


def _perplexity(column: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: np.exp(_mean(column)(sums))


def _none(sums: np.ndarray) -> np.ndarray:
    """The correlation of a constant is not defined."""
    return np.full(len(sums), np.nan)


def _explained(error: int, at: int) -> Callable[[np.ndarray], np.ndarray]:
    """Share of the variance explained, from the sum of squared errors and the moments that begin at `at`."""

    def score(sums: np.ndarray) -> np.ndarray:
        count, x, xx = sums[:, at], sums[:, at + 3], sums[:, at + 5]
        spread = xx - divided(x * x, count)
        return 1 - divided(sums[:, error], np.where(spread > 1e-12 * xx, spread, 0.0), np.nan)

    return score


def _correlation(at: int) -> Callable[[np.ndarray], np.ndarray]:
    def score(sums: np.ndarray) -> np.ndarray:
        count, x, y, xx, yy, xy = (sums[:, at + offset] for offset in (0, 3, 4, 5, 6, 7))
        spreads = [own2 - divided(own * own, count) for own, own2 in ((x, xx), (y, yy))]
        spreads = [np.where(spread > 1e-12 * own2, spread, 0.0) for spread, own2 in zip(spreads, (xx, yy), strict=True)]
        return np.clip(divided(xy - divided(x * y, count), np.sqrt(spreads[0] * spreads[1]), np.nan), -1, 1)

    return score
