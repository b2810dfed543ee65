"""What attributions say, as plain numbers and sentences: interpretation.json."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.attributions.cells import PATHS

SHOWN, AGAINST = 15, 5
RATE = 0.05
WAYS = {
    "positions": "the states of its own positions",
    "cell_summary": "the summary at position 0",
    "linear_path": "the linear path",
}


def summarise_class(name: str | None, table: dict[str, Any], stability: float | None) -> dict[str, Any]:
    """One class: how many cells, which genes raise its score most and which lower it, and how many stand out."""
    rows = _rows(table)
    lowest = [row for row in reversed(rows) if row["mean"] < 0][:AGAINST]
    return {
        "class": name,
        "n_cells": int(table["n_cells"][0]) if rows else 0,
        "genes": len(rows),
        "stand_out": int(np.sum(np.asarray(table["q_null"]) < RATE)),
        "top_stability": stability,
        "top": [row for row in rows[:SHOWN] if row["mean"] > 0],
        "against": lowest,
    }


def _rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    names = list(table)
    return [
        {name: _plain(value) for name, value in zip(names, values, strict=True)}
        for values in zip(*(table[name] for name in names), strict=True)
    ]


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def completeness(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far sums of attributions miss the change of the score, and by which way the change came about.

    error: |sum - (score - score of the baseline)| as a share of the largest change of the cell. ways: mean share of each way in the sum
    of their sizes.
    """
    errors = np.array([fact["error"] for fact in facts])
    sizes = np.array([[abs(fact[way]) for way in PATHS] for fact in facts])
    whole = np.maximum(sizes.sum(axis=1, keepdims=True), 1e-12)
    return {
        "median_error": float(np.median(errors)),
        "largest_error": float(errors.max()),
        "largest_delta": float(max(abs(fact["delta"]) for fact in facts)),
        "steps": {str(count): int(np.sum([fact["steps"] == count for fact in facts])) for count in _counts(facts)},
        "ways": dict(zip(PATHS, (sizes / whole).mean(axis=0).tolist(), strict=True)),
    }


def baseline_class(facts: Sequence[dict[str, Any]]) -> str | None:
    """The class that baselines score highest, on the mean; None for numbers, and where not all classes are attributed alike."""
    scores: dict[str, list[float]] = {}
    for fact in facts:
        if fact["class"]:
            scores.setdefault(fact["class"], []).append(float(fact["baseline_score"]))
    if len(scores) < 2 or len({len(found) for found in scores.values()}) > 1:
        return None
    return max(scores, key=lambda name: float(np.mean(scores[name])))


def _counts(facts: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({fact["steps"] for fact in facts})


def sentences(found: dict[str, Any]) -> list[str]:
    """The main points in words, of interpretation.json without its sentences."""
    said = []
    for name, label in found["labels"].items():
        classes = label["classes"]
        clear = [entry for entry in classes if entry["stand_out"]]
        if not classes:
            said.append(
                f"{name}: no cell here is of the classes that were attributed, so there are scores by cell only"
            )
        elif len(classes) == 1 and classes[0]["class"] is None:
            said.append(
                f"{name}: {classes[0]['stand_out']} genes stand out from the others in {classes[0]['n_cells']} cells"
            )
        else:
            said.append(
                f"{name}: in {len(clear)} of {len(classes)} classes there are genes that stand out from the others (false discovery "
                f"rate {100 * RATE:g} %, against scores dealt to genes at random within cells)"
            )
        if label.get("baseline_class"):
            said.append(
                f"{name}: the baseline alone scores highest as {label['baseline_class']}, so that cells of this class need less from their genes"
            )
        sums = label["completeness"]
        ways = ", ".join(f"{100 * share:.0f} % by {WAYS[way]}" for way, share in sums["ways"].items() if share > 0)
        said.append(
            f"{name}: genes' scores add up to the change from the baseline within {100 * sums['largest_error']:.2g} % in every cell "
            f"(median {100 * sums['median_error']:.2g} %); {ways}"
        )
    return said + _of_checks(found.get("checks") or {})


def _of_checks(checks: dict[str, Any]) -> list[str]:
    said = []
    steps = checks.get("steps") or {}
    if steps.get("top_in_common") is not None:
        said.append(
            f"with half as many steps, {100 * steps['top_in_common']:.0f} % of the {steps['top']} top genes of a cell stay the same "
            f"({checks['cells']} cells)"
        )
    if exchanged := checks.get("exchanged"):
        said.append(
            f"exchanging the {100 * exchanged['share']:.0f} % of bases with the largest scores lowers the score of a class by "
            f"{exchanged['top']:.2f}, as many random bases by {exchanged['random']:.2f}; by more in {100 * exchanged['above']:.0f} % of "
            f"{exchanged['sequences']} sequences"
        )
    sanity = {name: entry for name, entry in (checks.get("sanity") or {}).items() if entry["n"]}
    for name, entry in sanity.items():
        words = {
            "head": "the label heads' weights shuffled",
            "model": "all weights shuffled",
            "another_class": "another class's score",
        }
        verdict = (
            "as it should be"
            if entry["mean"] < 0.5
            else "too alike: much of these scores is about the input, not about what was learned"
        )
        if name == "another_class":
            verdict = "classes are told apart" if entry["mean"] < 0.5 else "much of the scores is common to classes"
        said.append(f"rank correlation of scores' sizes with {words[name]}: {entry['mean']:.2f} ({verdict})")
    return said
