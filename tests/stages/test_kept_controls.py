"""Controls as artefacts: fitted once for all evaluations on a split, rebuilt when damaged, and the model without its pretraining."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.controls import FULL, VALUES_FULL
from bmfm_pipeline.evaluation.predictions import read_embeddings, write_embeddings
from bmfm_pipeline.stages import plan_pipeline, plan_stage
from bmfm_pipeline.stages.controls_kept import Column, KeptControls
from bmfm_pipeline.stages.controls_plan import twin_of_artefact, untrained_twin
from bmfm_pipeline.stages.models import find_checkpoint
from bmfm_pipeline.storage import Workspace, load_artefact, read_json
from bmfm_pipeline.training.prepared import PreparedData

pytestmark = pytest.mark.slow


def planned(finished, *words, model=None):
    named = f"task.checkpoint={model or finished.artefacts['finetune']}"
    return plan_stage("evaluate", config_name="test_config", overrides=[named, *words], workspace=finished.workspace)


def evaluated(finished, *words) -> tuple[Path, dict]:
    """An evaluation of the finished model through the command line: its folder, and its JSON."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        model = f"task.checkpoint={finished.artefacts['finetune']}"
        named = ["evaluate", "-cn", "test_config", model, *words]
        assert cli.main([*named, "--workspace", finished.workspace, "--json"]) == 0
    found = json.loads(out.getvalue().splitlines()[-1])
    return Path(found["artefacts"]["evaluate"]), found


