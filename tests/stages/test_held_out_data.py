"""A model of the workspace on another study's cells: labels mapped in the open, cells prepared for it, none that it has seen."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.evaluation.predictions import read_embeddings, read_predictions
from bmfm_pipeline.stages import plan_stage, run_stage
from bmfm_pipeline.stages.held_out import HeldOut
from bmfm_pipeline.storage import find_artefact, read_json
from bmfm_pipeline.training.prepared import PreparedData

pytestmark = pytest.mark.slow
MAPPING = """from,to,side
CD4+ T Helper2,CD4 T cell,data
CD34+,,data
CD4+/CD25 T Reg,CD4 T cell,model
CD4+/CD45RO+ Memory,CD4 T cell,model
CD4+/CD45RA+/CD25- Naive T,CD4 T cell,model
"""


@pytest.fixture(scope="module")
def sorted_cells(data_dir, tmp_path_factory) -> Path:
    """160 sorted blood cells of the same paper with all genes, in another order; labels are in another column, and four have none."""
    import anndata

    cells = anndata.read_h5ad(data_dir / "zheng_sorted" / "zheng_sorted_counts.h5ad")
    chosen = np.sort(np.random.default_rng(0).choice(cells.n_obs, 160, replace=False))
    cells = cells[chosen, np.random.default_rng(1).permutation(cells.n_vars)].copy()
    cells.obs = pd.DataFrame(
        {"cell_type": cells.obs["celltype"].astype(object), "half": np.arange(160) % 2}, index=cells.obs_names
    )
    cells.obs.iloc[:4, 0] = np.nan
    path = tmp_path_factory.mktemp("sorted") / "sorted.h5ad"
    cells.write_h5ad(path)
    return path


def planned(finished, file, *words, label="cell_type"):
    named = [f"task.checkpoint={finished.artefacts['finetune']}", *words]
    return plan_stage("evaluate", str(file), overrides=named, label=label, workspace=finished.workspace)


def test_labels_that_are_none_of_the_models_are_refused_before_anything_runs(finished, sorted_cells):
    with pytest.raises(DataError, match=r"1 of the 10 labels of obs\['cell_type'\] is no class of the model"):
        planned(finished, sorted_cells)
    with pytest.raises(ConfigError, match="obs has no column 'celltype'"):
        planned(finished, sorted_cells, label=None)
    with pytest.raises(ConfigError, match=r"cannot be changed for a model that is trained already"):
        planned(finished, sorted_cells, "data_module.max_length=64")
    with pytest.raises(ConfigError, match="only_cells: obs has no column 'third'"):
        planned(finished, sorted_cells, "evaluation.only_cells={third: 1}")


@pytest.fixture(scope="module")
def mapping(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("mapping") / "map.csv"
    file.write_text(MAPPING)
    return file


@pytest.fixture(scope="module")
def tested(finished, sorted_cells, mapping):
    """The folder of an evaluation of the finished model on them, and its job."""
    jobs = planned(
        finished,
        sorted_cells,
        f"evaluation.label_mapping={mapping}",
        "evaluation.controls=full",
    )
    for job in jobs:
        run_stage(job)
    return Path(jobs[-1].uri), jobs[-1]


def test_every_labelled_cell_is_tested_beside_the_default_controls_and_all_is_said(tested, sorted_cells):
    import anndata

    folder, _ = tested
    obs = anndata.read_h5ad(sorted_cells, backed="r").obs
    scored = obs.index[obs["cell_type"].notna() & (obs["cell_type"] != "CD34+")]
    predictions = read_predictions(folder / "predictions.parquet")
    label = predictions.labels["celltype"]
    assert predictions.cells == list(scored)
    truth = [label.class_names[place] for place in label.truth]
    assert truth == ["CD4 T cell" if name.startswith("CD4+") else name for name in obs["cell_type"][scored]]
    np.testing.assert_allclose(label.probabilities.sum(axis=1), 1, atol=2e-3)
    evaluation = read_json(folder / "evaluation.json")
    rows = {(row["model"], row["metric"]): row for row in evaluation["rows"]}
    assert {model for model, _ in rows} == {"model", "majority", "logistic_l2"}
    assert rows["model", "accuracy"]["split"] == "held-out" and rows["model", "accuracy"]["n"] == len(scored)
    # Few cells of another experiment, and still the same kinds of cells: what was learned of one holds for the other.
    assert rows["logistic_l2", "accuracy"]["value"] > rows["majority", "accuracy"]["value"] + 0.3
    notes = "\n".join(evaluation["notes"])
    for said in (
        "which the model does not come from", "merged, 10 into 8", "CD4+ T Helper2 -> CD4 T cell", "1 labels are left out by the mapping",
        "4 of 160 cells have no label", f"0 of {len(scored)} test cells (0.0 %)", "controls are the default ones on held-out data, not full",
    ):  # fmt: skip
        assert said in notes, said
    assert len(evaluation["verdicts"]) == 2 and "logistic regression" in evaluation["verdicts"][0]
    page = (folder / "report.html").read_text()
    assert "evaluation on held-out data" in page and "held-out cells" in page
    confidences = pd.read_parquet(folder / "confidences.parquet")
    own = label.probabilities.argmax(axis=1)
    assert (confidences["right"].to_numpy() == (own == label.truth)).all()
    uncalibrated = confidences["uncalibrated_confidence"].to_numpy()
    np.testing.assert_allclose(uncalibrated, label.probabilities.max(axis=1), atol=2e-3)


def test_cells_are_read_as_prediction_reads_them(finished, tested, sorted_cells, tmp_path):
    from bmfm_pipeline.stages.predict import predict_file
    from bmfm_pipeline.stages.predicting.asked import Asked

    folder, _ = tested
    model = finished.artefacts["finetune"]
    predict_file(model, str(sorted_cells), tmp_path, asked=Asked(tables=["embeddings"]), workspace=finished.workspace)
    cells = read_predictions(folder / "predictions.parquet").cells
    predicted = pd.read_csv(tmp_path / "embeddings.csv", index_col=0, header=None).loc[cells].to_numpy()
    np.testing.assert_allclose(read_embeddings(folder, "test")[0], predicted, atol=1e-5)


def test_training_cells_are_those_of_the_model_over_shared_genes_in_its_order(finished, tested):
    _, job = tested
    held = HeldOut.open(job, RunConfig.model_validate(job.config))
    training = PreparedData(Path(finished.artefacts["preprocess"]))
    both = held.both.store
    genes = {gene: column for column, gene in enumerate(training.store.var_names)}
    columns = [genes[gene] for gene in both.var_names]
    rows = np.array([3, 0, 5])
    np.testing.assert_array_equal(both.counts.rows(rows).toarray(), training.store.counts.rows(rows).toarray()[:, columns])  # fmt: skip
    assert np.array_equal(held.both.training_rows(), training.rows("train"))
    theirs = held.new.store
    place = {gene: column for column, gene in enumerate(theirs.var_names)}
    last = np.array([theirs.n_cells - 1])
    expected = theirs.counts.rows(last).toarray()[:, [place[gene] for gene in both.var_names]]
    np.testing.assert_array_equal(both.counts.rows(last + training.store.n_cells).toarray(), expected)
    ids = held.new.vocabularies["genes"].ids(theirs.var_names)
    assert (np.diff(ids) >= 0).all() and list(theirs.var_names) != PreparedData(held.new.folder).store.var_names


def test_planning_again_finds_both_and_a_changed_mapping_keeps_the_prepared_cells(
    finished, tested, sorted_cells, tmp_path
):
    _, job = tested
    file = tmp_path / "other.csv"
    file.write_text(MAPPING.replace("CD34+,,", "CD34+,CD34+,"))
    same = planned(
        finished,
        sorted_cells,
        f"evaluation.label_mapping={job.inputs['label_mapping']['uri']}",
        "evaluation.controls=full",
    )
    assert [entry.cached for entry in same] == [True, True] and same[-1].key == job.key
    changed = planned(finished, sorted_cells, f"evaluation.label_mapping={file}", "evaluation.controls=full")
    assert [entry.cached for entry in changed] == [True, False]
    assert find_artefact(job.place, "preprocess", job.inputs["data"]["id"]).summary["test"] == 160


def test_keys_of_other_data_are_refused_where_the_model_meets_its_own(finished, mapping):
    with pytest.raises(ConfigError, match="label_mapping is for data that a model of the workspace does not come from"):
        planned(finished, finished.file, f"evaluation.label_mapping={mapping}", label="celltype")
    own = planned(finished, finished.file, label="celltype")
    assert len(own) == 1 and own[0].uri == finished.artefacts["evaluate"]


def test_the_mapping_to_fill_in_is_written_by_the_command_line(finished, sorted_cells, tmp_path):
    file, out = tmp_path / "map.csv", io.StringIO()
    words = ["evaluate", str(sorted_cells), "label=cell_type", f"task.checkpoint={finished.artefacts['finetune']}"]
    more = ["--write-label-mapping", str(file), "--workspace", finished.workspace, "--json"]
    with contextlib.redirect_stdout(out):
        assert cli.main([*words, *more]) == 0
    found = json.loads(out.getvalue().splitlines()[-1])
    assert (found["labels"], found["to_fill_in"]) == (10, 1) and "Dendritic" in found["model_classes"]
    assert "CD4+ T Helper2,?" in file.read_text()


@pytest.fixture(scope="module")
def renamed_cells(finished, tmp_path_factory) -> Path:
    """Cells that the model was trained on and cells of its test split, half and half, all called otherwise."""
    import anndata

    cells = anndata.read_h5ad(finished.file)
    prepared = PreparedData(Path(finished.artefacts["preprocess"]))
    names = np.asarray(prepared.store.obs_names)
    chosen = [*names[prepared.rows("train")[:40]], *names[prepared.rows("test")[:40]]]
    cells = cells[chosen].copy()
    cells.obs["seen"] = ["yes"] * 40 + ["no"] * 40
    cells.obs_names = [f"renamed{number}" for number in range(80)]
    path = tmp_path_factory.mktemp("renamed") / "renamed.h5ad"
    cells.write_h5ad(path)
    return path


def test_training_cells_under_other_names_are_refused_dropped_or_kept_as_asked(finished, renamed_cells):
    run_stage(planned(finished, renamed_cells, label="celltype")[0])

    def begun(*words):
        job = planned(finished, renamed_cells, *words, label="celltype")[-1]
        job.staging.mkdir(parents=True, exist_ok=True)
        return HeldOut.begin(job, RunConfig.model_validate(job.config))

    with pytest.raises(DataError, match=r"40 of 80 test cells \(50\.0 %\).*evaluation\.seen_cells=drop"):
        begun()
    dropped, kept = begun("evaluation.seen_cells=drop"), begun("evaluation.seen_cells=keep")
    named = dropped.new.store.column("seen")[dropped.rows]
    assert set(named) == {"no"} and len(named) == 40 and len(kept.rows) == 80
    assert dropped.said["seen"] == kept.said["seen"] and kept.said["seen"]["share"] == 0.5
    assert any("40 of 80 test cells" in note and "left out" in note for note in dropped.said["notes"])
    chosen = begun("evaluation.only_cells={seen: no}")
    assert np.array_equal(chosen.rows, dropped.rows)
    assert begun("evaluation.seen_cells_by=names").said["seen"]["cells"] == 0


def test_which_column_of_the_other_data_holds_which_label_of_the_model(tmp_path):
    from types import SimpleNamespace

    from bmfm_pipeline.stages.held_out_plan import trained_run

    def pairs(columns, asked, **label_from):
        stored = {"label_columns": [{"label_column_name": name} for name in columns], "trainer": {"losses": None}}
        file = tmp_path / "run_config.json"
        file.write_text(json.dumps(stored))
        test = SimpleNamespace(
            evaluation=SimpleNamespace(label_from=label_from or None),
            label_columns=[SimpleNamespace(label_column_name=name) for name in asked],
        )
        values, found = trained_run(test, SimpleNamespace(local_file=lambda name: file))
        assert [entry["label_column_name"] for entry in values["label_columns"]] == [name for name in columns if name in found]  # fmt: skip
        return found

    assert pairs(["celltype"], ["cell_type"]) == {"celltype": "cell_type"}
    assert pairs(["celltype", "tissue"], ["tissue"]) == {"tissue": "tissue"}
    assert pairs(["celltype", "tissue"], []) == {"celltype": "celltype", "tissue": "tissue"}
    assert pairs(["celltype"], ["celltype", "disease"]) == {"celltype": "celltype"}
    assert pairs(["celltype", "tissue"], ["organ"], tissue="organ") == {"tissue": "organ"}
    assert pairs([], ["celltype"]) == {}
    with pytest.raises(ConfigError, match=r"evaluation\.label_from=\{celltype: organ\}"):
        pairs(["celltype", "tissue"], ["organ"])
    with pytest.raises(ConfigError, match="did you mean 'tissue'"):
        pairs(["celltype", "tissue"], [], tisue="organ")
