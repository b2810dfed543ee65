"""Attributions of the cells of a loader: which classes, one cell after another into attributions.json, and what the tables need."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmfm_pipeline.errors import ConfigError, did_you_mean
from bmfm_pipeline.evaluation.attributions.files import AttributionsWriter, entry
from bmfm_pipeline.evaluation.attributions.integrate import Attributed, Attributor
from bmfm_pipeline.evaluation.attributions.paths import naming_row

# With more classes, a cell's own are attributed only.
ALL_CLASSES = 12
PATHS = ("positions", "cell_summary", "linear_path")


@dataclass
class LabelColumn:
    """A label column: its classes in id order (none for numbers), the true ones of all cells of the store, and which are wanted.

    truth : class ids (cells,), -100 where unknown, 0 and 1 (cells, classes) where a cell may have several, or numbers; None where
        nothing is known. wanted : class numbers; None stands for the predicted and the true one of each cell.
    """

    name: str
    classes: list[str]
    truth: np.ndarray | None = None
    several: bool = False
    separator: str = "|"
    wanted: list[int] | None = None

    @property
    def outputs(self) -> int:
        return max(1, len(self.classes))


def wanted_classes(name: str, classes: Sequence[str], asked: dict[str, list[str]] | None) -> list[int] | None:
    """Which classes of a label column are attributed, None for the predicted and the true one. Raises ConfigError for an unknown class."""
    named = (asked or {}).get(name)
    if not classes or (named is None and len(classes) <= ALL_CLASSES):
        return list(range(max(1, len(classes))))
    if named is None:
        return None
    if strange := [one for one in named if one not in classes]:
        shown = f"there are {', '.join(classes[:20])}" + (", ..." if len(classes) > 20 else "")
        raise ConfigError(
            f"task.attribute_filter.{name}: no class '{strange[0]}'; {did_you_mean(strange[0], classes, shown)}"
        )
    return [list(classes).index(one) for one in named]


@dataclass
class OwnScores:
    """Attributions of one class in the cells that are of it, as rows of (cell, token, score): lists of arrays of equal length."""

    cells: list[str] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)


@dataclass
class Collected:
    """What was found besides attributions.json.

    own : {(label column, class number): scores in its cells}; a column of numbers has the class number 0, and all cells are of it.
    facts : one row per cell, column and class, how the score came about and how exactly it was followed.
    """

    own: dict[tuple[str, int], OwnScores] = field(default_factory=dict)
    facts: list[dict[str, Any]] = field(default_factory=list)


def attribute_cells(
    attributor: Attributor,
    loader,
    columns: Sequence[LabelColumn],
    tokens: Sequence[str],
    path: str | Path,
    on_batch: Callable[[int], None] | None = None,
) -> Collected:
    """Write `path` (attributions.json) for every cell of `loader`; `tokens` are the words of the field that names positions.

    Scores of a cell and class are divided by their length, the root of their sum of squares, so that cells weigh alike.
    """
    found, done = Collected(), 0
    with AttributionsWriter(path) as writer:
        for batch in loader:
            for name, entries in _of_batch(attributor, batch, columns, tokens, found):
                writer.add(name, entries)
            done += len(batch["cell_name"])
            if on_batch:
                on_batch(done)
    return found


def _of_batch(
    attributor: Attributor,
    batch: dict[str, Any],
    columns: Sequence[LabelColumn],
    tokens: Sequence[str],
    found: Collected,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows, cells = batch["cell_index"].numpy(), batch["cell_name"]
    logits = logits_of(attributor, ids, mask)
    predicted = {column.name: _predict(column, logits[column.name]) for column in columns}
    targets = [_targets(attributor, columns, predicted, rows, number) for number in range(len(cells))]
    genes = (attributor.baseline.genes(ids, attributor.scores.fields) & (mask > 0)).numpy()
    names = ids[:, naming_row(attributor.scores.fields)].to(torch.int64).numpy()
    results = _by_number_of_targets(attributor, ids, mask, targets)
    for number, cell in enumerate(cells):
        attributed, place = results.get(number, (None, 0))
        shown = names[number][genes[number]]
        words = [tokens[token] for token in shown]
        wanted = {one: position for position, one in enumerate(targets[number])}
        entries = []
        for column in columns:
            start = attributor.scores.starts[column.name]
            own = _own_classes(column, rows[number], predicted[column.name][number])
            listed = []
            for kind in range(column.outputs):
                if start + kind not in wanted:
                    continue
                at = wanted[start + kind]
                plain = attributed.scores[place, at][genes[number]]
                length = float(np.sqrt(np.square(plain).sum()))
                normed = plain / length if length > 0 else plain
                class_name = column.classes[kind] if column.classes else None
                listed.append(entry(words, normed.tolist(), class_name))
                found.facts.append(
                    {"cell": cell, "label": column.name, "class": class_name, "own": kind in own}
                    | {"true": _truth(column, rows[number]), "predicted": _say(column, predicted[column.name][number])}
                    | _account(attributed, place, at)
                )
                if kind in own:
                    scores = found.own.setdefault((column.name, kind), OwnScores())
                    scores.cells.append(cell)
                    scores.tokens.append(shown.astype(np.int32))
                    scores.scores.append(normed.astype(np.float32))
                    scores.logits.append(plain.astype(np.float32))
            entries.append(
                {
                    "label_column_name": column.name,
                    "pred_label": _say(column, predicted[column.name][number]),
                    "label_attributions": listed,
                }
            )
        yield cell, entries


def logits_of(attributor: Attributor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """{label column: (B, outputs)}, as prediction computes them."""
    with torch.inference_mode():
        logits = attributor.model(ids.to(attributor.device), mask.to(attributor.device), positions={}).logits
    return {label.name: logits[label.name].float().cpu().numpy() for label in attributor.scores.labels}


def _predict(column: LabelColumn, logits: np.ndarray) -> np.ndarray:
    """Of each cell the class number, 0 and 1 for each class, or the number."""
    if column.several:
        return logits > 0
    return logits.argmax(axis=1) if column.classes else logits[:, 0]


def _known(column: LabelColumn, row: int) -> Any:
    value = None if column.truth is None else column.truth[row]
    if value is None or (not column.several and column.classes and value < 0):
        return None
    return value


def _own_classes(column: LabelColumn, row: int, predicted: Any) -> set[int]:
    """The classes that a cell counts for: its true ones, and the predicted ones where that is not known."""
    if not column.classes:
        return {0}
    known = _known(column, row)
    value = predicted if known is None else known
    return set(np.flatnonzero(value > 0).tolist()) if column.several else {int(value)}


def _say(column: LabelColumn, value: Any) -> Any:
    """A prediction or a true value in words; numbers stay numbers."""
    if column.several:
        chosen = (name for name, has in zip(column.classes, value, strict=True) if has > 0)
        return column.separator.join(chosen) or column.separator
    return column.classes[int(value)] if column.classes else float(value)


def _truth(column: LabelColumn, row: int) -> Any:
    known = _known(column, row)
    if known is None or (not column.classes and not np.isfinite(known)):
        return None
    return _say(column, known)


def _targets(
    attributor: Attributor,
    columns: Sequence[LabelColumn],
    predicted: dict[str, np.ndarray],
    rows: np.ndarray,
    number: int,
) -> list[int]:
    """The outputs that one cell is attributed for, ascending."""
    chosen: set[int] = set()
    for column in columns:
        start, value = attributor.scores.starts[column.name], predicted[column.name][number]
        if column.wanted is not None:
            chosen |= {start + kind for kind in column.wanted}
            continue
        guessed = np.flatnonzero(value).tolist() if column.several else [int(value)]
        chosen |= {start + kind for kind in {*guessed, *_own_classes(column, rows[number], value)}}
    return sorted(chosen)


def _by_number_of_targets(
    attributor: Attributor, ids: torch.Tensor, mask: torch.Tensor, targets: list[list[int]]
) -> dict[int, tuple[Attributed, int]]:
    """Of each cell what was found and its place there; cells with as many targets go together."""
    results = {}
    for count in sorted({len(chosen) for chosen in targets}):
        members = [number for number, chosen in enumerate(targets) if len(chosen) == count]
        if not count:
            continue
        where = torch.tensor(members)
        attributed = attributor(ids[where], mask[where], torch.tensor([targets[number] for number in members]))
        results |= {number: (attributed, place) for place, number in enumerate(members)}
    return results


def _account(attributed: Attributed, place: int, at: int) -> dict[str, Any]:
    """How a score came about: its value, that of the baseline, the part of each way between, and what the sum misses."""
    ways = dict(zip(PATHS, attributed.paths[place, at].tolist(), strict=True))
    return {
        "score": float(attributed.end[place, at]),
        "baseline_score": float(attributed.start[place, at]),
        **ways,
        "delta": float(attributed.delta[place, at]),
        "error": float(attributed.error[place]),
        "steps": int(attributed.steps[place]),
    }


def choose_cells(columns: Sequence[LabelColumn], rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most `most` of the cells `rows` for each class of each column, or for each column of numbers; seeded, ascending."""
    chosen: set[int] = set()
    for number, column in enumerate(columns):
        known = column.truth[rows] if column.truth is not None else None
        if known is None or not column.classes:
            pools = [rows]
        elif column.several:
            pools = [rows[known[:, kind] > 0] for kind in range(len(column.classes))]
        else:
            pools = [rows[known == kind] for kind in range(len(column.classes))]
        for kind, pool in enumerate(pools):
            rng = np.random.default_rng([seed & 0xFFFFFFFF, number, kind])
            chosen |= set(rng.permutation(pool)[:most].tolist())
    return np.array(sorted(chosen), dtype=np.int64)
