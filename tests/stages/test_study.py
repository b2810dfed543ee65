"""A study over finished and new trainings: what it shares with an ordinary run, what it adds, and what a failure leaves."""

import re
from dataclasses import replace

import pytest

from bmfm_pipeline.errors import ConfigError, TrainingError
from bmfm_pipeline.stages.running import run_stage
from bmfm_pipeline.stages.study_plan import plan_study, read_percentages, read_seeds
from bmfm_pipeline.stages.study_running import IncompleteStudy, run_study
from bmfm_pipeline.storage import load_artefact, read_json

SAME_AS_FINISHED = ("pretrain.task.max_steps=8", "finetune.task.max_steps=25", "finetune.trainer.learning_rate=0.003")
TINY = (
    "model.hidden_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "data_module.max_length=128",
    "data_module.batch_size=32",
)


@pytest.fixture(scope="module")
def planned(finished):
    """A study whose point with all cells is the finished chain."""
    words = [*TINY, *SAME_AS_FINISHED]
    options = {"label": "celltype", "overrides": words, "workspace": finished.workspace}

    def plan(**asked):
        return plan_study(str(finished.file), **asked, **options)

    return plan


@pytest.fixture(scope="module")
def done(planned):
    return run_study(planned(few_shot=[10, 100]))


def test_all_cells_with_the_first_seed_are_the_ordinary_run(planned, finished):
    plan = planned(few_shot="[10,100]")
    assert [(point.name, point.fraction, point.seed) for point in plan.points] == [
        ("10 %, seed 1234", 0.1, 1234),
        ("100 %, seed 1234", 1.0, 1234),
    ]
    assert [job.stage for job in plan.shared] == ["preprocess", "pretrain"]
    assert all(job.cached for job in plan.shared)
    assert plan.main.evaluation.uri == finished.artefacts["evaluate"]
    assert [job.stage for job in plan.own(plan.points[0])] == ["finetune", "evaluate"]


def test_only_what_is_missing_is_trained_and_the_second_time_nothing(done, planned, finished):
    small, whole = (point.jobs[-2:] for point in done.plan.points)
    assert [done.results[job.key]["cached"] for job in (*small, *whole)] == [False, False, True, True]
    assert load_artefact(small[0].uri).summary["train_cells"] == 50
    assert not done.failed and done.main["evaluate"]["uri"] == finished.artefacts["evaluate"]
    plan = planned(few_shot=[10, 100])
    assert all(job.cached for job in plan.jobs) and plan.study_job().cached
    assert run_study(plan).study["uri"] == done.study["uri"]


def test_the_study_holds_both_points_with_model_and_control_on_the_same_cells(done):
    artefact = load_artefact(done.study["uri"])
    study = read_json(artefact.local_file("study.json"))
    assert (study["kind"], study["seeds_of"], study["missing"]) == ("few_shot", "finetuning", [])
    assert [(point["n_train"], point["test_cells"]) for point in study["points"]] == [(50, 140), (504, 140)]
    for point in study["points"]:
        rows = read_json(load_artefact(point["evaluation"]).local_file("metrics.json"))
        stored = {row["model"]: row["value"] for row in rows if row["metric"] == "accuracy"}
        found = point["metrics"]["celltype"]["accuracy"]
        assert {name: found[name]["value"] for name in stored} == stored
    few, all_cells = (point["metrics"]["celltype"]["accuracy"]["logistic_l2"]["value"] for point in study["points"])
    assert few < all_cells, "the control learns from the same share"
    means = {
        row["fraction"]: row["value"]
        for row in study["differences"]
        if row["seed"] is None and row["metric"] == "accuracy"
    }
    assert set(means) == {0.1, 1.0}
    page = artefact.local_file("study.html").read_text()
    assert page.count("<svg") == 2 and "10 %, seed 1234" in page
    assert "# " in artefact.local_file("study.md").read_text()
    assert artefact.files["figures/study-1.svg"]


def test_the_report_of_a_small_share_says_how_many_cells_were_learned_from(done):
    notes = read_json(load_artefact(done.plan.points[0].evaluation.uri).local_file("evaluation.json"))["notes"]
    assert any("train_fraction 0.1: 50 of 504 training cells" in note for note in notes)


