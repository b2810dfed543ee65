"""`bmfm datasets`: the list, one entry, a download from a web server, and datasets of one's own."""

import json

import anndata
import pytest
import yaml
from tenx_files import LABELS, counts_of, files_of, label_lines, tar_of
from web_server import serving

from bmfm_pipeline import cli
from bmfm_pipeline.storage import downloads

COUNTS = counts_of()


def ask(capsys, *words):
    """(exit code, what the last line of stdout says, stderr) of `bmfm ... --json`."""
    code = cli.main([*map(str, words), "--json"])
    shown = capsys.readouterr()
    return code, json.loads(shown.out.splitlines()[-1]), shown.err


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(name, **keys): write a dataset of one's own into a folder that BMFM_DATASETS names."""
    folder = tmp_path / "my datasets"
    folder.mkdir()
    monkeypatch.setenv("BMFM_DATASETS", str(folder))

    def write(name="mine", **keys):
        entry = {
            "name": name,
            "title": "Cells of mine",
            "label_columns": [{"label_column_name": "celltype", "is_stratification_label": True}],
            "transforms": [{"transform_name": "LogTransform", "transform_args": {"base": 2}}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(entry | keys))
        return folder

    return write


def test_the_list_names_size_labels_state_and_how_to_get_each(capsys):
    code, rows, _ = ask(capsys, "datasets")
    found = {row["name"]: row for row in rows}
    assert code == 0 and {"zheng68k", "scp1884", "hbones", "pancreascross", "multiple_sclerosis", "myeloid"} <= set(
        found
    )
    assert found["zheng68k"]["get"] == "bmfm datasets download zheng68k"
    assert (found["zheng68k"]["cells"], found["zheng68k"]["genes"]) == (68579, 32738)
    assert found["zheng68k-mini"]["state"] == "ready" and found["zheng68k-mini"]["get"] == ""
    assert found["hbones"]["get"].startswith("by hand, from https://")
    assert cli.main(["datasets"]) == 0
    shown = capsys.readouterr().out
    assert "68,579" in shown and "get it: bmfm datasets download zheng68k" in shown


def test_one_dataset_is_shown_in_full(capsys):
    assert cli.main(["datasets", "show", "myeloid"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "as obs['split_cross'] says",
        "NormalizeTotal(target_sum=10000.0",
        "Cell 184:792",
        "bmfm run myeloid",
    ):
        assert words in shown
    _, found, _ = ask(capsys, "datasets", "show", "zheng68k")
    assert found["source"]["download"]["files"]["labels"]["sha256"] and len(found["expected_labels"]["celltype"]) == 11


def test_a_variable_may_name_a_bucket(monkeypatch, capsys):
    monkeypatch.setenv("BMFM_TARGETS_ZHENG68K_DATA", "s3://bucket/data")
    _, rows, _ = ask(capsys, "datasets")
    found = next(row for row in rows if row["name"] == "zheng68k")
    assert (found["state"], found["get"]) == ("at s3://bucket/data/h5ad/zheng68k.h5ad", "")
    assert cli.main(["datasets", "download", "zheng68k"]) == 2
    assert "a download goes to a local folder: add --to FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show"], "name a dataset: bmfm datasets show NAME"),
        (["show", "zheng68"], "did you mean 'zheng68k'?"),
        (["list", "zheng68k"], "bmfm datasets show zheng68k"),
        (["download", "zheng68k-mini"], "needs no download"),
        (["download", "hbones"], "fetched by hand"),
        (["show", "zheng68k", "--to", "x"], "belong to `bmfm datasets download NAME`"),
        (["download", "zheng68k", "--url", "matrix"], "write it as --url FILE=VALUE"),
    ],
)
def test_a_wrong_word_is_answered(words, said, capsys):
    assert cli.main(["datasets", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_dataset_is_downloaded_and_then_found_without_a_variable(own, tmp_path, monkeypatch, capsys):
    """As with zheng68k: the error offers the download, the download says what is next, and then the plan works."""
    monkeypatch.setattr(downloads, "BACKOFF", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as site:
        files = {
            "matrix": {"url": site.put("/m.tar.gz", tar_of(files_of(COUNTS)), cuts=[200])},
            "labels": {"url": site.put("/l.txt", label_lines())},
        }
        download = {"format": "tenx_labels", "label_column": "celltype", "files": files}
        source = {"env": "BMFM_TARGETS_MINE_DATA", "file": "h5ad/mine.h5ad", "download": download}
        own(source=source, cells=30, expected_labels={"celltype": list(LABELS)})
        assert cli.main(["plan", "mine"]) == 2
        assert "`bmfm datasets download mine` fetches it from the web" in capsys.readouterr().err
        monkeypatch.setenv("BMFM_TARGETS_MINE_DATA", str(tmp_path / "elsewhere"))
        assert cli.main(["plan", "mine"]) == 2
        assert f"`bmfm datasets download mine --to {tmp_path / 'elsewhere'}`" in capsys.readouterr().err
        monkeypatch.delenv("BMFM_TARGETS_MINE_DATA")
        assert cli.main(["datasets", "download", "mine"]) == 0
        shown = capsys.readouterr()
        assert "30 cells x 12 genes" in shown.out and shown.out.endswith("next: bmfm run mine\n")
        assert "export" not in shown.out
        assert cli.main(["datasets", "download", "mine", "--to", str(tmp_path / "b")]) == 0
        assert f"next: export BMFM_TARGETS_MINE_DATA={tmp_path / 'b'}\n" in capsys.readouterr().out
    code, rows, _ = ask(capsys, "plan", "mine")
    assert code == 0 and rows[0]["stage"] == "preprocess"
    cells = anndata.read_h5ad(tmp_path / "data-home" / "mine" / "h5ad" / "mine.h5ad")
    assert (cells.X.toarray() == COUNTS).all()


def test_a_file_of_ones_own_is_a_dataset_by_name(own, mini_h5ad, capsys):
    folder = own(source={"file": "cells.h5ad"}, split_column_name=None)
    assert cli.main(["plan", "mine"]) == 2
    assert f"{folder}/cells.h5ad: no such file" in capsys.readouterr().err
    (folder / "cells.h5ad").symlink_to(mini_h5ad)
    code, rows, _ = ask(capsys, "plan", "mine")
    assert code == 0 and "no preprocess artefact of mine yet" in rows[0]["reason"]
    _, found, _ = ask(capsys, "datasets")
    assert next(row for row in found if row["name"] == "mine")["state"] == "ready"


def test_what_an_entry_says_of_split_and_values_reaches_the_run(own, mini_h5ad):
    from bmfm_pipeline import compose

    own(source={"file": str(mini_h5ad)}, split_column_name="fold", input_values="any")
    settings = compose("fine_tune_train_config", ["dataset=mine"]).data_module.transform_kwargs
    assert settings.split_column_name == "fold" and settings.input_values == "any"
    assert settings.source_h5ad_file_name == str(mini_h5ad)
    for word, column in (
        ("split_column_name=other", "other"),
        ("split_column_name=null", None),
        ("split.method=random", None),
    ):
        words = [
            "dataset=mine",
            f"data_module.transform_kwargs.{word}",
            "data_module.transform_kwargs.input_values=counts",
        ]
        settings = compose("fine_tune_train_config", words).data_module.transform_kwargs
        assert settings.split_column_name == column and settings.input_values == "counts"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"source": {"file": "a.h5ad"}, "nam": 1}, "unknown key 'nam'; did you mean 'name'?"),
        ({"source": {"file": "a.h5ad", "builder": "zheng68k_mini"}}, "give either `file`"),
        ({"source": {"env": "A"}}, "give either `file`"),
        ({"source": {"file": "a.h5ad", "download": {"format": "h5ad", "files": {"x": {"url": "u"}}}}}, "needs files h5ad; found x"),
        ({"source": {"file": "s3://b/a.h5ad", "download": {"format": "h5ad", "files": {"h5ad": {"url": "u"}}}}}, "goes to a local file"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_refused_by_its_file(own, keys, said, capsys):
    folder = own(**keys)
    assert cli.main(["datasets"]) == 2
    shown = capsys.readouterr().err
    assert str(folder / "mine.yaml") in shown and said in shown


def test_names_are_the_names_of_files_and_given_once(own, tmp_path, monkeypatch, capsys):
    folder = own("zheng68k", source={"file": "a.h5ad"})
    assert cli.main(["datasets"]) == 2
    assert "a dataset 'zheng68k' is there already" in capsys.readouterr().err
    (folder / "zheng68k.yaml").rename(folder / "other.yaml")
    assert cli.main(["datasets"]) == 2
    assert "name is 'zheng68k', but the file is called other.yaml" in capsys.readouterr().err
    (folder / "other.yaml").write_text("name: [")
    assert cli.main(["datasets"]) == 2
    assert "other.yaml, line" in capsys.readouterr().err
    monkeypatch.setenv("BMFM_DATASETS", str(tmp_path / "nowhere"))
    assert cli.main(["datasets"]) == 2
    assert "is no folder" in capsys.readouterr().err
