"""`bmfm compare` on real evaluations: what names stand for, what is written, and what is refused. Also evaluation by group and by class."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.storage import Workspace, list_artefacts, read_json

KIND = "celltype"  # the one obs column there is stands in for the donor


@pytest.fixture(scope="module")
def by_group(finished):
    """The same model tested again, its cells grouped."""
    settings = ["evaluation.controls=[majority]", f"evaluation.group_column={KIND}", "evaluation.stratified=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BMFM_WORKSPACE", finished.workspace)
        before = dict(finished.artefacts)
        found = finished.stage("evaluate", f"task.checkpoint={finished.artefacts['finetune']}", *settings)
        finished.artefacts.update(before)  # other tests know the first one
    return found["artefacts"]["evaluate"]


def compare(finished, *words):
    """(exit code, the JSON of the last line, what was shown)"""
    out, shown = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(shown):
        patch.setenv("BMFM_WORKSPACE", finished.workspace)
        code = cli.main(["compare", *words, "--resamples", "300", "--workspace", finished.workspace, "--json"])
    return code, json.loads(out.getvalue().splitlines()[-1]), shown.getvalue()


def test_cells_of_a_group_are_resampled_together_and_the_notes_say_so(by_group):
    folder = Path(by_group)
    notes = read_json(folder / "evaluation.json")["notes"]
    count = len(read_json(folder / "groups.json")["names"])
    assert any(f"resample whole values of {KIND}, of which the test cells have {count}" in note for note in notes)
    assert f"evaluation.stratified has no effect: whole values of {KIND} are resampled instead" in notes
    first, *_ = read_json(folder / "evaluation.json")["verdicts"]
    assert first.endswith("groups are resampled together") and "McNemar" not in first


def test_two_evaluations_by_their_addresses(finished, by_group, tmp_path):
    code, found, shown = compare(
        finished, finished.artefacts["evaluate"], by_group, "--output", str(tmp_path / "new" / "out")
    )
    entry = found["targets"]["celltype"]
    assert code == 0 and entry["paired"] and entry["n_a"] == 140 and entry["grouped_by"] == KIND
    rows = {row["metric"]: row for row in read_json(Path(by_group) / "metrics.json") if row["model"] == "model"}
    compared = {row["metric"]: row for row in entry["rows"]}
    for metric in ("accuracy", "f1", "auroc"):
        assert compared[metric]["a"]["value"] == compared[metric]["b"]["value"] == pytest.approx(rows[metric]["value"])
    assert "no evidence that A is better or worse than B: both say the same of each of the 140 cells" in shown
    names = [Path(file).name for file in found["files"]]
    assert names == ["comparison.json", "comparison.md", "comparison.html"]
    assert read_json(Path(found["files"][0]))["targets"] == found["targets"]
    assert "paired: the same 140 test cells for both" in Path(found["files"][2]).read_text()


def test_models_datasets_and_words_stand_for_evaluations(finished, by_group):
    first = finished.artefacts["evaluate"]
    _, by_words, _ = compare(finished, "previous", "latest")
    newest = [artefact.uri for artefact in list_artefacts(Workspace(finished.workspace), "evaluate")]
    assert (by_words["a"]["evaluation"], by_words["b"]["evaluation"]) == (newest[1], newest[0])
    _, by_model, _ = compare(finished, first, finished.artefacts["finetune"])
    assert by_model["b"]["evaluation"] == by_group, "the newest of the model"
    _, by_name, _ = compare(finished, first, by_model["b"]["dataset"])
    assert by_name["b"]["evaluation"] == by_group


@pytest.mark.parametrize(
    "name, words",
    [
        ("nothing", "neither an address nor a dataset that was evaluated in"),
        ("./nothing", "no artefact of an evaluation or a model"),
        ("pretrain", "no evaluation of this model in"),
        ("preprocess", "is a preprocess artefact; name an evaluation, or the model that was tested"),
        ("evaluate", "are the same evaluation"),
    ],
)
def test_names_that_stand_for_no_other_evaluation_are_refused(finished, by_group, name, words):
    code, found, _ = compare(finished, finished.artefacts["evaluate"], finished.artefacts.get(name, name))
    assert code == 2 and words in found["error"]


def test_impossible_settings_are_refused(finished, by_group):
    for words, said in (
        (["--level", "95"], "--level must lie between 0 and 1"),
        (["--resamples", "3"], "at least 100"),
    ):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setenv("BMFM_WORKSPACE", finished.workspace)
            code = cli.main(["compare", "previous", "latest", "--workspace", finished.workspace, "--json", *words])
        assert code == 2 and said in json.loads(out.getvalue())["error"]
