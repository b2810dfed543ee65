"""Champions and challengers on real cells and a real registry: first, held, promoted, drifted; and what is kept of it."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.data.label_files import read_label_dict
from bmfm_pipeline.storage import Workspace, load_artefact, publish
from bmfm_pipeline.tracking import Registry, tracking_uri

pytestmark = pytest.mark.slow
MODEL = "bmfm-zheng68k-mini"  # the file is called so
WORDS = [
    "label=celltype",
    "evaluation.controls=[majority]",
    "promotion.resamples=400",
    "promotion.drift.permutations=49",
]


class Lab:
    """A workspace of its own; the data are a file that may change, and stay the same dataset by its name."""

    def __init__(self, folder, chain):
        import anndata

        self.place = Workspace(str(folder / "workspace"))
        self.file = folder / "data" / "zheng68k-mini.h5ad"
        self.file.parent.mkdir()
        shutil.copy(chain.file, self.file)
        self.cells = anndata.read_h5ad(chain.file)
        self.good = chain.artefacts["finetune"]
        self.bad = _always_says(self.good, "CD19+ B", self.place, folder / "staging")

    def run(self, command: str, *words: str) -> tuple[int, dict, str]:
        """(exit code, the JSON of the last line, what was shown)"""
        out, shown = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(shown):
            patch.setenv("BMFM_WORKSPACE", self.place.uri)
            code = cli.main([command, *words, "--workspace", self.place.uri, "--json"])
        return code, json.loads(out.getvalue().splitlines()[-1]), shown.getvalue()

    def found(self, command: str, *words: str) -> dict:
        code, found, shown = self.run(command, str(self.file), *WORDS, *words)
        assert code == 0, found
        assert found["message"] in shown
        return found

    @property
    def registry(self) -> Registry:
        return Registry(tracking_uri(self.place.state_dir))

    def write(self, counts, labels) -> None:
        """The file as it is after `counts` (n, genes) of new cells with `labels` were appended."""
        import anndata
        from scipy import sparse

        more = anndata.AnnData(sparse.csr_matrix(counts.astype("float32")), var=self.cells.var[[]])
        more.obs_names = [f"new{number}" for number in range(len(labels))]
        more.obs["celltype"] = list(labels)
        old = anndata.AnnData(sparse.csr_matrix(self.cells.X), var=self.cells.var[[]])
        old.obs_names, old.obs["celltype"] = self.cells.obs_names, self.cells.obs["celltype"].astype(str)
        self.file.unlink()
        anndata.concat([old, more]).write_h5ad(self.file)

    def thinned(self, n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(counts, labels) of cells of which a share of all counts was seen: like the old ones, and none of them."""
        generator = np.random.default_rng(seed)
        rows = generator.choice(self.cells.n_obs, n, replace=False)
        counts = self.cells.X[rows].toarray() if hasattr(self.cells.X, "toarray") else np.asarray(self.cells.X)[rows]
        return generator.binomial(counts.astype(int), share), self.cells.obs["celltype"].astype(str).to_numpy()[rows]


def _always_says(model: str, label: str, place: Workspace, staging) -> str:
    """The address of a copy of a model in `place` that gives every cell the same label."""
    from safetensors.torch import load_file, save_file

    own = load_artefact(model)
    shutil.copytree(own.local(), staging, ignore=shutil.ignore_patterns("artefact.json"))
    tensors = load_file(staging / "model.safetensors")
    classes = read_label_dict(staging / "label_dict.json")["celltype"]
    (bias,) = [
        name
        for name, value in tensors.items()
        if "celltype" in name and name.endswith("bias") and len(value) == len(classes)
    ]
    tensors[bias][classes[label]] += 1000
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    return publish(
        staging, place, "finetune", "0bad" * 8, inputs=own.inputs, config=own.config, code_version=own.code_version,
        summary={**own.summary, "name": "zheng68k-mini"},
    ).uri  # fmt: skip


@pytest.fixture(scope="module")
def lab(finished, tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), finished)


@pytest.fixture(scope="module")
def empty(lab) -> dict:
    """What is said before any model was evaluated here."""
    return lab.found("reevaluate")