def artefacts_of(finished, stage) -> dict[str, float]:
    """{key: when its predictions were written} of what the workspace holds of a stage."""
    folder = Path(finished.workspace) / "artefacts" / stage
    return {path.name: (path / "artefact.json").stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture
def kept(finished):
    """A maker of the controls of an evaluation, of label columns that are made up on its cells."""

    def make(job=None, columns=(), rows=None) -> KeptControls:
        job = job or planned(finished)[-1]
        prepared = PreparedData(Path(finished.artefacts["preprocess"]))
        rows = prepared.rows("test") if rows is None else rows
        run = RunConfig.model_validate(job.config)
        job.staging.mkdir(parents=True, exist_ok=True)
        write_embeddings(job.staging, "test", *read_embeddings(Path(finished.artefacts["evaluate"]), "test"))
        return KeptControls(job, run, prepared, prepared.store.counts, rows, list(columns), lambda event: None)

    return make


@pytest.fixture
def celltype(finished) -> Column:
    prepared = PreparedData(Path(finished.artefacts["preprocess"]))
    known = prepared.label_dict["celltype"]
    return Column("celltype", prepared.store.labels("celltype", known), sorted(known, key=known.get))


def test_small_data_have_the_full_set_and_embeddings_of_their_training_cells(finished):
    folder = Path(finished.artefacts["evaluate"])
    rows = read_json(folder / "metrics.json")
    assert {row["model"] for row in rows} == {"model", *FULL}
    prepared = PreparedData(Path(finished.artefacts["preprocess"]))
    embeddings, where = read_embeddings(folder, "train")
    assert np.array_equal(where, prepared.rows("train")) and len(embeddings) == len(where)
    scores = {row["model"]: row["value"] for row in rows if row["metric"] == "accuracy"}
    assert scores["linear_probe"] > scores["majority"] < scores["knn"]


def test_another_evaluation_on_the_split_finds_them_all(finished, capsys):
    before = artefacts_of(finished, "control"), artefacts_of(finished, "embeddings")
    folder, _ = evaluated(finished, "evaluation.level=0.9")
    assert (artefacts_of(finished, "control"), artefacts_of(finished, "embeddings")) == before
    said = capsys.readouterr().err
    assert all(f"{name}: reused" in said for name in (*FULL, "embeddings"))
    assert "computed in" not in said
    first = Path(finished.artefacts["evaluate"])
    assert (folder / "controls.json").read_bytes() == (first / "controls.json").read_bytes()
    for name in ("train.npy", "train_rows.npy"):
        assert (folder / "embeddings" / name).read_bytes() == (first / "embeddings" / name).read_bytes()


def test_a_damaged_control_is_rebuilt_as_it_was(kept, celltype):
    first = kept(columns=[celltype])
    first.get("logistic_l2", celltype)
    file = Path(first.done[0]["artefact"]) / "predictions.npz"
    content = file.read_bytes()
    file.write_bytes(content[:-7] + b"damaged")
    again = kept(columns=[celltype])
    again.get("logistic_l2", celltype)
    assert [row["state"] for row in (*first.done, *again.done)] == ["reused", "computed"]
    assert file.read_bytes() == content


def test_the_key_follows_data_labels_and_rows_and_not_the_model_or_its_seed(finished, kept, celltype):
    job = planned(finished)[-1]
    key, made_of = kept(job).key_of("logistic_l2", celltype)
    assert set(made_of["inputs"]) == {"data"}
    other = {**job.inputs, "model": {"id": "another", "uri": "/nowhere", "stage": "finetune"}}
    reseeded = {**job.config, "seed": {"seed_value": 99}}
    for same in (replace(job, inputs=other), replace(job, config=reseeded)):
        assert kept(same).key_of("logistic_l2", celltype)[0] == key
    moved = {**job.inputs, "data": {**job.inputs["data"], "id": "others"}}
    fewer = {**job.config, "data_module": {**job.config["data_module"], "train_fraction": 0.5}}
    for changed in (replace(job, inputs=moved), replace(job, config=fewer)):
        assert kept(changed).key_of("logistic_l2", celltype)[0] != key
    silent = replace(celltype, values=np.where(celltype.values == 0, -100, celltype.values))
    assert kept(job).key_of("logistic_l2", silent)[0] != key
    assert kept(job).key_of("majority", celltype)[0] != key


def test_part_of_the_test_cells_reads_its_rows_of_the_same_artefact(kept, celltype):
    whole, some = kept(columns=[celltype]), np.array([5, 2, 40])
    rows = whole.rows[some]
    part = kept(columns=[celltype], rows=rows)
    expected = whole.get("logistic_l2", celltype)["celltype"]
    found = part.get("logistic_l2", celltype)["celltype"]
    assert part.done[0]["artefact"] == whole.done[0]["artefact"]
    assert found.predicted.tolist() == expected.predicted[some].tolist()
    assert found.truth.tolist() == celltype.values[rows].tolist()


def test_numbers_and_several_classes_a_cell_have_controls_too(finished, kept, celltype, caplog):
    members = np.stack([celltype.values == 9, celltype.values < 3], axis=1).astype(np.float32)
    members[:5] = -100
    depth = Column("depth", np.log(np.arange(len(members)) + 1).astype(np.float32), [])
    several = Column("states", members, ["dendritic", "early"])
    found = kept(columns=[depth, several])
    with caplog.at_level("INFO"):
        numbers = {name: found.get(name, depth)["depth"] for name in VALUES_FULL}
        assert "ridge of depth: computed in" in caplog.text
    assert all(len(entry.predicted) == len(found.rows) and entry.probabilities is None for entry in numbers.values())
    assert np.ptp(numbers["train_mean"].predicted) == 0 < np.ptp(numbers["knn"].predicted)
    for name in FULL:
        classes = found.get(name, several)
        assert list(classes) == ["states: dendritic", "states: early"]
        right = classes["states: dendritic"].predicted == classes["states: dendritic"].truth
        assert name == "majority" or right.mean() > 0.8


# The model without its pretraining
@pytest.fixture(scope="module")
def compared(finished) -> tuple[Path, dict]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BMFM_WORKSPACE", finished.workspace)
        return evaluated(finished, "controls=default,no_pretrain")


def test_the_model_is_fine_tuned_once_more_without_pretraining(finished, compared):
    folder, found = compared
    twin, own = (load_artefact(found["artefacts"].get("finetune_no_pretrain")), load_artefact(found["model"]))
    assert own.uri == finished.artefacts["finetune"]
    assert "checkpoint" in own.inputs and "checkpoint" not in twin.inputs
    assert twin.stage == "finetune" and twin.inputs["data"] == own.inputs["data"]
    sizes = [read_json(Path(model.uri) / "config.json") for model in (twin, own)]
    assert sizes[0] == sizes[1]
    left, right = (read_json(Path(model.uri) / "run_config.json") for model in (twin, own))
    for section in ("task", "trainer", "data_module", "fields", "label_columns", "seed"):
        assert left[section] == right[section], section
    models = [row["model"] for row in read_json(folder / "metrics.json") if row["metric"] == "accuracy"]
    assert models == ["model", "majority", "logistic_l2", "no_pretrain"]
    assert any("pretraining" in sentence for sentence in read_json(folder / "evaluation.json")["verdicts"])
    assert load_artefact(str(folder)).inputs["no_pretrain"]["id"] == twin.key
    newest = find_checkpoint("latest", Workspace(finished.workspace), None, stage="finetune")
    assert newest.uri != twin.uri, "a model that was made as a control is not the newest one of anybody"


def test_its_job_is_the_same_from_the_chain_and_from_the_model(finished, compared):
    jobs = planned(finished, "evaluation.controls=[default,no_pretrain]")
    assert [(job.title, job.cached) for job in jobs] == [("finetune_no_pretrain", True), ("evaluate", True)]
    artefact = load_artefact(finished.artefacts["finetune"])
    place = Workspace(finished.workspace)
    config = read_json(artefact.local_file("run_config.json"))
    chain = replace(jobs[-1], stage="finetune", config=config, inputs=artefact.inputs)
    start = find_checkpoint(finished.artefacts["pretrain"], place, None)
    assert untrained_twin(chain, start).key == twin_of_artefact(artefact, place).key == jobs[0].key


def test_the_chain_plans_it_before_the_evaluation(finished):
    jobs = plan_pipeline("zheng68k-mini", workspace=finished.workspace, controls="full, no_pretrain")
    assert [job.title for job in jobs] == ["preprocess", "pretrain", "finetune", "finetune_no_pretrain", "evaluate"]
    assert jobs[4].inputs["no_pretrain"] == jobs[3].as_input()
    assert jobs[2].key != jobs[3].key
    assert jobs[3].config["model"]["hidden_size"] == jobs[2].config["model"]["hidden_size"]
    plain = plan_pipeline("zheng68k-mini", workspace=finished.workspace, controls="full")
    assert [job.title for job in plain] == ["preprocess", "pretrain", "finetune", "evaluate"]
    assert [job.key for job in plain[:3]] == [job.key for job in jobs[:3]]


def test_it_is_refused_where_it_says_nothing(finished, compared, mini_h5ad):
    word = "evaluation.controls=[no_pretrain]"
    twin = compared[1]["artefacts"]["finetune_no_pretrain"]
    with pytest.raises(ConfigError, match="this model was not pretrained"):
        planned(finished, word, model=twin)
    with pytest.raises(ConfigError, match="is a pretrain artefact"):
        planned(finished, word, model=finished.artefacts["pretrain"])
    with pytest.raises(ConfigError, match="no label column to learn"):
        plan_pipeline(str(mini_h5ad), workspace=finished.workspace, controls="no_pretrain")
    for word in ("finetune.trainer.lora_config=default", "finetune.task.freeze_layers=true"):
        reason = word.partition("=")[0].removeprefix("finetune.")
        with pytest.raises(ConfigError, match=f"no_pretrain cannot be made for a model with {reason}"):
            plan_pipeline("zheng68k-mini", overrides=[word], workspace=finished.workspace, controls="no_pretrain")


def test_a_word_that_is_no_control_ends_before_anything_runs(finished, capsys):
    model = f"task.checkpoint={finished.artefacts['finetune']}"
    command = ["evaluate", "-cn", "test_config", model, "controls=logistic", "--workspace", finished.workspace]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "controls=logistic: unknown control logistic; known: auto, default, full, majority" in said
