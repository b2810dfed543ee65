"""Scores of predicted perturbations: what is averaged and filled, what is not defined, baselines, intervals over perturbations."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.perturbation import (
    GroupMeans,
    additive_profiles,
    evaluate_perturbations,
    group_predictions,
    perturbation_scores,
    target_genes,
)
from bmfm_pipeline.evaluation.rows import Evaluation, Settings
from bmfm_pipeline.evaluation.tables import text_table

GENES = [f"G{number}" for number in range(30)]


def measured(names=("A+B", "C", "G1", "D+E", "G2_G3"), seed=0) -> GroupMeans:
    generator = np.random.default_rng(seed)
    control = generator.gamma(2, size=30)
    profiles = control + generator.normal(scale=0.5, size=(len(names), 30))
    return GroupMeans(GENES, list(names), profiles, control, control + 0.1 * generator.normal(size=30))


def near_truth(means, noise=0.2, seed=1):
    return means.profiles + noise * np.random.default_rng(seed).normal(size=means.profiles.shape)


def test_scores_equal_scipy_and_a_plain_loop():
    means = measured()
    predicted, genes = near_truth(means), {name: GENES[3:28] for name in means.perturbations}
    found = perturbation_scores(predicted, means, genes)
    for row, truth in enumerate(means.profiles):
        own, control = predicted[row], means.control
        assert found["agg_pcc"][row] == pytest.approx(stats.pearsonr(own, truth).statistic)
        assert found["delta_agg_pcc"][row] == pytest.approx(stats.pearsonr(own - control, truth - control).statistic)
        centred = stats.pearsonr(own - means.train_mean, truth - means.train_mean).statistic
        assert found["train_delta_agg_pcc"][row] == pytest.approx(centred)
        assert found["agg_mse"][row] == pytest.approx(((own - truth) ** 2).mean())
        first = slice(3, 23)  # the first 20 of the list
        top = stats.pearsonr((own - control)[first], (truth - control)[first]).statistic
        assert found["top20_de_delta_agg_pcc"][row] == pytest.approx(top)
        assert found["top20_de_agg_mae"][row] == pytest.approx(np.abs(own - truth)[first].mean())
        kept = [place for place, gene in enumerate(GENES) if gene not in target_genes(means.perturbations[row])]
        distance = np.abs(means.profiles - own)[:, kept].sum(axis=1)
        closer = sum(other < distance[row] for other in np.delete(distance, row))
        assert found["discrimination_score"][row] == 1 - closer / len(means.perturbations)


def test_constants_have_no_correlation_instead_of_a_wrong_one():
    means = measured()
    found = perturbation_scores(np.tile(means.control, (5, 1)), means)
    assert np.isnan(found["delta_agg_pcc"]).all() and np.isfinite(found["agg_pcc"]).all()
    lists = {"C": ["G4"], "G1": ["other", "G5", "G6"]}
    found = perturbation_scores(near_truth(means), means, lists)
    assert np.flatnonzero(np.isfinite(found["top20_de_agg_mae"])).tolist() == [2]


def test_predictions_are_averaged_and_missing_genes_filled_and_counted():
    means = measured(("C", "G1"))
    found = group_predictions(
        ["C", "C", "C", "unseen", "C"],
        ["G0", "G0", "G2", "G0", "nowhere"],
        [1.0, 3.0, 5.0, 9.0, 9.0],
        means,
        fill="control",
    )
    assert (found.perturbations, found.unknown, found.unknown_genes) == (["C"], ["unseen"], ["nowhere"])
    assert found.predicted[0, [0, 2]].tolist() == [2.0, 5.0] and found.filled.tolist() == [28]
    assert found.predicted[0, 1] == means.control[1]
    with pytest.raises(DataError, match="1 of 2 predictions are no numbers"):
        group_predictions(["C", "C"], ["G0", "G1"], [1.0, np.nan], means)


def test_additive_needs_both_singles():
    control = np.array([1.0, 2.0])
    singles = {"A": np.array([2.0, 2.0]), "B": np.array([1.0, 5.0]), "D": control}
    found = additive_profiles(["A+B", "C", "D_E", "A"], control, singles)
    assert found[0].tolist() == [2.0, 5.0] and np.isnan(found[1:]).all()


def test_rows_baselines_and_verdicts():
    means, settings = measured(), Settings(resamples=200, method="binomial", split_hash="abc")
    singles = {name: means.control + 0.1 for name in "ABDE"}
    result, lists = Evaluation(), {name: GENES[:20] for name in means.perturbations}
    entries = evaluate_perturbations(result, near_truth(means), means, settings, singles=singles, de_genes=lists)
    by = {(row["model"], row["metric"]): row for row in result.rows}
    assert {name for name, _ in by} == {"model", "control_mean", "train_mean", "additive"}
    one = by["model", "delta_agg_pcc"]
    values = [entry["delta_agg_pcc"] for entry in entries if entry["model"] == "model"]
    assert one["value"] == pytest.approx(np.mean(values)) and one["n"] == 5
    drawn = [np.mean(np.random.default_rng(number).choice(values, 5)) for number in range(2000)]
    assert (one["ci_low"], one["ci_high"]) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    assert one["note"].startswith("mean over perturbations, which are resampled; binomial does not fit this metric")
    assert ("control_mean", "delta_agg_pcc") not in by
    assert by["additive", "agg_mae"]["n"] == 2
    assert "not defined for 3" in by["additive", "agg_mae"]["note"]
    assert by["model", "top20_de_agg_pcc"]["n"] == 5
    assert "perturbation: the model is better than the mean of the control cells by " in result.verdicts[0]
    assert "the mean of the training perturbations" in result.verdicts[1]
    assert any("additive is defined for 2 of 5" in note for note in result.notes)
    assert text_table(result.rows).splitlines()[1].split() == ["agg_pcc", "delta_agg_pcc", "perturbations"]


def test_without_lists_of_genes_there_are_no_scores_over_them_and_it_is_said():
    means, result = measured(), Evaluation()
    for lists in (None, {}, {"C": []}):
        evaluate_perturbations(result, near_truth(means), means, Settings(resamples=10), de_genes=lists)
    assert not any("top20" in row["metric"] for row in result.rows)
    assert sum("no list of differentially expressed genes was usable" in note for note in result.notes) == 3
    nothing = means.of([])
    assert evaluate_perturbations(result, np.zeros((0, 30)), nothing, Settings()) == []


def test_tables_without_control_or_with_holes_are_refused():
    with pytest.raises(DataError, match="no column Average_Perturbation_Train; columns: Control, A"):
        GroupMeans.from_table(pd.DataFrame({"Control": [1.0], "A": [2.0]}, index=["G"]))
    with pytest.raises(DataError, match=r"profiles must hold a number for each of the 1 genes; .* 1 that are none"):
        GroupMeans.from_table(
            pd.DataFrame({"Control": [1.0], "Average_Perturbation_Train": [1.0], "A": [np.nan]}, index=["G"])
        )
