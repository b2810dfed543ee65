"""Fine-tuning with adapters to the end, and the folder that is shared: complete, honest, and silent about this machine."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bmfm_pipeline import cli
from bmfm_pipeline.errors import CheckpointError, ConfigError, DataError, StorageError
from bmfm_pipeline.models import load_model
from bmfm_pipeline.stages.exporting import export_folder
from bmfm_pipeline.stages.predict import predict_file
from bmfm_pipeline.storage import read_json, without_places
from bmfm_pipeline.training.model_card import CARD

pytestmark = pytest.mark.slow
SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(scope="module")
def adapted(finished) -> dict[str, str]:
    """Artefacts of a fine-tune with adapters, started from the pretrained model of the chain, and of its evaluation."""
    words = [
        "task.max_steps=25",
        "trainer.learning_rate=0.02",
        "trainer.lora_config=default",
        "model.gradient_checkpointing=true",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BMFM_WORKSPACE", finished.workspace)
        model = _stage(finished, "finetune", *words, f"model.checkpoint={finished.artefacts['pretrain']}")
        test = _stage(finished, "evaluate", f"task.checkpoint={model}")
    return {"model": model, "evaluation": test}


def _stage(chain, stage: str, *words: str) -> str:
    sizes = ["data_module.max_length=128", "data_module.batch_size=32"] if stage == "finetune" else []
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        options = ["--workspace", chain.workspace, "--json"]
        assert cli.main([stage, str(chain.file), "label=celltype", *sizes, *words, *options]) == 0
    return json.loads(out.getvalue().splitlines()[-1])["artefacts"][stage]


@pytest.fixture(scope="module")
def shared(finished, adapted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        found = export_folder(adapted["model"], folder, license="apache-2.0", workspace=finished.workspace)
    assert found["evaluation"] == adapted["evaluation"]  # found in the workspace
    return folder


IDS = torch.stack([torch.arange(5, 45), torch.arange(5, 45) % 8 + 5]).unsqueeze(0)


def test_the_folder_loads_with_auto_classes_in_a_process_that_knows_nothing_else(adapted, shared, tmp_path):
    program = (
        "import sys, torch, bmfm_pipeline.models\nfrom transformers import AutoConfig, AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\nids = torch.load(sys.argv[2])\n"
        "with torch.no_grad():\n    torch.save(model(ids).logits, sys.argv[3])\n"
        "assert 'peft' not in sys.modules and AutoConfig.from_pretrained(sys.argv[1]).architectures == ['SCBertForMultitask']\n"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", program, shared, tmp_path / "ids.pt", tmp_path / "logits.pt"], check=True)
    found = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        expected = load_model(adapted["model"])(IDS).logits
    assert list(found) == list(expected) == ["celltype"]
    # To rounding: where weights lie in memory decides how a processor adds them up.
    assert torch.allclose(found["celltype"], expected["celltype"], rtol=0, atol=1e-6)


def test_the_folder_is_complete_and_predicts_like_the_artefact(finished, adapted, shared, tmp_path):
    names = {path.name for path in shared.iterdir()}
    assert names == {
        "README.md", "adapter", "bmfm.json", "calibration.json", "config.json", "label_dict.json", "metrics.json", "model.safetensors",
        "preprocessing.json", "tokenizers", "training.json", "transforms.json",
    }  # fmt: skip
    tables = []
    for name, model in (("artefact", adapted["model"]), ("folder", shared)):
        predict_file(str(model), str(finished.file), tmp_path / name, workspace=finished.workspace)
        tables.append(pd.read_csv(tmp_path / name / "probabilities.csv", index_col=0))
    assert np.array_equal(tables[0], tables[1])


def test_nothing_in_it_tells_a_place_or_a_secret(finished, shared):
    told = (SECRET, str(finished.workspace), str(Path(finished.file).parent), "/tmp/", str(Path.home()))
    for file in shared.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [word for word in told if word.encode() in content], file


def test_the_card_has_the_numbers_of_the_test_beside_their_controls(adapted, shared):
    from huggingface_hub import ModelCard

    card = ModelCard.load(shared / CARD)
    rows = read_json(Path(adapted["evaluation"]) / "metrics.json")
    own = {row["metric"]: row for row in rows if row["model"] == "model" and row["value"] is not None}
    assert card.data.license == "apache-2.0" and card.data.library_name == "bmfm_pipeline"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        metric: row["value"] for metric, row in own.items()
    }
    result = card.data.eval_results[0]
    assert (result.dataset_split, result.metric_args["n"]) == ("test", 140)
    assert result.metric_args["ci_low"] <= result.metric_value <= result.metric_args["ci_high"]
    text = card.text
    for words in (
        "on 140 test cells, beside controls on the same cells; in brackets 95 % intervals (bootstrap_quantiles)",
        "| metric | this model | commonest class | logistic regression (L2) |",
        "the model is worse than logistic regression",
        "train 504, dev 56, test 140 cells; split by cell, balanced over celltype, seed 1234",
        "started from a pretrain model",
        "DoRA of rank 16",
        "cross_entropy on celltype",
        "Validation on 56 cells",
        "`CD4+/CD25 T Reg`",
    ):
        assert words in text, words
    evaluated = (Path(adapted["evaluation"]) / CARD).read_text()
    assert "logistic regression (L2)" in evaluated and "license" not in evaluated.split("---")[1]


def test_a_model_that_was_not_tested_says_so_and_shows_its_validation(finished, tmp_path):
    from huggingface_hub import ModelCard

    found = export_folder(finished.artefacts["pretrain"], tmp_path / "model", name="mine", workspace=finished.workspace)
    card = ModelCard.load(tmp_path / "model" / CARD)
    assert found["evaluation"] is None and "Not tested" in card.text and card.text.lstrip().startswith("# mine")
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert "it knows no labels" in card.text and "from scratch" in card.text
    assert (Path(finished.artefacts["pretrain"]) / CARD).read_text().splitlines()[0] == "---"


def test_what_cannot_be_shared_is_refused(finished, adapted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    model, other = finished.artefacts["finetune"], adapted["evaluation"]
    for options, kind, message in (
        ({"model": model, "output": tmp_path / "full"}, StorageError, "is there already and not empty"),
        ({"model": model, "output": tmp_path / "a", "evaluation": other}, DataError, "tests another model"),
        ({"model": model, "output": tmp_path / "a", "evaluation": model}, DataError, "not an evaluation"),
        ({"model": other, "output": tmp_path / "a"}, CheckpointError, "is a evaluate artefact, not a model"),
        ({"model": model, "output": tmp_path / "a", "license": "My own"}, ConfigError, "short name in small letters"),
    ):
        with pytest.raises(kind, match=message):
            export_folder(**options, workspace=finished.workspace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (tmp_path / "full" / "a.txt").read_text() == "mine"


def test_the_folder_can_be_uploaded(shared, tmp_path):
    from hub_server import HubServer
    from huggingface_hub import HfApi

    server = HubServer(tmp_path)
    try:
        HfApi(endpoint=server.url, token="none").upload_folder(repo_id="org/name", folder_path=shared)
    finally:
        server.stop()
    sent, kept = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (shared, tmp_path)
    )
    assert sent == kept and server.cards == [(shared / CARD).read_text()]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/a.h5ad", "a.h5ad"),
        ("s3://key:word@bucket/folder/a.h5ad", "a.h5ad"),
        ("~/vectors.txt", "vectors.txt"),
        ("C:\\data\\a.h5ad", "a.h5ad"),
        ("see /data/a.h5ad: no X (from s3://bucket/b)", "see a.h5ad: no X (from b)"),
        ("CD4+/CD25 T Reg", "CD4+/CD25 T Reg"),
        ("data/a.h5ad", "data/a.h5ad"),
        ("1 / 2", "1 / 2"),
    ],
)
def test_of_a_place_the_last_part_is_left(text, left):
    assert without_places({"a": [text, 1, None]}) == {"a": [left, 1, None]}
