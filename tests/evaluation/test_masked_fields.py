"""Masked positions: stored as they are predicted, scored from the file as while training, intervals over cells, gene by gene."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from sklearn import metrics as reference

from bmfm_pipeline.evaluation import field_predictions, recording
from bmfm_pipeline.evaluation.field_predictions import FieldWriter, read_field_predictions, write_baselines
from bmfm_pipeline.evaluation.gene_errors import gene_errors, sentence, summary, write_gene_errors
from bmfm_pipeline.evaluation.masked_fields import evaluate_fields
from bmfm_pipeline.evaluation.recording import (
    FieldRecorder,
    GenePlaces,
    baselines,
    mean_by_gene,
    shares_to_store,
    uniform,
)
from bmfm_pipeline.evaluation.resampling import Draws
from bmfm_pipeline.evaluation.rows import Evaluation, Settings
from bmfm_pipeline.objectives import RunningMetrics, build_objectives, fit_constants

CELLS, LENGTH, TOKENS = 30, 12, 9
GENES = ["[PAD]", "[UNK]", *(f"G{number}" for number in range(2, 40))]
VALUES = np.array([np.nan, np.nan, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
INPUTS = ["genes", "expressions", "levels"]
LOSSES = [
    {
        "field_name": "genes",
        "name": "cross_entropy",
        "metrics": ["accuracy", "perplexity", "f1", "recall", "precision", "mcc"],
    },
    {"field_name": "expressions", "name": "cross_entropy", "metrics": ["accuracy", "perplexity", "f1", "mcc"]},
    {"field_name": "levels", "name": "mse", "metrics": ["mse", "mae", "pcc", "nonzero_confusion_matrix"]},
    {"field_name": "levels", "name": "is_zero_bce"},
]
FIELDS = [
    {"field_name": "genes"},
    {"field_name": "expressions"},
    {"field_name": "levels", "tokenization_strategy": "continuous_value_encoder"},
]
# What RunningMetrics calls a score, and how it is stored.
KINDS = {"genes": "token", "expressions": "token", "levels": "number"}


def objectives():
    return build_objectives(LOSSES, FIELDS, [], {"expressions": VALUES})


def batches(size=7, seed=0, cells=CELLS):
    """Input ids, labels at about a third of the positions, cells of unequal length."""
    generator = np.random.default_rng(seed)
    genes = generator.integers(2, 40, (cells, LENGTH)).astype(float)
    tokens = generator.integers(2, TOKENS, (cells, LENGTH)).astype(float)
    levels = generator.poisson(1.5, (cells, LENGTH)) * 0.75
    hidden = (generator.random((cells, LENGTH)) < 0.35) & (
        np.arange(LENGTH) < generator.integers(6, 13, cells)[:, None]
    )
    labels = {name: np.where(hidden, own, -100) for name, own in zip(INPUTS, (genes, tokens, levels), strict=True)}
    shown = np.stack([np.where(hidden, 4, genes), np.where(hidden, 1, tokens), np.where(hidden, -5, levels)], axis=1)
    for start in range(0, cells, size):
        part = slice(start, start + size)
        kept = {name: torch.tensor(own[part]).float() for name, own in labels.items()}
        yield {
            "input_ids": torch.tensor(shown[part]).float(),
            "attention_mask": torch.ones(len(shown[part]), LENGTH, dtype=torch.long),
            "cell_name": [f"cell {row}" for row in range(start, min(start + size, cells))],
            "cell_index": torch.arange(start, min(start + size, cells)),
            "labels": kept | {name: kept[name].long() for name in ("genes", "expressions")},
        }


def answers(batch, positions, seed=3):
    """Scores at the positions, a function of the cell and the place alone."""
    row = (batch["cell_index"][:, None] * LENGTH + torch.arange(LENGTH)).reshape(-1)

    def scores(name, width):
        table = torch.randn(CELLS * LENGTH, width, generator=torch.Generator().manual_seed(seed + width))
        return table[row[positions[name]]]

    said = {"genes_token_scores": scores("genes", 40), "expressions_token_scores": scores("expressions", TOKENS)}
    truth = batch["labels"]["expressions"].reshape(-1)[positions["expressions"]]
    said["expressions_token_scores"] += 1.5 * torch.nn.functional.one_hot(truth, TOKENS)
    levels = batch["labels"]["levels"].reshape(-1)[positions["levels"]]
    return said | {
        "levels_regression": scores("levels", 1) + levels[:, None],
        "levels_is_zero": scores("levels", 2)[:, :1],
    }


def stored(folder, size=7, shares=None, running=None):
    """Record all batches, and read what was stored."""
    tasks, constants = objectives(), fit_constants(objectives(), [batch["labels"] for batch in batches(seed=5)])
    places = GenePlaces(INPUTS)
    means = mean_by_gene(tasks, batches(seed=5), places, GENES, {"expressions": VALUES})
    write_baselines(folder, baselines(tasks, constants, shares or {}, means, {"expressions": VALUES}))
    with FieldWriter(folder, GENES) as writer:
        recorder = FieldRecorder(tasks, writer, places, shares, seed=1)
        for batch in batches(size):
            positions = tasks.positions(batch["labels"])
            logits = answers(batch, positions)
            recorder.add(batch, positions, logits)
            if running is not None:
                running.update(logits, batch["labels"], positions)
    return {rows.name: rows for rows in read_field_predictions(folder)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("whole"))


def scored(fields, **settings):
    result = Evaluation()
    cells = [f"cell {row}" for row in range(CELLS)]
    evaluate_fields(result, list(fields.values()), cells, Settings(**{"resamples": 50, **settings}))
    return result


def test_scores_of_the_file_are_those_of_the_pass_itself(tmp_path):
    constants = fit_constants(objectives(), [batch["labels"] for batch in batches(seed=5)])
    running = RunningMetrics(objectives(), constants)
    fields = stored(tmp_path, running=running)
    found = {(row["target"], row["model"], row["metric"]): row["value"] for row in scored(fields).rows}
    checked = 0
    for name, value in running.compute().items():
        target, _, rest = name.partition("_")
        model, metric = (
            ("constant", rest.removeprefix("constant_")) if rest.startswith("constant_") else ("model", rest)
        )
        if (model, metric) == ("constant", "pcc"):
            assert found[target, model, metric] is None
            continue
        assert found[target, model, metric] == pytest.approx(value, rel=1e-5), name
        checked += 1
    assert checked > 20


NUMBERS = {"tokenization_strategy": "continuous_value_encoder", "field_name": "levels"}
WHOLE = NUMBERS | {"decode_modes": {"wced": {"vocab_field": "genes", "logit_outputs": ["mse", "is_zero_bce"]}}}
BOTH = {"field_name": "levels", "decode_modes": {"token_scores": {}, "regression": {}}}
ERRORS = {"field_name": "levels", "name": "mse", "metrics": ["mse", "mae", "pcc"]}


@pytest.mark.parametrize(
    "field, losses",
    [
        (NUMBERS, [{"field_name": "levels", "name": "is_zero_bce"}]),
        (NUMBERS, [ERRORS | {"ignore_zero": True, "link_function": "exp"}]),
        (BOTH, [ERRORS, {"field_name": "levels", "name": "cross_entropy", "metrics": ["accuracy", "mcc"]}]),
        (
            WHOLE,
            [
                ERRORS | {"wced_target": "all_genes"},
                {"field_name": "levels", "name": "is_zero_bce", "wced_target": "all_genes"},
            ],
        ),
    ],
    ids=["lone zeros", "without zeros", "tokens as numbers", "whole cells"],
)
def test_every_way_of_predicting_a_field_is_stored_and_scored(field, losses, tmp_path):
    tasks = build_objectives(losses, [field], [], {"levels": VALUES} if field is BOTH else {})
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(2, 9, (6, 10), generator=generator) if field is BOTH else torch.randint(0, 3, (6, 10)) * 1.5
    targets[torch.rand(6, 10, generator=generator) < 0.5] = -100
    labels = {"levels": {"all": targets} if field is WHOLE else targets}
    positions = tasks.positions(labels)
    count = 60 if field is WHOLE else len(positions["levels"])
    heads = {"levels_regression": 1, "levels_is_zero": 1, "levels_token_scores": 9}
    logits = {name: torch.randn(count, width, generator=generator) for name, width in heads.items()}
    if field is WHOLE:
        logits = {"levels_wced": torch.randn(6, 1, 10, 2, generator=generator)}
    running = RunningMetrics(tasks, fit_constants(tasks, [labels]))
    running.update(logits, labels, positions)
    batch = {
        "input_ids": torch.arange(60).reshape(6, 1, 10) % 38 + 2,
        "cell_name": list("abcdef"),
        "cell_index": torch.arange(6),
        "labels": labels,
    }
    write_baselines(tmp_path, baselines(tasks, running.constants, {}, {}, {}))
    with FieldWriter(tmp_path, GENES) as writer:
        FieldRecorder(tasks, writer, GenePlaces(["genes"])).add(batch, positions, logits)
    fields = read_field_predictions(tmp_path)
    result = Evaluation()
    evaluate_fields(result, fields, list("abcdef"), Settings(resamples=20))
    found = {(row["model"], row["metric"]): row["value"] for row in result.rows}
    key = fields[0].name
    for name, value in running.compute().items():
        model, _, metric = name.removeprefix(f"{key}_").rpartition("constant_")
        model = "constant" if model or name.startswith(f"{key}_constant") else "model"
        if (model, metric) == ("constant", "pcc") or (metric == "zero_accuracy" and ("model", metric) not in found):
            continue
        assert found[model, metric] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    if field is WHOLE:
        (rows,) = fields
        assert rows.name == "levels_all_genes" and set(rows.genes) <= set(GENES[:10])


def test_the_file_says_cell_field_gene_label_and_prediction(whole, tmp_path):
    stored(tmp_path)
    table = pq.read_table(tmp_path / "field_predictions.parquet").to_pandas()
    first = next(batches())
    own = table[(table.cell == "cell 3") & (table.field == "expressions")]
    hidden = first["labels"]["expressions"][3] != -100
    assert own.label.tolist() == first["labels"]["expressions"][3][hidden].tolist()
    # Genes are masked too, so what stands in the input is not the gene.
    assert own.gene.tolist() == [GENES[token] for token in first["labels"]["genes"][3][hidden]]
    assert set(table.kind[table.field == "levels"]) == {"number"}
    levels = whole["levels"]
    assert (levels.prediction[levels.zero_probability > 0.5] == 0).all() and np.isnan(levels.log_probability).all()
    assert np.isnan(whole["genes"].zero_probability).all() and (whole["genes"].log_probability < 0).all()


@pytest.mark.parametrize("size", [1, 30])
def test_neither_batches_nor_row_groups_matter(whole, size, tmp_path, monkeypatch):
    monkeypatch.setattr(field_predictions, "ROWS_AT_ONCE", 20)
    monkeypatch.setattr(recording, "SCORES_AT_ONCE", 100)
    again = stored(tmp_path, size)
    assert pq.ParquetFile(tmp_path / "field_predictions.parquet").num_row_groups > 5 or size == 30
    for name, rows in whole.items():
        assert again[name].cells == rows.cells
        ours, theirs = (np.array(one.genes)[one.gene].tolist() for one in (again[name], rows))
        assert ours == theirs
        for part in ("cell", "label", "prediction"):
            assert getattr(again[name], part).tolist() == getattr(rows, part).tolist()
        assert again[name].log_probability == pytest.approx(rows.log_probability, nan_ok=True)


def test_intervals_are_those_of_resampled_cells(whole):
    found = {(row["target"], row["model"], row["metric"]): row for row in scored(whole, seed=4).rows}
    for name, metric in (
        ("expressions", "f1"),
        ("levels", "pcc"),
        ("levels", "r2"),
        ("levels", "zero_f1"),
        ("genes", "mcc"),
    ):
        rows = whole[name]
        at = [np.flatnonzero(rows.cell == cell) for cell in range(len(rows.cells))]
        (weights,) = Draws(len(at), 4).blocks(50)
        values = []
        for drawn in weights.astype(int):
            chosen = np.concatenate([at[cell] for cell in np.repeat(np.arange(len(at)), drawn)])
            label, said = rows.label[chosen], rows.prediction[chosen]
            values.append(
                {
                    "f1": lambda t, p: reference.f1_score(t, p, average="macro", zero_division=0),
                    "pcc": lambda t, p: np.corrcoef(t, p)[0, 1],
                    "r2": reference.r2_score,
                    "zero_f1": lambda t, p: reference.f1_score(t == 0, p == 0),
                    "mcc": reference.matthews_corrcoef,
                }[metric](label, said)
            )
        row = found[name, "model", metric]
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(np.quantile(values, [0.025, 0.975])), (name, metric)
        assert row["n"] == len(rows) and f"masked positions of {len(rows.cells)} cells" in row["note"]


def test_cells_of_a_group_go_together_and_a_proportion_of_positions_is_none(whole):
    plain, grouped = scored(whole), scored(whole, groups=np.arange(CELLS) // 10, method="wilson")
    (one,) = [
        row for row in grouped.rows if (row["target"], row["metric"], row["model"]) == ("genes", "accuracy", "model")
    ]
    assert one["ci_method"] == "bootstrap_quantiles"
    assert "wilson does not fit several positions of a cell: bootstrap_quantiles is used" in one["note"]
    assert "groups of cells are resampled together" in grouped.verdicts[0]
    assert "cells are resampled whole" in plain.verdicts[0]
    alone = scored(whole, groups=np.zeros(CELLS), method="bca")
    assert {(row["ci_low"], row["ci_high"]) for row in alone.rows} == {(None, None)}
    assert all("no interval of the difference" in text for text in alone.verdicts)


def test_the_verdict_is_against_the_constant_guess(whole):
    said = scored(whole).verdicts
    assert said[1].startswith("expressions: the model is better than the constant guess by ")
    assert "points of accuracy, 95 % interval" in said[1] and "perplexity" in said[1]
    assert "mean squared error" in said[2] and "mean absolute error" in said[2]


def test_a_share_of_the_positions_is_chosen_cell_by_cell_and_said(whole, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shares = {"genes": 0.5}
    some, again = stored(tmp_path / "a", 7, shares), stored(tmp_path / "b", 30, shares)
    assert some["genes"].label.tolist() == again["genes"].label.tolist()
    assert 0.3 < len(some["genes"]) / len(whole["genes"]) < 0.7
    assert len(some["levels"]) == len(whole["levels"])
    assert any("genes: 50 % of the predicted positions" in note for note in scored(some).notes)


def test_what_is_drawn_for_a_position_is_even_and_its_own():
    keys, places = np.repeat(np.arange(200), 100), np.tile(np.arange(100), 200)
    drawn = uniform(7, 1, keys, places)
    assert abs(drawn.mean() - 0.5) < 0.01 and len(np.unique(drawn)) == len(drawn)
    assert abs(np.corrcoef(drawn, uniform(8, 1, keys, places))[0, 1]) < 0.03
    assert drawn[5] == uniform(7, 1, keys[5:6], places[5:6])[0]


def test_small_fields_keep_all_positions_and_the_rest_share_what_is_left():
    tasks = objectives()
    assert shares_to_store(tasks, batches(), CELLS, 3 * CELLS * LENGTH) == {}
    hidden = sum(int((batch["labels"]["genes"] != -100).sum()) for batch in batches())
    shares = shares_to_store(tasks, batches(), CELLS, hidden)
    assert {name: round(share, 2) for name, share in shares.items()} == {
        "genes": 0.33,
        "expressions": 0.33,
        "levels": 0.33,
    }


def test_errors_by_gene_beside_the_mean_of_the_gene_in_training(whole, tmp_path):
    shown = pd.concat(
        pd.DataFrame(
            {
                "gene": GenePlaces(INPUTS).at(batch).ravel(),
                "value": torch.where(
                    batch["labels"]["levels"] == -100, batch["input_ids"][:, 2], batch["labels"]["levels"]
                ).ravel(),
            }
        )
        for batch in batches(seed=5)
    )
    means = shown[shown.value >= 0].groupby("gene").value.mean()
    rows = whole["levels"]
    table = gene_errors(rows)
    frame = pd.DataFrame(
        {"gene": np.array(rows.genes)[rows.gene], "label": rows.label, "error": np.abs(rows.prediction - rows.label)}
    )
    assert sum(entry["n"] for entry in table) == len(frame)
    for entry in table:
        own = frame[frame.gene == entry["gene"]]
        mean = means[GENES.index(entry["gene"])]
        assert entry["training_mean"] == pytest.approx(mean, rel=1e-6)
        assert entry["mae"] == pytest.approx(own.error.mean())
        assert entry["null_mae"] == pytest.approx((own.label - mean).abs().mean(), rel=1e-6)
        nonzero = own[own.label != 0]
        assert entry["n_nonzero"] == len(nonzero)
        if len(nonzero):
            assert entry["mae_nonzero"] == pytest.approx(nonzero.error.mean())
        assert entry["sd_label"] == pytest.approx(own.label.std(ddof=0), abs=1e-9)
    write_gene_errors(tmp_path / "gene_errors.csv", table)
    assert pd.read_csv(tmp_path / "gene_errors.csv").n.is_monotonic_decreasing


def test_tokens_that_stand_for_numbers_have_errors_and_other_tokens_have_none(whole):
    rows = whole["expressions"]
    (first, *_) = gene_errors(rows)
    own = np.array(rows.genes)[rows.gene] == first["gene"]
    label, said = (VALUES[tokens[own].astype(int)] for tokens in (rows.label, rows.prediction))
    there = np.isfinite(said)
    assert first["mae"] == pytest.approx(np.abs(label - said)[there].mean())
    assert gene_errors(whole["genes"]) == []


def test_the_summary_counts_genes_worse_than_their_mean_and_lists_the_best_and_worst(whole):
    table = [
        {"gene": f"g{n}", "n": 100 - n, "n_nonzero": 50, "mae": n / 10, "null_mae": 2.05, "mae_nonzero": 1.0}
        | {"null_mae_nonzero": 0.5, "mean_label": 1.0}
        for n in range(40)
    ] + [
        {
            "gene": "rare",
            "n": 3,
            "n_nonzero": 1,
            "mae": 9.0,
            "null_mae": 1.0,
            "mae_nonzero": 1.0,
            "null_mae_nonzero": 2.0,
        }
    ]
    found = summary(whole["levels"], table)
    assert (found["genes"], found["compared"], found["worse_than_null"]) == (41, 40, 19 / 40)
    assert found["worse_than_null_nonzero"] == 1.0
    assert found["best"][0]["gene"] == "g0" and found["worst"][0]["gene"] == "g39" and len(found["best"]) == 20
    zero = whole["levels"].label == 0
    assert found["zero_auroc"] == pytest.approx(reference.roc_auc_score(zero, whole["levels"].zero_probability))
    assert sentence("levels", found).startswith("levels: of 40 genes with at least 10 predicted positions, 48 % are")
    json.dumps(found, allow_nan=False)


def test_a_field_without_any_position_leaves_a_file_and_no_row(tmp_path):
    with FieldWriter(tmp_path, GENES):
        pass
    write_baselines(tmp_path, baselines(objectives(), {}, {}, {}, {}))
    assert read_field_predictions(tmp_path) == []
    assert read_field_predictions(tmp_path / "nowhere") == []
