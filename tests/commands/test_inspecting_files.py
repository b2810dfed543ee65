"""`bmfm data inspect`: one screen with the next command last, on files, artefacts, remote files, and what is no h5ad at all."""

import gzip
from pathlib import Path

import h5py
import pytest

from bmfm_pipeline import cli


def screen(capsys, *words) -> list[str]:
    assert cli.main(["data", "inspect", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def refusal(capsys, path) -> str:
    assert cli.main(["data", "inspect", str(path)]) == 2
    return capsys.readouterr().err


def test_one_screen_with_the_next_command_last(mini_h5ad, capsys):
    lines = screen(capsys, mini_h5ad)
    shown = "\n".join(lines)
    assert len(lines) < 25
    for words in (
        "X          whole numbers, as counts are; 1 to ",
        "csr, float32, int32 indices, not compressed",
        "human gene symbols",
        "label    celltype",
        "would keep 700 of 700 cells, 765 of 765 genes and 100.0% of counts",
        "counts (median; ",
    ):
        assert words in shown
    assert lines[-1] == f"run it: bmfm run {mini_h5ad} label=celltype"


def test_the_packaged_file_of_an_old_anndata_is_described(capsys):
    from bmfm_pipeline.data.sources.zheng68k_mini import packaged_file

    shown = "\n".join(screen(capsys, packaged_file()))
    assert (
        "X          not counts: values below zero" in shown and "raw.X      not whole numbers: log-normalised" in shown
    )
    assert "bulk_labels" in shown and "mend the file" in shown


def test_real_files(data_dir, capsys):
    shown = "\n".join(screen(capsys, data_dir / "onek1k" / "onek1k_7811x1000_counts.h5ad"))
    for words in (
        "human Ensembl ids (100%)",
        "group    indiv",
        "split.group=indiv",
        "gene_names.table=hgnc",
        "label=cell_type",
    ):
        assert words in shown
    shown = "\n".join(screen(capsys, data_dir / "sciplex3" / "sciplex3.h5ad"))
    assert "not whole numbers: log-normalised" in shown and "split    split_random" in shown and "more: " in shown


def test_a_preprocess_artefact_is_known_for_what_it_is(mini_h5ad, capsys, tmp_path):
    import numpy as np

    from bmfm_pipeline.config.catalogue import default_transforms
    from bmfm_pipeline.data.sources import open_source
    from bmfm_pipeline.data.transforms import build_chain
    from bmfm_pipeline.storage import Workspace, publish

    staging = tmp_path / "staging"
    staging.mkdir()
    split = np.array([("train", "dev", "test")[index % 3] for index in range(700)])
    build_chain(default_transforms()).run(open_source(mini_h5ad), None, staging / "processed.h5ad", {"split": split})
    place = Workspace(tmp_path / "workspace")
    folder = publish(staging, place, "preprocess", "0" * 64, inputs={}, config={}, code_version="1", summary={}).uri
    lines = screen(capsys, folder)
    assert lines[1] == f"preprocess artefact {folder}" and lines[2].startswith(
        "X          bins that preprocessing made; "
    )
    assert "layers/counts whole numbers" in "\n".join(lines) and " counts (median; " in "\n".join(lines)
    assert "would keep" not in "\n".join(lines)
    command = lines[-1].removeprefix("run it: bmfm ").split()
    assert command[0] == "pretrain" and f"processed_data_source={folder}/processed.h5ad" in command[-1]
    assert cli.main([*command, "--cfg", "job"]) == 0
    assert "transform_datasets: false" in capsys.readouterr().out


def test_a_file_behind_a_remote_address_is_named_by_it(mini_h5ad, capsys, monkeypatch, tmp_path):
    import fsspec

    monkeypatch.setenv("BMFM_CACHE_DIR", str(tmp_path / "cache"))
    with fsspec.open("memory://cells/mini.h5ad", "wb") as stream:
        stream.write(mini_h5ad.read_bytes())
    lines = screen(capsys, "memory://cells/mini.h5ad", "--quick")
    assert lines[0].startswith("memory://cells/mini.h5ad: 700 cells x 765 genes")
    assert lines[-1] == "run it: bmfm run memory://cells/mini.h5ad label=celltype"


def test_a_name_with_spaces_is_quoted(mini_h5ad, capsys, tmp_path):
    path = tmp_path / "my cells.h5ad"
    path.write_bytes(mini_h5ad.read_bytes())
    assert screen(capsys, path, "--quick")[-1] == f"run it: bmfm run '{path}' label=celltype"


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_cut_file_says_how_much_is_there(mini_h5ad, capsys, tmp_path, share):
    whole = mini_h5ad.read_bytes()
    path = tmp_path / "cut.h5ad"
    path.write_bytes(whole[: int(share * len(whole))])
    assert f"is cut short: {int(share * len(whole)):,} of {len(whole):,} bytes are there; fetch it again" in refusal(
        capsys, path
    )


def _tenx(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name in ("barcodes", "data", "indices"):
            file[f"matrix/{name}"] = [1]


def _loom(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = [[1]]
        file.create_group("row_attrs"), file.create_group("col_attrs")


def _mudata(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("mod/rna")


STRANGERS = {
    "nothing": (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 100)), "is gzipped: unpack it first, `gunzip "),
    "zip": (lambda path: path.write_bytes(b"PK\x03\x04" + b"x" * 100), "is a zip archive"),
    "page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>"), "is a page of a website"),
    "pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    "text": (lambda path: path.write_bytes(b"gene,cell1,cell2\n"), "is not a readable h5ad (HDF5) file"),
    "10x": (_tenx, "is a .h5 file by what it holds, and an h5ad by its name; rename it to end in .h5"),
    "loom": (_loom, "is a .loom file by what it holds"),
    "mudata": (_mudata, "is a .h5mu file by what it holds"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_no_h5ad_is_named(name, capsys, tmp_path):
    write, said = STRANGERS[name]
    write(tmp_path / "cells.h5ad")
    assert said in refusal(capsys, tmp_path / "cells.h5ad")


def test_a_table_is_read_as_what_it_holds(capsys, tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text(
        "cell,celltype,ACTB,CD3D,CD19\n" + "".join(f"c{row},{'TB'[row % 2]},{row},1,0\n" for row in range(8))
    )
    lines = screen(capsys, path)
    assert lines[0].startswith(f"{path}: 8 cells x 3 genes")
    assert (
        lines[1]
        == "read as    table; rows are cells, by the names of the columns; columns that describe cells: celltype"
    )
    assert lines[-1] == f"run it: bmfm run {path} label=celltype"


def test_a_folder_of_files_is_one_dataset(mini_h5ad, capsys, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.h5ad").write_bytes(mini_h5ad.read_bytes())
    (tmp_path / "c.h5ad").write_bytes(mini_h5ad.read_bytes()[:2000])
    lines = screen(capsys, tmp_path)
    assert lines[0] == f"{tmp_path}: 3 files, 1,400 cells, 765 gene names in all, 765 in every file"
    assert lines[1].split()[:5] == ["a", "h5ad", "700", "cells", "x"] and lines[3].split()[1:] == [
        "cannot",
        "be",
        "read",
    ]
    assert any("700 cell names are in several files" in line for line in lines)
    assert lines[-1] == f"run it: bmfm run {tmp_path} data_module.transform_kwargs.cell_names=prefix"


def test_a_folder_is_no_file(capsys, tmp_path):
    assert "is a folder and no artefact" in refusal(capsys, tmp_path)
    assert "no such file" in refusal(capsys, tmp_path / "nowhere.h5ad")
