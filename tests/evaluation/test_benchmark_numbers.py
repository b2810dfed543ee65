"""The table of a benchmark: means, paired intervals, who is called best, ranks, and what failed."""

import csv
import io

import numpy as np
import pytest

from bmfm_pipeline.evaluation.benchmark import CellScores, benchmark_of
from bmfm_pipeline.evaluation.benchmark_words import benchmark_text, grouped
from bmfm_pipeline.evaluation.pages.benchmark_page import benchmark_csv, benchmark_html, benchmark_markdown
from bmfm_pipeline.evaluation.study import PointScores

N, CLASSES = 400, 4


def cell_of(dataset, model, seed, right, *, names=None, controls=None, data="d", cells_of=0):
    """A test whose model is right on the share `right` of the cells; `controls` {name: share}. Seeds differ in which."""
    generator = np.random.default_rng(cells_of)
    truth = generator.integers(0, CLASSES, N)
    rows, guesses = [], {}
    for name, share in {"model": right, **(controls or {})}.items():
        luck = np.random.default_rng(
            [seed if name == "model" else 0, sum(map(ord, model + name)) if name == "model" else len(name)]
        )
        guess = np.where(luck.random(N) < share, truth, (truth + 1) % CLASSES)
        guesses[name] = guess
        value = float((guess == truth).mean())
        for metric in ("accuracy", "f1"):
            rows.append({"target": "celltype", "metric": metric, "model": name, "value": value, "n": N,
                         "ci_low": value - 0.05, "ci_high": value + 0.05, "ci_method": "wilson"})  # fmt: skip
    cells = [f"{cells_of}-{number}" for number in range(N)]
    scores = PointScores(f"{dataset} {seed}", 1.0, seed, 1600, rows, {"celltype": truth}, {"celltype": guesses},
                         {"celltype": cells}, {"celltype": None})  # fmt: skip
    return CellScores(dataset, model, scores, data)


def row_of(found, method, metric="f1", dataset="one"):
    return next(r for r in found["rows"] if (r["dataset"], r["method"], r["metric"]) == (dataset, method, metric))


def test_the_best_method_is_marked_where_it_is_ahead_of_every_other_one():
    controls = {"logistic_l2": 0.8, "majority": 0.3}
    found = benchmark_of([cell_of("one", "model", 1, 0.95, controls=controls)])
    names = [row["method"] for row in found["rows"] if row["metric"] == "f1"]
    assert names == ["model", "logistic regression (L2)", "commonest class"]
    assert [row["best"] for row in found["rows"] if row["metric"] == "f1"] == [True, False, False]
    behind = row_of(found, "logistic regression (L2)")["behind"]
    assert behind["ci_low"] < behind["value"] < behind["ci_high"] < 0
    assert "model is best in macro-F1, ahead of every other method" in found["sentences"][0]


def test_a_lead_that_may_be_luck_is_not_called_best():
    found = benchmark_of([cell_of("one", "model", 1, 0.85, controls={"logistic_l2": 0.84, "majority": 0.3})])
    assert not any(row["best"] for row in found["rows"])
    assert "no method is shown to be best in macro-F1" in found["sentences"][0]
    assert "its lead over" in found["sentences"][0] and "may be luck" in found["sentences"][0]
    assert row_of(found, "commonest class")["kind"] == "worse"


def test_seeds_are_averaged_and_their_spread_stands_beside_the_interval_over_cells():
    tests = [cell_of("one", "model", seed, 0.9, controls={"logistic_l2": 0.6}) for seed in (1, 2, 3, 4)]
    found = benchmark_of(tests)
    row, control = row_of(found, "model", "accuracy"), row_of(found, "logistic regression (L2)", "accuracy")
    values = [entry["value"] for entry in row["values"]]
    assert row["value"] == pytest.approx(np.mean(values)) and row["sd"] == pytest.approx(np.std(values, ddof=1))
    assert row["n_seeds"] == 4 and row["ci_method"] == "bootstrap_quantiles"
    assert row["ci_low"] < row["value"] < row["ci_high"] and row["ci_high"] - row["ci_low"] < 0.06
    assert control["sd"] == 0 and row_of(found, "model")["best"]


def test_two_seeds_that_disagree_name_no_best_one():
    tests = [
        cell_of("one", "model", seed, right, controls={"logistic_l2": 0.6}) for seed, right in ((1, 0.95), (2, 0.62))
    ]
    found = benchmark_of(tests)
    assert row_of(found, "logistic regression (L2)")["behind"]["ci_high"] < 0, (
        "of these two the interval over cells is sure"
    )
    assert not row_of(found, "model")["best"], "the seeds are not"