@pytest.fixture(scope="module")
def first(lab, empty) -> dict:
    return lab.found("promote", "--model", lab.bad)


@pytest.fixture(scope="module")
def second(lab, first) -> dict:
    """A better model, registered and judged."""
    return lab.found("promote", "--model", lab.good)


def test_without_a_champion_and_without_a_model_a_person_is_told_what_to_do(lab, empty):
    assert (empty["outcome"], empty["state"], empty["champion"]) == ("no champion", "NoChampion", None)
    assert "has no champion yet" in empty["message"] and "`bmfm promote zheng68k-mini`" in empty["message"]
    code, found, _ = lab.run("promote", str(lab.file), "label=celltype", "--model", "/nowhere")
    assert code == 2 and "no artefact of a model" in found["error"]
    code, found, _ = lab.run("reevaluate", str(lab.file), "label=celltype", "promotion.margine=1")
    assert code == 2 and "did you mean 'promotion.margin'" in found["error"]


def test_the_first_evaluated_model_becomes_champion_and_its_score_is_recorded(lab, first):
    version = lab.registry.at(MODEL, "champion")
    assert version is not None and version.uri == lab.bad and lab.registry.at(MODEL, "challenger") is None
    assert first["promotion"]["decision"] == version.tags["bmfm.promotion.decision"] == "first"
    assert first["promotion"]["triggered_by"].startswith("person")
    assert load_artefact(version.tags["bmfm.evaluation"]).stage == "evaluate"
    assert float(version.tags["bmfm.score.celltype.accuracy"]) < 0.2


def test_a_better_challenger_takes_over_and_both_versions_say_why(lab, second):
    aliases = lab.registry.aliases(MODEL)
    assert {alias: version.uri for alias, version in aliases.items()} == {"champion": lab.good, "previous": lab.bad}
    decision = second["promotion"]
    assert decision["promoted"] and decision["numbers"]["least_gain"] > 0 and decision["numbers"]["cells"] == 140
    assert (
        "is champion now: celltype, paired on 140 cells: the challenger is better than the champion"
        in second["message"]
    )
    for version in aliases.values():
        tags = version.tags
        assert tags["bmfm.promotion.decision"] == "promoted" and tags["bmfm.promotion.challenger"] == "2"
        assert float(tags["bmfm.promotion.ci_low"]) == pytest.approx(decision["numbers"]["ci_low"])
        assert tags["bmfm.promotion.triggered_by"] == decision["triggered_by"]


def test_a_worse_challenger_stays_challenger(lab, second):
    found = lab.found("promote", "--model", lab.bad)
    assert found["promotion"]["decision"] == "kept" and "version 1 stays challenger" in found["message"]
    assert lab.registry.at(MODEL, "champion").uri == lab.good
    assert lab.registry.at(MODEL, "challenger").uri == lab.bad
    lab.registry.unpoint("challenger", MODEL)
    assert "is champion already" in lab.found("promote", "--model", lab.good)["message"]


def test_what_has_not_changed_has_held(lab, second):
    found = lab.found("reevaluate")
    assert (found["outcome"], found["state"], found["drift"]) == ("held", "Held", [])
    assert "model, data and code are those of its recorded evaluation" in found["message"]
    assert lab.registry.at(MODEL, "champion").tags["bmfm.reevaluation.outcome"] == "held"


def test_new_cells_of_another_depth_and_kind_have_drifted(lab, second):
    counts, labels = lab.thinned(80, 0.3, seed=1)
    labels[:16] = "NKT"
    lab.write(counts, labels)
    found = lab.found("reevaluate")
    drift = {one["name"]: one for one in found["drift"]}
    assert found["outcome"] == "drifted", found["message"]
    assert drift["library_size"]["drifted"] and drift["library_size"]["value"] < -1
    assert drift["label_mix"]["value"] > 0.2 and "NKT 0 -> 20 %" in drift["label_mix"]["sentence"]
    assert not drift["gene_coverage"]["drifted"]
    assert "the model has no class for NKT (16 cells); these cells are not scored" in found["message"]
    tests = {one["cells"]: (one["paired"], one["n"]) for one in found["judgements"]}
    assert tests == {"the same cells": (True, [140, 140]), "new cells": (False, [64, 140])}
    assert found["champion"]["data_changed"]

    version = lab.registry.at(MODEL, "champion")
    assert version.tags["bmfm.reevaluation.outcome"] == "drifted"
    assert version.tags["bmfm.reevaluation.evaluation"] == found["champion"]["evaluation"]
    assert version.tags["bmfm.evaluation"] == found["champion"]["recorded"] != found["champion"]["evaluation"]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(lab.place.state_dir))
    run = client.get_run(found["mlflow_run_id"])
    assert run.data.tags["bmfm.outcome"] == "drifted" and run.data.metrics["drift/library_size"] < -1
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"reevaluation.json", "reevaluation.md"}


