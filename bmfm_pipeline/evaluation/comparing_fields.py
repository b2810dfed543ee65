"""Two evaluations of masked fields beside each other: on the positions that both predicted, cells resampled whole."""

from dataclasses import replace

import numpy as np

from bmfm_pipeline.evaluation.comparing import Comparison, Contender, add_target, entry_of, plain_difference
from bmfm_pipeline.evaluation.field_predictions import FieldRows
from bmfm_pipeline.evaluation.masked_fields import DECIDING, Score, number_scores, token_scores
from bmfm_pipeline.evaluation.matching import FEWEST_SHARED, MOST_DIFFERING
from bmfm_pipeline.evaluation.metric_kinds.sums import Sums
from bmfm_pipeline.evaluation.resampling import resampled
from bmfm_pipeline.evaluation.verdicts import difference_of
from bmfm_pipeline.evaluation.wording import verdict


def compare_fields(result: Comparison, a: Contender, b: Contender) -> None:
    """Add every masked field that both sides predicted in the same way, as tokens or as numbers."""
    theirs = {(rows.name, rows.kind): rows for rows in b.fields}
    names = [rows.name for rows in a.fields]
    for ours in a.fields:
        if (ours.name, ours.kind) in theirs:
            title = f"masked {ours.name}" + (f", as a {ours.kind}" if names.count(ours.name) > 1 else "")
            _compare_field(result, title, a, ours, b, theirs[ours.name, ours.kind])


def _compare_field(
    result: Comparison, title: str, a: Contender, ours: FieldRows, b: Contender, theirs: FieldRows
) -> None:
    at_a, at_b = _shared(ours, theirs)
    same = np.isclose(ours.label[at_a], theirs.label[at_b], rtol=1e-5, atol=0)
    if len(same) and np.mean(~same) > MOST_DIFFERING:
        result.notes.append(
            f"{title}: at {int((~same).sum()):,} of {len(same):,} positions that both predicted the two hold other labels (other bins, or values "
            "transformed in another way), so their scores cannot be compared"
        )
        return
    at_a, at_b = at_a[same], at_b[same]
    paired = len(np.unique(ours.cell[at_a])) >= min(FEWEST_SHARED, len(ours.cells), len(theirs.cells))
    counts = f"{len(ours):,} of A and {len(theirs):,} of B"
    if paired:
        cells = [ours.cells[code] for code in np.unique(ours.cell[at_a])]
        ours, theirs = _only(ours, at_a, cells), _only(theirs, at_b, cells)
        sentence = (
            f"paired on the {len(at_a):,} masked positions of {len(cells):,} cells that both predicted ({counts})"
        )
    else:
        sentence = f"unpaired: the masked positions are not the same ({counts}), so each side is resampled by itself"
    groups_a, groups_b, column = _groups_of(a, ours), _groups_of(b, theirs), a.group_column or b.group_column
    if paired:
        groups_a = groups_b = groups_a if groups_a is not None else groups_b
    if any(groups is not None and len(set(groups)) < 2 for groups in (groups_a, groups_b)):
        result.notes.append(
            f"{title}: all compared cells of a side have the same {column}, so groups are not resampled"
        )
        groups_a = groups_b = column = None
    sums_a, scores_a = _scores(ours)
    sums_b, scores_b = _scores(theirs)
    if paired:
        drawn = resampled(Sums(np.concatenate([sums_a, sums_b], axis=1)), result.resamples, result.seed, groups_a)
        drawn_a, drawn_b = drawn[:, : sums_a.shape[1]], drawn[:, sums_a.shape[1] :]
    else:
        drawn_a = resampled(Sums(sums_a), result.resamples, result.seed, groups_a)
        drawn_b = resampled(Sums(sums_b), result.resamples, result.seed + 1, groups_b)
    other = {score.name: score for score in scores_b}
    rows, differences = [], {}
    for score in scores_a:
        if score.name not in other:
            continue
        point_a, values_a = _evaluated(score, sums_a, drawn_a)
        point_b, values_b = _evaluated(other[score.name], sums_b, drawn_b)
        found = difference_of(score.name, point_a, values_a, point_b, values_b, result.level)
        differences[score.name] = found
        rows.append(
            {
                "metric": score.name,
                "a": entry_of(point_a, values_a, result.level),
                "b": entry_of(point_b, values_b, result.level),
                "difference": plain_difference(found),
                "kind": found.kind,
            }
        )
    told = next((names for names in DECIDING if names[0] in differences), None)
    if told is None:
        result.notes.append(f"{title}: the two sides have no score in common")
        return
    remarks = [] if paired else ["unpaired"]
    remarks.append("cells are resampled whole" if column is None else "groups of cells are resampled together")
    chosen = [differences[name] for name in told if name in differences]
    sentence_of = verdict(title, "B", chosen, level=result.level, subject="A", remarks=remarks)
    add_target(result, title, sentence_of, paired=paired, sentence=sentence, n=(len(ours), len(theirs)), grouped_by=column, rows=rows)  # fmt: skip


def _shared(ours: FieldRows, theirs: FieldRows) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both that are of the same gene of the same cell; where a side has a position twice, of neither."""
    cells = {name: code for code, name in enumerate(dict.fromkeys([*ours.cells, *theirs.cells]))}
    genes = {name: code for code, name in enumerate(dict.fromkeys([*ours.genes, *theirs.genes]))}

    def keys(rows: FieldRows) -> tuple[np.ndarray, np.ndarray]:
        known = np.flatnonzero(rows.gene >= 0)
        of_cell = np.array([cells[name] for name in rows.cells], dtype=np.int64)[rows.cell[known]]
        of_gene = np.array([genes[name] for name in rows.genes], dtype=np.int64)[rows.gene[known]]
        found, first, times = np.unique(of_cell * len(genes) + of_gene, return_index=True, return_counts=True)
        return found[times == 1], known[first[times == 1]]

    (keys_a, rows_a), (keys_b, rows_b) = keys(ours), keys(theirs)
    _, place_a, place_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    return rows_a[place_a], rows_b[place_b]


def _only(rows: FieldRows, index: np.ndarray, cells: list[str]) -> FieldRows:
    """These rows alone; `cells` are all that they are of, in the order that both sides share."""
    place = {name: code for code, name in enumerate(cells)}
    renumbered = np.array([place.get(name, -1) for name in rows.cells], dtype=np.int64)
    chosen = {
        name: getattr(rows, name)[index]
        for name in ("gene", "label", "prediction", "log_probability", "zero_probability")
    }
    return replace(rows, cells=cells, cell=renumbered[rows.cell[index]], **chosen)


def _groups_of(side: Contender, rows: FieldRows) -> np.ndarray | None:
    if side.groups is None:
        return None
    of_cell = dict(zip(side.predictions.cells, side.groups, strict=True))
    return np.array([of_cell[name] for name in rows.cells], dtype=object)


def _scores(rows: FieldRows) -> tuple[np.ndarray, list[Score]]:
    return (token_scores if rows.kind == "token" else number_scores)(rows)


def _evaluated(score: Score, sums: np.ndarray, drawn: np.ndarray) -> tuple[float, np.ndarray]:
    return float(score.model(sums.sum(axis=0, keepdims=True))[0]), score.model(drawn)