def test_two_models_share_the_controls_of_the_data_and_keep_those_of_their_own():
    controls = {"logistic_l2": 0.8, "knn": 0.7}
    tests = [cell_of("one", name, 1, right, controls=controls) for name, right in (("small", 0.85), ("large", 0.9))]
    methods = {row["method"] for row in benchmark_of(tests)["rows"]}
    assert methods == {
        "small", "large", "logistic regression (L2)",
        "nearest neighbours (embeddings) (small)", "nearest neighbours (embeddings) (large)",
    }  # fmt: skip


def test_cells_that_differ_are_not_compared_pair_by_pair():
    tests = [cell_of("one", "a", 1, 0.95), cell_of("one", "b", 1, 0.5, cells_of=7)]
    found = benchmark_of(tests)
    assert row_of(found, "b")["behind"]["ci_low"] is None and not row_of(found, "a")["best"]
    assert row_of(found, "a")["ci_method"] == "wilson"


def test_mean_ranks_are_those_of_methods_that_every_task_has():
    one = cell_of("one", "model", 1, 0.9, controls={"logistic_l2": 0.8, "majority": 0.3})
    two = cell_of("two", "model", 1, 0.6, controls={"logistic_l2": 0.8, "majority": 0.3, "celltypist": 0.7})
    ranks = benchmark_of([one, two])["ranks"]
    assert [(row["method"], row["mean_rank"]) for row in ranks["rows"]] == [
        ("model", 1.5), ("logistic regression (L2)", 1.5), ("commonest class", 3.0),
    ]  # fmt: skip
    assert ranks["left_out"] == ["CellTypist"]


def test_smaller_errors_lead():
    test = cell_of("one", "model", 1, 0.9, controls={"ridge": 0.5})
    truth = np.arange(N, dtype=float)
    noise = np.random.default_rng(0).normal(size=N)
    test.scores.truth["age"], test.scores.cells["age"] = truth, test.scores.cells["celltype"]
    test.scores.guesses["age"] = {"model": truth + 2 * noise, "ridge": truth + noise}
    for name, value in (("model", 4.0), ("ridge", 1.0)):
        test.scores.rows.append({"target": "age", "metric": "mse", "model": name, "value": value, "n": N,
                                 "ci_low": value - 0.1, "ci_high": value + 0.1, "ci_method": "bootstrap"})  # fmt: skip
    found = benchmark_of([test])
    first, second = [row for row in found["rows"] if row["target"] == "age"]
    assert (first["method"], first["best"]) == ("ridge regression", True)
    assert second["behind"]["value"] == 3.0 and second["behind"]["ci_low"] > 0


def test_the_files_hold_every_row_and_every_failure_and_nothing_of_a_name_is_markup():
    failed = [{"name": "two, model, seed 1", "reason": "no <file> | there\nset BMFM_X"}]
    found = benchmark_of([cell_of("<one>", "model", 1, 0.9, controls={"majority": 0.3})], failed=failed)
    found |= {"suite": "mine", "title": "", "about": {"suite": "mine"}}
    lines = list(csv.DictReader(io.StringIO(benchmark_csv(found))))
    assert len(lines) == len(found["rows"]) + 1
    assert [line["state"] for line in lines] == ["done"] * len(found["rows"]) + ["failed"]
    assert lines[0]["best"] == "yes" and lines[-1]["reason"] == "no <file> | there set BMFM_X"
    page, markdown, text = benchmark_html(found), benchmark_markdown(found), benchmark_text(found)
    assert "&lt;one&gt;" in page and "<one>" not in page and "no &lt;file&gt;" in page
    assert "**model**" in markdown and "\\<one\\>" in markdown and "two, model, seed 1" in markdown
    assert "failed: two, model, seed 1" in text and "best" in text
    assert "1 cell is missing because they failed" in " ".join(found["sentences"])


def test_seeds_that_failed_alike_are_told_once():
    failed = [{"name": f"one, model, seed {seed}", "reason": reason} for seed, reason in ((1, "x"), (2, "x"), (3, "y"))]
    assert grouped(failed) == [
        {"name": "one, model, 2 seeds", "reason": "x"},
        {"name": "one, model, seed 3", "reason": "y"},
    ]
