"""A small screen through the whole chain: preprocessing, training, evaluation beside its baselines, and perturbations in silico."""

import csv
import json

import anndata
import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline.commands.whole_chain import split_run_arguments
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages import plan_pipeline
from bmfm_pipeline.stages import train as train_stage
from bmfm_pipeline.stages.in_silico import perturb_file
from bmfm_pipeline.stages.running import run_stage
from bmfm_pipeline.training import child
from bmfm_pipeline.training.launch import _result
from bmfm_pipeline.training.stopping import StopRequest

GENES, TARGETS = 24, ["G0", "G1", "T2", "T3", "T4", "T5"]  # of these, T2 to T5 are not measured
SMALL = [
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=1", "model.intermediate_size=16", "model.hidden_dropout_prob=0.0",
    "data_module.max_length=32", "data_module.batch_size=32", "task.max_steps=150", "task.max_epochs=40", "trainer.learning_rate=0.003",
    "trainer.warmup_steps=1", "data_module.transform_kwargs.split.perturbations=combo_seen2",
]  # fmt: skip


def screen(path, cells=20):
    """Singles and all pairs of the first five targets; effects are large and add up."""
    generator = np.random.default_rng(0)
    effects = dict(zip(TARGETS, generator.choice([0.2, 1, 1, 6], size=(len(TARGETS), GENES)), strict=True))
    names = ["control", *(f"{gene}+ctrl" for gene in TARGETS)]
    names += [f"{a}+{b}" for number, a in enumerate(TARGETS[:5]) for b in TARGETS[number + 1 : 5]]
    condition = np.repeat(names, cells)
    rates = np.full((len(condition), GENES), 8.0)
    for row, name in enumerate(condition):
        for gene in name.split("+"):
            rates[row] *= effects.get(gene, 1.0)
    counts = generator.poisson(rates).astype(np.float32)
    obs = pd.DataFrame(
        {"condition": condition, "plate": np.arange(len(condition)) % 2},
        index=[f"c{row}" for row in range(len(condition))],
    )
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{g}" for g in range(GENES)])).write_h5ad(path)
    return path


def train_here(spec, on_progress=None, **_):
    """The training of a child process, in this one."""
    from pathlib import Path

    summary = child.train(spec, StopRequest())
    return _result(0, {"kind": "done", "summary": summary}, None, Path(spec.run_dir))


def plan(file, workspace, *words, column="condition"):
    own, overrides = split_run_arguments(["task=perturbation", f"perturbation_column_name={column}", *words])
    return plan_pipeline(str(file), overrides=overrides, workspace=str(workspace), **own)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage, "train_in_child", train_here)
        jobs = plan(screen(folder / "screen.h5ad"), folder / "workspace", *SMALL)
        results = {job.stage: run_stage(job) for job in jobs}
    assert list(results) == ["preprocess", "finetune", "evaluate"]
    return folder, {job.stage: job.artefact().local() for job in jobs}


def scores(folder):
    rows = json.loads((folder / "metrics.json").read_text())
    return {(row["model"], row["metric"]): row for row in rows if row["target"] == "perturbation"}


