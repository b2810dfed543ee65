"""Attributions of single bases: what the pieces of a sequence add to a score, spread over their letters."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.attributions.cells import Collected, LabelColumn
from bmfm_pipeline.evaluation.pages.logos import drawn_part

IN_LOGOS, MOST_LOGOS = 3, 30
EXCHANGED_SHARE, EXCHANGED_SEQUENCES = 0.1, 32
BASES = "ACGT"


@dataclass
class BaseScores:
    """Of one sequence and class: `letters` that the model reads, and `scores` (len(letters),), points of the class's score.

    Scores add up to `score` less that of the baseline. `predicted`: what the sequence is predicted as.
    """

    name: str
    label: str
    kind: str | None
    predicted: Any
    score: float
    letters: str
    scores: np.ndarray


def spread(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Scores of pieces (n,), of `lengths` letters each -> of letters: each has an even part of its piece's."""
    return np.repeat(np.asarray(scores, dtype=np.float64) / lengths, lengths)


def base_scores(
    found: Collected, columns: Sequence[LabelColumn], letters: dict[str, str], lengths: Callable[[str], np.ndarray]
) -> list[BaseScores]:
    """Every sequence with the classes that it is of. `lengths` says how many letters each piece of a sequence has."""
    classes = {column.name: column.classes for column in columns}
    facts = {(fact["cell"], fact["label"], fact["class"]): fact for fact in found.facts}
    made = []
    order = list(classes)
    for (label, number), own in sorted(found.own.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        kind = classes[label][number] if classes[label] else None
        for name, scores in zip(own.cells, own.logits, strict=True):
            sizes = lengths(letters[name])[: len(scores)]
            fact = facts[name, label, kind]
            made.append(
                BaseScores(
                    name,
                    label,
                    kind,
                    fact["predicted"],
                    fact["score"],
                    letters[name][: sizes.sum()],
                    spread(scores, sizes),
                )
            )
    return made


def write_bases(folder: Path, found: Sequence[BaseScores]) -> None:
    """base_attributions.json, a list of {name, label_column_name, label_name, pred_label, letters, scores}, and base_attributions.csv."""
    with open(folder / "base_attributions.json", "w", encoding="utf-8") as stream:
        stream.write("[")
        for number, one in enumerate(found):
            entry = {
                "name": one.name,
                "label_column_name": one.label,
                "label_name": one.kind,
                "pred_label": one.predicted,
            }
            entry |= {"letters": one.letters, "scores": [float(f"{score:.6g}") for score in one.scores]}
            stream.write(",\n" if number else "\n")
            json.dump(entry, stream, ensure_ascii=False)
        stream.write("\n]\n")
    import pandas as pd

    header = True
    with open(folder / "base_attributions.csv", "w", newline="", encoding="utf-8") as stream:
        for one in found:
            columns = {"sequence": one.name, "label": one.label, "class": one.kind}
            columns |= {"position": np.arange(1, len(one.letters) + 1), "base": list(one.letters), "score": one.scores}
            pd.DataFrame(columns).to_csv(stream, index=False, header=header, float_format="%.6g")
            header = False


def top_sequences(found: Sequence[BaseScores]) -> dict[str, list[dict[str, Any]]]:
    """{label column: what is drawn}: of each class the sequences with the highest scores, those that are predicted as it first."""
    drawn: dict[str, list[dict[str, Any]]] = {}
    for label in dict.fromkeys(one.label for one in found):
        kinds = dict.fromkeys(one.kind for one in found if one.label == label)
        for kind in list(kinds)[: MOST_LOGOS // IN_LOGOS]:
            own = [one for one in found if one.label == label and one.kind == kind]
            own.sort(key=lambda one: (one.kind is not None and not _is_predicted(one), -one.score))
            drawn.setdefault(label, []).extend(_drawn(one) for one in own[:IN_LOGOS])
    return drawn


def _is_predicted(one: BaseScores) -> bool:
    return one.predicted == one.kind or (isinstance(one.predicted, str) and one.kind in one.predicted.split("|"))


def _drawn(one: BaseScores) -> dict[str, Any]:
    part = drawn_part(one.scores)
    return {
        "name": one.name,
        "class": one.kind,
        "predicted": one.predicted,
        "score": one.score,
        "first": part.start + 1,
        "letters": one.letters[part],
        "scores": [float(f"{score:.4g}") for score in one.scores[part]],
    }


def check_exchanged(
    found: Sequence[BaseScores], score: Callable[[str, str | None, list[str]], np.ndarray], seed: int
) -> dict[str, Any] | None:
    """By how much scores fall when the bases with the largest attributions are exchanged, and when as many others are, drawn at random.

    `score(label, class, sequences)` gives the scores of a class. A tenth of the bases of each of up to 32 sequences are exchanged for
    random other ones. Returns {top, random, share, sequences, above}, means over sequences; `above` is the share of those that lose more by
    the first. None where no sequence has enough letters.
    """
    long_enough = [one for one in found if len(one.letters) >= 1 / EXCHANGED_SHARE]
    if not long_enough:
        return None
    places = np.unique(np.linspace(0, len(long_enough) - 1, min(len(long_enough), EXCHANGED_SEQUENCES)).astype(int))
    falls = []
    for number in places.tolist():
        one, rng = long_enough[number], np.random.default_rng([seed & 0xFFFFFFFF, 3, number])
        count = round(EXCHANGED_SHARE * len(one.letters))
        chosen = [np.argsort(-one.scores, kind="stable")[:count], rng.permutation(len(one.letters))[:count]]
        others = [_exchanged(one.letters, where, rng) for where in chosen]
        scores = score(one.label, one.kind, [one.letters, *others])
        falls.append([scores[0] - scores[1], scores[0] - scores[2]])
    top, random = np.array(falls, dtype=np.float64).T
    return {
        "share": EXCHANGED_SHARE,
        "sequences": len(falls),
        "top": float(top.mean()),
        "random": float(random.mean()),
        "above": float((top > random).mean()),
    }


def _exchanged(letters: str, places: np.ndarray, rng: np.random.Generator) -> str:
    changed = list(letters)
    for place in places.tolist():
        changed[place] = rng.choice([base for base in BASES if base != letters[place]])
    return "".join(changed)
