"""One chain over log-normalised cells with labels of every kind: classes of few labelled cells, numbers, flags, a column to forget."""

import contextlib
import io
import json
from pathlib import Path

import anndata
import numpy as np
import pytest

from bmfm_pipeline import cli

COLUMNS = [
    "{label_column_name: few, task_group: kinds}",
    "{label_column_name: kinds, is_multilabel: true, from_columns: [is_t, is_b], task_group: kinds}",
    "{label_column_name: depth, is_regression_label: true}",
    "{label_column_name: donor, gradient_reversal_coefficient: 0.5}",
]
TINY = [
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=1",
    "model.intermediate_size=32",
]
SHORT = [*TINY, "task.max_steps=20", "data_module.max_length=64", "data_module.batch_size=32"]


@pytest.fixture(scope="module")
def cells(mini_h5ad, tmp_path_factory) -> Path:
    """The demonstration cells after scanpy's normalize_total and log1p, 8 in 100 of them with a label."""
    import scanpy

    cells = anndata.read_h5ad(mini_h5ad)
    names = cells.obs["celltype"].astype(str)
    few = names.astype(object).to_numpy(copy=True)
    few[np.arange(len(few)) % 12 > 0] = np.nan
    cells.obs["few"] = few
    cells.obs["is_t"], cells.obs["is_b"] = (
        names.str.contains("CD4|CD8").to_numpy(),
        (names == "CD19+ B").astype(int).to_numpy(),
    )
    cells.obs["depth"] = np.asarray(cells.X.sum(axis=1)).ravel() * 100.0
    cells.obs["donor"] = [f"d{number % 5}" for number in range(len(cells))]
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    file = tmp_path_factory.mktemp("cells") / "logs.h5ad"
    cells.write_h5ad(file)
    return file


@pytest.fixture(scope="module")
def chain(cells, tmp_path_factory) -> dict[str, Path]:
    """Folders of the artefacts by stage."""
    words = [str(cells), f"++label_columns=[{','.join(COLUMNS)}]"]
    words += ["data_module.transform_kwargs.input_values=log_normalised"]
    workspace, found = str(tmp_path_factory.mktemp("kinds")), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BMFM_WORKSPACE", workspace)
        for stage, more in (
            ("finetune", SHORT),
            ("evaluate", ["evaluation.controls=[default,linear_probe]", "evaluation.resamples=50"]),
        ):
            out = io.StringIO()
            own = words if stage == "finetune" else [str(cells), f"task.checkpoint={found['finetune']}"]
            with contextlib.redirect_stdout(out):
                assert cli.main([stage, *own, *more, "--workspace", workspace, "--json"]) == 0
            found |= json.loads(out.getvalue().splitlines()[-1])["artefacts"]
    return {stage: Path(folder) for stage, folder in found.items()}


def rows_of(chain, target: str) -> dict[tuple[str, str], dict]:
    rows = json.loads((chain["evaluate"] / "metrics.json").read_text())
    return {(row["model"], row["metric"]): row for row in rows if row["target"] == target}


def test_nothing_is_normalised_again_and_the_report_says_so(chain, cells):
    made, given = anndata.read_h5ad(chain["preprocess"] / "processed.h5ad"), anndata.read_h5ad(cells)
    kept = made.layers["log_normalised"]
    assert "counts" not in made.layers
    expected = given[made.obs_names, made.var_names].X
    assert np.array_equal(kept.toarray(), expected.toarray())
    assert np.array_equal(made.X.toarray(), np.minimum(np.ceil(expected.toarray()), 9))
    report = json.loads((chain["preprocess"] / "report.json").read_text())
    assert any("nothing was normalised again" in note for note in report["notes"])
    page = (chain["evaluate"] / "report.md").read_text()
    assert "the log-normalised values of the input, as they are" in page and "log1p of counts per 10,000" not in page


def test_cells_without_a_label_are_counted_kept_and_not_scored(chain):
    counts = json.loads((chain["preprocess"] / "labels.json").read_text())
    n = anndata.read_h5ad(chain["preprocess"] / "processed.h5ad", backed="r").n_obs
    assert counts["few"]["missing"] > 0.9 * n and counts["kinds"]["missing"] == 0
    scored = rows_of(chain, "few")[("model", "accuracy")]["n"]
    assert 0 < scored < 0.2 * n * 0.2
    assert rows_of(chain, "depth")[("model", "mse")]["n"] > 5 * scored


def test_flags_are_classes_that_are_scored_one_by_one(chain):
    labels = {
        entry["label_name"]: entry["label_values"]
        for entry in json.loads((chain["preprocess"] / "label_dict.json").read_text())
    }
    assert labels["kinds"] == {"is_b": 0, "is_t": 1}
    for name in ("kinds: is_b", "kinds: is_t"):
        assert rows_of(chain, name)[("logistic_l2", "auroc")]["value"] > 0.9


def test_numbers_are_predicted_in_the_units_of_their_column(chain):
    config = json.loads((chain["finetune"] / "config.json").read_text())
    entry = next(entry for entry in config["label_columns"] if entry["label_column_name"] == "depth")
    rows = rows_of(chain, "depth")
    assert entry["value_mean"] > 1000 and entry["value_scale"] > 100
    # After 20 steps no better than the mean, and not off by it, as a head that begins at zero would be.
    assert rows[("model", "mae")]["value"] < 1.3 * rows[("train_mean", "mae")]["value"]


def test_columns_of_a_task_group_share_a_layer_and_the_donor_is_judged_by_a_probe(chain):
    from safetensors import safe_open

    with safe_open(chain["finetune"] / "model.safetensors", "pt") as weights:
        assert sum(".task_groups." in name for name in weights.keys()) == 2  # noqa: SIM118
    verdicts = json.loads((chain["evaluate"] / "evaluation.json").read_text())["verdicts"]
    said = [text for text in verdicts if text.startswith("donor: ")]
    assert len(said) == 1 and "trained to forget it (gradient reversal, coefficient 0.5); a linear probe" in said[0]