def test_a_failed_point_is_named_and_the_others_are_kept(planned, done):
    def start(job, point):
        if point is not None and point.fraction == 0.25:
            raise TrainingError("the card is on fire")
        return run_stage(job)

    outcome = run_study(planned(few_shot=[10, 25, 100]), start=start)
    assert list(outcome.failed) == ["25 %, seed 1234"]
    study = read_json(load_artefact(outcome.study["uri"]).local_file("study.json"))
    assert study["missing"] == ["25 %, seed 1234"] and len(study["points"]) == 2
    assert outcome.study["uri"] != done.study["uri"], "an incomplete study is not taken for a complete one"
    with pytest.raises(
        IncompleteStudy, match=r"1 of 3 points of the study failed \(25 %, seed 1234: the card is on fire\)"
    ):
        outcome.check()


def test_when_every_point_fails_the_reason_is_that_of_the_first(planned):
    def start(job, point):
        if point is not None:
            raise TrainingError(f"no room for {point.name}")
        return run_stage(job)

    with pytest.raises(TrainingError, match="no room for 25 %, seed 1234"):
        run_study(planned(few_shot=[25, 50]), start=start)


def test_what_only_some_points_need_takes_only_these_along(planned):
    plan = planned(seeds=2, seeds_of="training")
    plan = replace(plan, points=(*plan.points, replace(plan.points[1], seed=77, jobs=plan.points[1].jobs[:2])))
    plan = replace(plan, uses={job.key: sum(job in point.jobs for point in plan.points) for job in plan.jobs})
    pretrain = plan.points[1].jobs[1]
    assert pretrain in plan.shared

    def start(job, point):
        if job.key == pretrain.key:
            raise TrainingError("pretraining failed")
        return {"uri": job.uri}

    assert set(run_study(plan, start=start).failed) == {plan.points[1].name, plan.points[2].name}


@pytest.mark.parametrize(
    ("what", "shared", "split_differs"),
    [("finetuning", ["preprocess", "pretrain"], False), ("training", ["preprocess"], False), ("split", [], True)],
)
def test_what_a_seed_changes(planned, what, shared, split_differs):
    plan = planned(seeds="2", seeds_of=what)
    assert plan.seeds == [1234, 1235] and plan.fractions == [1.0]
    assert [job.stage for job in plan.shared] == shared
    one, other = plan.points
    assert (one.jobs[0].key != other.jobs[0].key) == split_differs
    assert all(one.jobs[at].key != other.jobs[at].key for at in (2, 3))
    assert one.evaluation.config["seed"]["seed_value"] == 1234 and other.evaluation.config["seed"]["seed_value"] == 1235


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (True, (0.1, 0.25, 0.5, 0.75, 1.0)),
        ("true", (0.1, 0.25, 0.5, 0.75, 1.0)),
        ("[100, 10]", (0.1, 1.0)),
        ("12.5 %, 50%", (0.125, 0.5)),
        (30, (0.3,)),
        (False, None),
        ("false", None),
        (None, None),
    ],
)
def test_shares_are_read_as_a_person_writes_them(value, found):
    assert read_percentages(value) == found


@pytest.mark.parametrize(
    ("value", "found"),
    [("5", 5), (5, 5), ("[5]", (5,)), ("3,1", (3, 1)), ([0, 2], (0, 2)), (None, None), ("false", None)],
)
def test_seeds_are_a_number_or_a_list(value, found):
    assert read_seeds(value) == found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"few_shot": "0, 50"}, "percentages lie above 0 and up to 100"),
        ({"few_shot": "110"}, "percentages lie above 0 and up to 100"),
        ({"few_shot": [0.1, 1]}, "is read as percent"),
        ({"few_shot": "ten"}, "'ten' is not a number"),
        ({"seeds": "1"}, "a spread needs 2 seeds or more"),
        ({"seeds": "[1,1]"}, "name each seed once"),
        ({"seeds": "1.5"}, "'1.5' is not a whole number"),
        ({"few_shot": True, "seeds_of": "split"}, "give them with seeds=5"),
        ({"seeds": 2, "seeds_of": "luck"}, "must be one of finetuning, training, split"),
        ({}, "needs few_shot=true"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(asked, said, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan_study("zheng68k-mini", workspace=str(tmp_path), **asked)


def test_contradictions_with_the_configuration_are_refused(mini_h5ad, tmp_path):
    with pytest.raises(ConfigError, match=r"few_shot varies data_module.train_fraction, which .*=0.5 sets too"):
        plan_study(
            "zheng68k-mini", few_shot=True, overrides=["data_module.train_fraction=0.5"], workspace=str(tmp_path)
        )
    with pytest.raises(ConfigError, match="no label column to learn"):
        plan_study(str(mini_h5ad), seeds=2, workspace=str(tmp_path))
