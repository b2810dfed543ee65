"""Tests of several datasets, models and seeds as one table: every method with its interval, and a best one only where that is shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.benchmark_words import failed_sentence, ranked_sentence, task_sentence
from bmfm_pipeline.evaluation.metrics import ALL_METRICS, SCORE_METRICS, Metric
from bmfm_pipeline.evaluation.resampling import resampled_together
from bmfm_pipeline.evaluation.study import PointScores, student_t
from bmfm_pipeline.evaluation.tables import LABELS
from bmfm_pipeline.evaluation.verdicts import difference_of
from bmfm_pipeline.evaluation.wording import SMALLER_IS_BETTER, Difference

# What is shown of a task where the suite names nothing: the first of these groups of which it has a metric.
SHOWN = (
    ("accuracy", "f1"),
    ("subset_accuracy", "f1"),
    ("mse", "pcc"),
    ("agg_mae", "delta_agg_pcc"),
    ("accuracy", "perplexity"),
)
# By which methods are ranked, the first that is shown.
RANKED_BY = ("f1", "delta_agg_pcc", "agg_mae", "mse", "accuracy")
# Controls that are made of the model: with several models each has its own.
OF_THE_MODEL = ("linear_probe", "knn", "no_pretrain")


@dataclass(frozen=True)
class CellScores:
    """One cell: the scores of a model, and of the controls beside it, by the seed of `scores`. `data` names what it was prepared from."""

    dataset: str
    model: str
    scores: PointScores
    data: str = ""


@dataclass
class _Method:
    """A method of a task by seed: the scores it stands in, under a name of their rows."""

    name: str
    row: str
    tests: list[CellScores] = field(default_factory=list)

    def rows(self, target: str, metric: str) -> list[dict[str, Any]]:
        found = [
            next(
                (r for r in test.scores.rows if (r["target"], r["metric"], r["model"]) == (target, metric, self.row)),
                None,
            )
            for test in self.tests
        ]
        return [row for row in found if row is not None and row["value"] is not None]

    def guesses(self, target: str) -> list[np.ndarray] | None:
        found = [test.scores.guesses.get(target, {}).get(self.row) for test in self.tests]
        return None if any(guess is None for guess in found) else found


def benchmark_of(
    tests: Sequence[CellScores],
    *,
    seeds_of: str = "finetuning",
    metrics: Sequence[str] = (),
    rank_by: str | None = None,
    failed: Sequence[dict[str, str]] = (),
    level: float = 0.95,
    resamples: int = 1000,
    stratified: bool = False,
) -> dict[str, Any]:
    """{rows, tasks, ranks, sentences, notes, failed, level, resamples, seeds_of}.

    A row is a metric of a method on a task (a dataset's label column): `value` is the mean over seeds, `ci_low` and `ci_high` its
    interval over test cells, `sd` the spread over `n_seeds`, `behind` the difference to the method with the best value, `best` whether
    that method is shown to be ahead of every other one.
    """
    rows: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []
    notes: list[str] = []
    for dataset in dict.fromkeys(test.dataset for test in tests):
        own = [test for test in tests if test.dataset == dataset]
        for target in dict.fromkeys(row["target"] for test in own for row in test.scores.rows):
            methods = _methods([test for test in own if any(row["target"] == target for row in test.scores.rows)])
            shown = _shown(methods, target, metrics)
            if not shown:
                notes.append(f"{dataset}, {target}: the model has no metric that could be shown")
                continue
            if metrics and not set(shown) & set(metrics):
                notes.append(f"{dataset}, {target}: has none of {', '.join(metrics)}; shown are {', '.join(shown)}")
            for metric in shown:
                rows += _compared(dataset, target, metric, methods, seeds_of, level, resamples, stratified)
            ranked = rank_by if rank_by in shown else next((name for name in RANKED_BY if name in shown), shown[0])
            tasks.append({"dataset": dataset, "target": target, "metrics": shown, "ranked_by": ranked})
    ranks = _ranks(rows, tasks)
    sentences = [task_sentence([row for row in rows if _is_of(row, task)], task, level) for task in tasks]
    sentences += [ranked_sentence(ranks)] if ranks["rows"] and len(tasks) > 1 else []
    sentences += [failed_sentence(failed)] if failed else []
    return {
        "rows": rows,
        "tasks": tasks,
        "ranks": ranks,
        "sentences": sentences,
        "notes": [*notes, *_notes(rows, seeds_of, resamples)],
        "failed": list(failed),
        "level": level,
        "resamples": resamples,
        "seeds_of": seeds_of,
    }


def _is_of(row: dict[str, Any], task: dict[str, Any]) -> bool:
    return (row["dataset"], row["target"], row["metric"]) == (task["dataset"], task["target"], task["ranked_by"])


def _methods(tests: list[CellScores]) -> list[_Method]:
    """The models, then the controls; a control that depends on the model, or on cells prepared for one model, once for each."""
    models = list(dict.fromkeys(test.model for test in tests))
    found = {}
    for test in tests:
        found.setdefault(("model", test.model), _Method(test.model, "model")).tests.append(test)
    same_cells = len({(test.data, test.scores.seed) for test in tests}) <= len({test.scores.seed for test in tests})
    controls: dict[tuple[str, str], _Method] = {}
    for test in tests:
        for name in dict.fromkeys(row["model"] for row in test.scores.rows if row["model"] != "model"):
            own = len(models) > 1 and (name in OF_THE_MODEL or not same_cells)
            label = LABELS.get(name, name) + (f" ({test.model})" if own else "")
            method = controls.setdefault((name, test.model if own else ""), _Method(label, name))
            if all(other.scores.seed != test.scores.seed for other in method.tests):
                method.tests.append(test)
    return [*found.values(), *controls.values()]


def _shown(methods: list[_Method], target: str, asked: Sequence[str]) -> list[str]:
    there = list(
        dict.fromkeys(
            row["metric"] for method in methods[:1] for test in method.tests for row in test.scores.rows
            if row["target"] == target and row["model"] == "model" and row["value"] is not None
        )
    )  # fmt: skip
    if wanted := [name for name in asked if name in there]:
        return wanted
    best = next((group for group in SHOWN if group[0] in there), there[:2])
    return [name for name in best if name in there]


def _compared(
    dataset: str,
    target: str,
    metric: str,
    methods: list[_Method],
    seeds_of: str,
    level: float,
    resamples: int,
    stratified: bool,
) -> list[dict[str, Any]]:
    """The rows of one metric, the best value first."""
    there = [method for method in methods if method.rows(target, metric)]
    drawn = _drawn(there, target, metric, resamples, stratified)
    rows = {}
    for method in there:
        found = method.rows(target, metric)
        n_train = float(np.mean([test.scores.n_train for test in method.tests]))
        share = float(np.mean([row["n"] or 0 for row in found])) / max(1.0, n_train) if seeds_of == "split" else 0.0
        entry = student_t([row["value"] for row in found], level, share)
        row = {
            "dataset": dataset,
            "target": target,
            "metric": metric,
            "method": method.name,
            "is_model": method.row == "model",
            "value": entry["mean"],
            "ci_low": entry["ci_low"],
            "ci_high": entry["ci_high"],
            "ci_method": entry["ci_method"],
            "sd": entry["sd"],
            "n_seeds": len(found),
            "n": found[0].get("n"),
            "n_train": round(n_train),
            "values": [
                {"seed": test.scores.seed, "value": r["value"]} for test, r in zip(method.tests, found, strict=False)
            ],
        }
        if len(found) == 1:
            row |= {name: found[0][name] for name in ("ci_low", "ci_high", "ci_method")}
        elif method.name in drawn:
            tail = (1 - level) / 2
            values = drawn[method.name][np.isfinite(drawn[method.name])]
            low, high = np.quantile(values, [tail, 1 - tail]) if len(values) else (None, None)
            row |= {"ci_low": low, "ci_high": high, "ci_method": "bootstrap_quantiles"}
            row = {name: float(v) if isinstance(v, np.floating) else v for name, v in row.items()}
        rows[method.name] = row
    sign = 1 if metric in SMALLER_IS_BETTER else -1
    ordered = sorted(rows.values(), key=lambda row: sign * row["value"])
    first = ordered[0] if ordered else None
    kinds = []
    for row in ordered:
        row["behind"], row["kind"] = None, ""
        if row is not first:
            row["behind"], row["kind"] = _behind(metric, first, row, drawn, level, seeds_of)
            kinds.append(row["kind"])
        row["best"] = False
    if first is not None:
        first["best"] = bool(kinds) and all(kind == "worse" for kind in kinds)
    return ordered


def _drawn(methods: list[_Method], target: str, metric: str, resamples: int, stratified: bool) -> dict[str, np.ndarray]:
    """Of each method (R,) values of its mean over seeds, all in the same resamples of the test cells; {} where cells differ or are not stored."""
    tests = [test for method in methods for test in method.tests if target in test.scores.truth]
    if metric not in ALL_METRICS or metric in SCORE_METRICS or not tests:
        return {}
    first = tests[0].scores
    if any(test.scores.cells[target] != first.cells[target] for test in tests):
        return {}
    truth, groups = first.truth[target], first.groups.get(target)
    prepared: dict[bytes, Metric] = {}
    of_method: dict[str, list[bytes]] = {}
    for method in methods:
        guesses = method.guesses(target)
        for guess in guesses or ():
            key = np.ascontiguousarray(guess).tobytes()
            prepared.setdefault(key, Metric(metric, truth, guess))
            of_method.setdefault(method.name, []).append(key)
    strata = truth if stratified and groups is None else None
    values = dict(
        zip(prepared, resampled_together(list(prepared.values()), resamples, first.seed, groups, strata), strict=True)
    )
    return {name: np.mean([values[key] for key in keys], axis=0) for name, keys in of_method.items()}


def _behind(
    metric: str, first: dict[str, Any], row: dict[str, Any], drawn: dict[str, np.ndarray], level: float, seeds_of: str
) -> tuple[dict[str, Any], str]:
    """How far a method is behind the best value, with its paired interval, and worse or open: both kinds of luck must be ruled out."""
    value = row["value"] - first["value"]
    found: list[Difference] = []
    over_cells = row["method"] in drawn and first["method"] in drawn
    if over_cells:
        found.append(
            difference_of(metric, row["value"], drawn[row["method"]], first["value"], drawn[first["method"]], level)
        )
    own = {entry["seed"]: entry["value"] for entry in row["values"]}
    best = {entry["seed"]: entry["value"] for entry in first["values"]}
    common = [seed for seed in own if seed in best]
    if len(common) > 1:
        share = 0.0
        if seeds_of == "split" and row["n"]:
            share = row["n"] / max(1, row["n_train"])
        entry = student_t([own[seed] - best[seed] for seed in common], level, share)
        found.append(Difference(metric, value, entry["ci_low"], entry["ci_high"]))
    low, high = (found[0].low, found[0].high) if found else (None, None)
    shown = bool(over_cells or seeds_of == "split") and {difference.kind for difference in found} == {"worse"}
    return {"value": value, "ci_low": low, "ci_high": high}, "worse" if shown else "open"


def _ranks(rows: list[dict[str, Any]], tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean rank over tasks of the methods that all of them have: ranks of a task where one is missing could not be compared."""
    by_task = [{row["method"]: row for row in rows if _is_of(row, task)} for task in tasks]
    common = [name for name in (by_task[0] if by_task else ()) if all(name in found for found in by_task)]
    others = list(dict.fromkeys(name for found in by_task for name in found if name not in common))
    if len(common) < 2:
        return {"rows": [], "tasks": [], "left_out": others}
    ranks: dict[str, list[float]] = {name: [] for name in common}
    for task, found in zip(tasks, by_task, strict=True):
        sign = 1 if task["ranked_by"] in SMALLER_IS_BETTER else -1
        scores = np.array([sign * found[name]["value"] for name in common])
        for name, score in zip(common, scores, strict=True):  # ties share the mean of their places
            ranks[name].append(float((scores < score).sum() + (1 + (scores == score).sum()) / 2))
    entries = [
        {"method": name, "is_model": by_task[0][name]["is_model"], "mean_rank": math.fsum(of) / len(of), "ranks": of}
        for name, of in ranks.items()
    ]
    return {
        "rows": sorted(entries, key=lambda entry: entry["mean_rank"]),
        "tasks": [f"{task['dataset']}, {task['target']}" for task in tasks],
        "left_out": others,
    }


def _notes(rows: list[dict[str, Any]], seeds_of: str, resamples: int) -> list[str]:
    notes = [
        "A method is marked best where its lead over every other one is shown: where the paired interval over test cells leaves out 0, and, "
        "with several seeds, the interval over seeds too. Where none is marked, the order may be luck",
        f"intervals of several seeds are of their mean, over {resamples:,} resamples of the test cells; sd is the spread over seeds; those of "
        "one seed are as its evaluation has them",
    ]
    seeds = max((row["n_seeds"] for row in rows), default=0)
    if seeds == 1:
        notes.append("one seed: what another one would have given is not known")
    elif seeds_of == "finetuning":
        notes.append(
            "a seed changes fine-tuning alone; all start from one pretrained model and are tested on the same cells"
        )
    elif seeds_of == "training":
        notes.append("a seed changes pretraining and fine-tuning; all are tested on the same cells")
    else:
        notes.append(
            "a seed changes the split too, so that intervals are over seeds and allow for splits that share cells (Nadeau and Bengio 2003)"
        )
    return notes