def test_the_artefact_tells_what_was_perturbed_and_keeps_cells_whose_target_was_not_measured(chain):
    folder = chain[1]["preprocess"]
    record = json.loads((folder / "perturbation.json").read_text())
    assert record["dialect"] == "gears" and record["controls"] == {"control": 20}
    assert (record["singles"], record["combinations"], record["perturbed_cells"]) == (6, 10, 320)
    assert record["unmeasured"] == ["T2", "T3", "T4", "T5"]
    touched = [name for name in record["perturbations"] if "T" in name]
    assert record["share_with_unmeasured_target"] == pytest.approx(len(touched) / 16, abs=1e-4)
    tokens = json.loads((folder / "tokenizers" / "genes" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"T2", "T5", "G0"} <= set(tokens), "each target has a token"
    cells = anndata.read_h5ad(folder / "processed.h5ad")
    means = anndata.read_h5ad(folder / "group_means.h5ad")
    for name, row in means.obs.iterrows():
        if row["perturbation"] in record["perturbations"]:
            own = cells[(cells.obs["perturbed_genes"] == row["perturbation"]).to_numpy()].X.toarray()
            np.testing.assert_allclose(means[name].X.ravel(), own.mean(axis=0), rtol=1e-5)
            assert row["cells"] == 20
    trained = means.obs["split"].eq("train") & means.obs["perturbation"].isin(list(record["perturbations"]))
    np.testing.assert_allclose(
        means["train/Average_Perturbation_Train"].X.ravel(), means[trained.to_numpy()].X.mean(axis=0), rtol=1e-5
    )


def test_the_model_learns_what_adds_up_and_stands_beside_its_baselines(chain):
    found = scores(chain[1]["evaluate"])
    assert {model for model, _ in found} == {"model", "control_mean", "train_mean", "additive", "ridge"}
    error = {model: row["value"] for (model, metric), row in found.items() if metric == "agg_mae"}
    assert error["model"] < 0.9 * error["train_mean"] < error["control_mean"], error
    assert ("control_mean", "delta_agg_pcc") not in found, "a control without change has no correlation"
    row = found["model", "top20_de_delta_agg_pcc"]
    assert row["ci_low"] <= row["value"] <= row["ci_high"] and row["n"] == 2
    evaluation = json.loads((chain[1]["evaluate"] / "evaluation.json").read_text())
    assert any("mean of the training perturbations" in text for text in evaluation["verdicts"])
    assert any("4 of 6 target genes were not measured" in note for note in evaluation["notes"])
    assert "combo_seen2_test 2" in " ".join(evaluation["notes"])
    table = list(csv.DictReader((chain[1]["evaluate"] / "perturbations.csv").open()))
    assert len(table) == 2 * 5 and {entry["group"] for entry in table} == {"combo_seen2_test"}


def test_the_additive_baseline_is_the_sum_of_measured_singles(chain):
    table = pd.read_csv(chain[1]["evaluate"] / "perturbations.csv")
    means = anndata.read_h5ad(chain[1]["preprocess"] / "group_means.h5ad")
    for entry in table[table["model"] == "additive"].itertuples():
        a, b = entry.perturbation.split("_")
        profile = {name: means[f"train/{name}"].X.ravel() for name in (a, b, "Control")}
        summed = profile[a] + profile[b] - profile["Control"]
        truth = means[f"test/{entry.perturbation}"].X.ravel()
        assert entry.agg_mae == pytest.approx(np.abs(summed - truth).mean(), rel=1e-5)


def test_in_silico_the_model_of_perturbations_predicts_profiles(chain, tmp_path):
    folder, artefacts = chain
    found = perturb_file(
        str(artefacts["finetune"]),
        str(folder / "screen.h5ad"),
        tmp_path,
        ["T2,T3", "G0=0"],
        workspace=str(folder / "workspace"),
    )
    assert found["cells"] == 20 and found["cells_left_out"] == 320, (
        "control cells are told by the column of the training"
    )
    table = pd.read_csv(tmp_path / "perturbed_profiles.csv")
    means = anndata.read_h5ad(artefacts["preprocess"] / "group_means.h5ad")
    own = table[table["perturbation"] == "T2,T3"].set_index("gene")
    control = means["train/Control"].X.ravel()
    np.testing.assert_allclose(own["control"], control, atol=1e-4)
    name = next(name for name in means.obs_names if name.endswith("/T2_T3"))
    truth = means[name].X.ravel() - control
    assert np.corrcoef(own["change"], truth)[0, 1] > 0.5
    with pytest.raises(ConfigError, match="does not know the gene T22; did you mean 'T2'"):
        perturb_file(
            str(artefacts["finetune"]),
            str(folder / "screen.h5ad"),
            tmp_path,
            ["T22"],
            workspace=str(folder / "workspace"),
        )


def test_a_second_plan_reuses_everything_and_another_pairing_trains_anew(chain):
    folder = chain[0]
    assert all(job.cached for job in plan(folder / "screen.h5ad", folder / "workspace", *SMALL))
    matched = plan(folder / "screen.h5ad", folder / "workspace", *SMALL, "data_module.perturbation.match_column=plate")
    assert [job.cached for job in matched] == [True, False, False]


def test_wrong_columns_and_missing_controls_are_said(tmp_path):
    file = screen(tmp_path / "screen.h5ad", cells=3)
    with pytest.raises(DataError, match=r"obs has no column 'guide'.*columns: condition, plate"):
        run_stage(plan(file, tmp_path / "w", column="guide")[0])
    with pytest.raises(DataError, match=r"no value stands for control cells.*its 2 values are 0, 1"):
        run_stage(plan(file, tmp_path / "w", column="plate")[0])


def test_arguments_that_contradict_each_other():
    with pytest.raises(ConfigError, match="task=magic: must be perturbation"):
        split_run_arguments(["task=magic"])
    with pytest.raises(ConfigError, match="a run predicts a label or perturbations"):
        split_run_arguments(["task=perturbation", "label=celltype"])
    assert split_run_arguments(["task=label"]) == ({}, [])


def test_in_silico_a_classifier_says_how_its_classes_move(finished, tmp_path):
    cells = anndata.read_h5ad(finished.file)[:40].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model, genes = (
        finished.artefacts["finetune"],
        [gene for gene in ("CD79A", "NKG7", "CST3", "LYZ") if gene in set(cells.var_names)],
    )
    texts = [f"{genes[0]}=0", f"{genes[1]}=MAX * 0.5,{genes[0]}=X", f"{genes[1]}=X"]
    found = perturb_file(model, str(tmp_path / "cells.h5ad"), tmp_path / "out", texts, workspace=finished.workspace)
    assert found["cells"] + found["cells_left_out"] == 40
    effects = pd.read_csv(tmp_path / "out" / "perturbation_effects.csv", keep_default_na=False)
    shift = effects[effects["label"] == "embedding"].set_index("perturbation")["change"]
    assert shift[texts[2]] == 0, "a value that becomes itself changes nothing"
    assert shift[texts[1]] > 0
    classes = effects[effects["label"] == "celltype"]
    assert np.allclose(classes.groupby("perturbation")["change"].sum(), 0, atol=1e-6), (
        "probabilities add up to 1 before and after"
    )
    by_cell = pd.read_csv(tmp_path / "out" / "perturbed_cells.csv")
    assert len(by_cell) == 3 * found["cells"]
    same = by_cell[by_cell["perturbation"] == texts[2]]
    assert (same["celltype_before"] == same["celltype_after"]).all()
    with pytest.raises(ConfigError, match="say what the expression of"):
        perturb_file(model, str(tmp_path / "cells.h5ad"), tmp_path / "out", [genes[0]], workspace=finished.workspace)
    with pytest.raises(ConfigError, match="NOGENE is not among the genes of the file"):
        perturb_file(model, str(tmp_path / "cells.h5ad"), tmp_path / "out", ["NOGENE=0"], workspace=finished.workspace)