def test_new_cells_that_the_champion_gets_wrong_are_a_regression(lab, second):
    """It was trained for a moment and calls most cells dendritic; of the new cells none is."""
    counts, labels = lab.thinned(200, 0.95, seed=2)
    rows = np.flatnonzero(labels != "Dendritic")
    lab.write(counts[rows], labels[rows])
    found = lab.found("reevaluate")
    assert (found["outcome"], found["state"]) == ("regressed", "Regressed"), found["message"]
    same, new = found["judgements"]
    assert same["kind"] != "worse" and new["kind"] == "worse" and new["cells"] == "new cells" and not new["paired"]
    assert lab.registry.at(MODEL, "champion").tags["bmfm.reevaluation.outcome"] == "regressed"


def test_new_cells_that_the_champion_gets_right_are_an_improvement(lab, second):
    """More dendritic cells than before, but not so many that the data would count as others."""
    counts, labels = lab.thinned(700, 0.95, seed=3)
    dendritic, others = np.flatnonzero(labels == "Dendritic"), np.flatnonzero(labels != "Dendritic")
    more = round(len(dendritic) / len(labels) * 500) + 65
    rows = np.concatenate([dendritic[:more], others[: 500 - more]])
    lab.write(counts[rows], labels[rows])
    found = lab.found("reevaluate")
    assert (found["outcome"], found["state"]) == ("improved", "Improved"), found["message"]
    assert [one["kind"] for one in found["judgements"]][1] == "better"


def test_what_champions_rest_on_is_never_collected(lab, second):
    code, found, _ = lab.run("workspace", "gc", "--older-than", "0h", "--dry-run", "--even-latest")
    assert code == 0
    kept = {entry["uri"]: entry["why"] for entry in found["kept"]}
    champion, previous = lab.registry.at(MODEL, "champion"), lab.registry.at(MODEL, "previous")
    assert "previous of bmfm-zheng68k-mini" in kept[lab.bad]
    for version in (champion, previous):
        assert version.tags["bmfm.evaluation"] in kept
    assert not {entry["uri"] for entry in found["removals"]} & {lab.bad, champion.tags["bmfm.evaluation"]}


def test_a_finished_fine_tuning_is_registered_where_its_config_says_so(lab, second, caplog):
    from dataclasses import replace

    from bmfm_pipeline.stages.jobs import Job
    from bmfm_pipeline.stages.registering import offer_model

    own = load_artefact(lab.bad)
    config = {"promotion": {"after_finetune": "challenger", "first": "champion"}, "label_columns": [{}]}
    job = Job("finetune", "zheng68k-mini", own.key, lab.place.uri, config, {}, {}, "")
    assert offer_model(job, None, "schedule of finetune/x") == f"version 1 of {MODEL} is challenger"
    assert offer_model(replace(job, variant="no_pretrain"), None, "x") == ""
    quiet = {**config, "promotion": {"after_finetune": "nothing", "first": "champion"}}
    assert offer_model(replace(job, config=quiet), None, "x") == ""
    assert "first" not in offer_model(replace(job, name="other"), None, "x")
    assert lab.registry.at("bmfm-other", "champion").uri == lab.bad, "it was evaluated, and there was no champion"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert offer_model(job, None, "x") == ""
    assert "the model was not registered" in caplog.text
    lab.registry.unpoint("challenger", MODEL)
