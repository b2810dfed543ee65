"""The command line without training: help, errors, plans and information."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bmfm_pipeline import cli

BIN = Path(sys.executable).parent
HEAVY = {
    "torch",
    "pytorch_lightning",
    "transformers",
    "scanpy",
    "anndata",
    "mlflow",
    "prefect",
    "hydra",
    "pandas",
    "numpy",
}


def run(arguments, **environment):
    """A console script as a person calls it."""
    return subprocess.run(
        [str(BIN / arguments[0]), *map(str, arguments[1:])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def imported_by(arguments) -> set[str]:
    """Top-level packages that a command imports."""
    code = "import sys\nfrom bmfm_pipeline import cli\ntry:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
    code += "print('IMPORTED', *sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("IMPORTED"))
    return set(line.split()[1:])


def test_help_imports_nothing_heavy():
    assert not imported_by(["--help"]) & HEAVY


def test_a_plan_imports_no_framework():
    assert not imported_by(["plan", "zheng68k-mini"]) & (HEAVY - {"hydra"})


def test_help_names_every_command_and_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for name in (
        "run",
        "plan",
        "preprocess",
        "pretrain",
        "finetune",
        "evaluate",
        "predict",
        "data",
        "datasets",
        "doctor",
        "genes",
        "ui",
    ):
        assert f"\n    {name}" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "zheng68k-mini", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["run", "zheng68k-mini", "batch_size"], "overrides look like key=value"),
        (["doctor", "a=b"], "doctor takes no overrides: a=b"),
    ],
)
def test_words_that_mean_nothing_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "zheng68k-mni"], "did you mean 'zheng68k-mini'?"),
        (["plan", "nowhere.h5ad"], "nowhere.h5ad: no such file; datasets known by name: "),
        (["plan", "."], "'.' is neither an h5ad file nor a known dataset"),
        (["plan", "zheng68k"], "export BMFM_TARGETS_ZHENG68K_DATA="),
        (["plan", "zheng68k-mini", "data_module.max_lenght=64"], "did you mean 'data_module.max_length'?"),
        (
            ["plan", "zheng68k-mini", "controls=some"],
            "controls=some: unknown control some; known: auto, default, full, majority",
        ),
        (["plan", "zheng68k-mini", "label="], "label= needs a value"),
        (["plan", "zheng68k-mini", "few_shot=ten"], "few_shot=ten: 'ten' is not a number"),
        (["plan", "zheng68k-mini", "seeds=1"], "seeds=1: a spread needs 2 seeds or more"),
        (["plan", "zheng68k-mini", "parallel=2"], "parallel=2: is about several trainings"),
        (["plan", "zheng68k-mini", "seeds=2", "parallel=0"], "parallel=0: must be a whole number from 1"),
        (["plan", "zheng68k-mini", "task=perturb"], "task=perturb: must be perturbation, or label"),
        (["pretrain"], "pretrain: name a dataset"),
        (["finetune", "zheng68k-mini", "model.checkpoint=latest"], "no pretrain artefact of zheng68k-mini"),
        (["evaluate", "zheng68k-mini", "task.checkpoint=/nowhere"], "/nowhere"),
    ],
)
def test_errors_end_with_two_and_say_what_to_change(arguments, said, capsys):
    assert cli.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_errors_are_one_json_object_too(capsys):
    assert cli.main(["plan", "zheng68k-mni", "--json"]) == 2
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["kind"] == "ConfigError" and "zheng68k-mini" in found["error"]


def test_the_plan_lists_all_stages_with_a_reason(capsys):
    assert cli.main(["plan", "zheng68k-mini", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["stage"] for row in rows] == ["preprocess", "pretrain", "finetune", "evaluate"]
    assert {row["reason"] for row in rows} == {f"no {row['stage']} artefact of zheng68k-mini yet" for row in rows}
    assert not any(row["cached"] for row in rows) and len({row["key"] for row in rows}) == 4


def test_the_plan_of_a_study_lists_every_point_and_what_they_share(capsys):
    assert cli.main(["plan", "zheng68k-mini", "few_shot=[50,100]", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["stage"], row["point"]) for row in rows] == [
        ("preprocess", "all points"),
        ("pretrain", "all points"),
        ("finetune", "50 %, seed 1234"),
        ("evaluate", "50 %, seed 1234"),
        ("finetune", "100 %, seed 1234"),
        ("evaluate", "100 %, seed 1234"),
        ("study", "all points"),
    ]
    assert cli.main(["plan", "zheng68k-mini", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["key"] for row in alone] == [rows[at]["key"] for at in (0, 1, 4, 5)]


def test_the_plan_of_unlabelled_cells_has_no_finetuning(mini_h5ad, capsys):
    assert cli.main(["plan", str(mini_h5ad), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["stage"] for row in rows] == ["preprocess", "pretrain", "evaluate"]


def test_a_path_does_not_enter_a_key_but_content_does(mini_h5ad, tmp_path, capsys):
    def keys(path):
        assert cli.main(["plan", str(path), "label=celltype", "--json"]) == 0
        return [row["key"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])]

    copy = tmp_path / "other name.h5ad"
    copy.write_bytes(mini_h5ad.read_bytes())
    assert keys(copy) == keys(mini_h5ad)
    with open(copy, "ab") as stream:
        stream.write(b"\0")
    assert not set(keys(copy)) & set(keys(mini_h5ad))


def test_the_composed_config_is_shown_and_nothing_is_run(tmp_path, capsys):
    import yaml

    assert cli.main(["finetune", "-cn", "fine_tune_train_config", "--cfg", "job", "trainer.learning_rate=0.002"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["learning_rate"] == 0.002 and shown["task"]["kind"] == "train"
    assert not (tmp_path / "workspace").exists()


def test_datasets_say_whether_their_files_are_there(monkeypatch, tmp_path, capsys):
    def state(name):
        assert cli.main(["datasets", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])
        return next(row["state"] for row in rows if row["name"] == name)

    assert state("zheng68k-mini") == "ready"
    assert state("zheng68k") == "set BMFM_TARGETS_ZHENG68K_DATA to the folder that holds h5ad/zheng68k.h5ad"
    monkeypatch.setenv("BMFM_TARGETS_ZHENG68K_DATA", str(tmp_path))
    assert "is missing" in state("zheng68k")
    (tmp_path / "h5ad").mkdir()
    (tmp_path / "h5ad" / "zheng68k.h5ad").write_bytes(b"")
    assert state("zheng68k") == "ready"


def test_the_doctor_reports_what_a_run_would_meet(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "prefect", "cores", "accelerator", "workspace", "writable", "sqlite:///"):
        assert word in shown


def test_inspect_describes_a_file_and_says_how_to_run_it(mini_h5ad, capsys):
    assert cli.main(["data", "inspect", str(mini_h5ad)]) == 0
    shown = capsys.readouterr().out
    assert "700 cells x 765 genes, X (csr)" in shown and "whole numbers, as counts are" in shown
    assert "10 classes: Dendritic (240), CD14+ Monocyte (129)" in shown
    assert f"bmfm run {mini_h5ad} label=celltype" in shown


def test_inspect_of_normalised_values_points_to_the_counts(mini_h5ad, tmp_path, capsys):
    import anndata
    import numpy as np

    cells = anndata.read_h5ad(mini_h5ad)
    cells.layers["raw_counts"] = cells.X.copy()
    cells.X.data = np.log1p(cells.X.data)
    cells.write_h5ad(tmp_path / "logs.h5ad")
    assert cli.main(["data", "inspect", str(tmp_path / "logs.h5ad"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "layer 'raw_counts' holds counts" in found["advice"][0] and found["layers"] == ["raw_counts"]


@pytest.mark.parametrize("name", ["bmfm-targets-scbert", "bmfm-targets-run"])
def test_the_commands_of_bmfm_targets_work_from_any_folder(name, tmp_path):
    """Without the data, they end by saying which variable names it."""
    done = subprocess.run(
        [str(BIN / name), "-cn", "pre_train_config", "-cd", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "BMFM_TARGETS_ZHENG68K_DATA is not set" in done.stderr and "bmfm run zheng68k-mini" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_config_name_is_needed(capsys):
    with pytest.raises(SystemExit):
        cli.seed_main(["-cd", "run"])
    assert "name a config with -cn" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{BIN / 'bmfm'} datasets | head -n 0; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0" and "Traceback" not in done.stderr
