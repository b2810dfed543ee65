"""Tables of sequences: folders, separators, ids, and what is refused."""

import gzip

import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline.data.sequences import clean, open_sequences
from bmfm_pipeline.data.sequences.cleaning import class_texts
from bmfm_pipeline.errors import DataError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def texts_of(source):
    found = []
    for first, letters, starts in source.blocks():
        assert first == len(found)
        found += clean(letters, starts).texts()
    return found


def test_a_folder_is_one_table_with_a_split(tmp_path):
    write(tmp_path / "train.csv", "sequence,label\nACGT,1\nGGGA,0\n")
    write(tmp_path / "valid.tsv", "sequence\tlabel\nTTTT\t1\n")
    with gzip.open(tmp_path / "test.csv.gz", "wt") as file:
        file.write("sequence,label\nCCCC,0\n")
    source = open_sequences(tmp_path)
    assert source.obs.index.tolist() == ["train_0", "train_1", "dev_0", "test_0"]
    assert source.obs["split"].tolist() == ["train", "train", "dev", "test"]
    assert source.obs["label"].tolist() == ["1", "0", "1", "0"]
    assert texts_of(source) == ["ACGT", "GGGA", "TTTT", "CCCC"]
    assert source.sizes == {"train": 2, "dev": 1, "test": 1}


def test_the_first_column_holds_the_sequences_whatever_its_name(tmp_path):
    source = open_sequences(write(tmp_path / "a.csv", 'dna,y\n"AC",0.5\nGG,1.5\n'))
    assert source.column == "dna" and texts_of(source) == ["AC", "GG"]
    other = open_sequences(write(tmp_path / "b.csv", "y,bases\n0,AC\n1,GG\n"), column="bases")
    assert texts_of(other) == ["AC", "GG"] and other.obs.columns.tolist() == ["y"]


def test_ids_of_the_table_are_kept_and_told_apart_by_file(tmp_path):
    write(tmp_path / "train.csv", "sequence,seq_id,label\nAC,x1,0\nAG,x2,1\n")
    write(tmp_path / "test.csv", "sequence,seq_id,label\nAC,x1,0\n")
    assert open_sequences(tmp_path, labels=["label"]).obs.index.tolist() == ["train_x1", "train_x2", "test_x1"]


def test_parquet_reads_as_csv_does(tmp_path):
    table = pd.DataFrame({"sequence": ["ACGT", None, "GG"], "label": [0, 1, 1]})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    one, other = open_sequences(tmp_path / "a.parquet"), open_sequences(tmp_path / "a.csv")
    assert texts_of(one) == texts_of(other) == ["ACGT", "", "GG"]
    assert class_texts(one.obs["label"]).tolist() == class_texts(other.obs["label"]).tolist() == ["0", "1", "1"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "sequence\tlabel\nAC\t1\n", "separated by tabs"),
        ("a.csv", "sequence;label\nAC;1\n", "separated by semicolons"),
        ("a.tsv", "sequence,label\nAC,1\n", "separated by commas"),
        ("a.csv", "", "is empty"),
        ("a.csv", "sequence,label\n", "no rows"),
        ("a.csv", "sequence,label\nAC,1\nGG,1,7\n", "as many columns as the header"),
        ("a.csv", "ACGTACGTACGTACGTACGT,1\nACGT,0\n", "a first line with names"),
        ("a.csv", "sequence,label,label\nAC,1,1\n", "twice"),
        ("a.csv", "sequence,seq_id\nAC,x\nGG,x\n", "ids are there twice"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, name, text, says):
    with pytest.raises(DataError, match=says):
        open_sequences(write(tmp_path / name, text), labels=[])


def test_columns_that_are_not_there_are_named_with_those_that_are(tmp_path):
    write(tmp_path / "train.csv", "sequence,label\nAC,1\n")
    write(tmp_path / "test.csv", "sequence\nAC\n")
    with pytest.raises(DataError, match=r"test.csv: has no column 'label'; it has sequence"):
        open_sequences(tmp_path)
    with pytest.raises(DataError, match="did you mean 'sequence'"):
        open_sequences(tmp_path / "train.csv", column="sequense")
    with pytest.raises(DataError, match="holds no train, dev or test"):
        open_sequences(write(tmp_path / "other" / "notes.md", "x").parent)
    write(tmp_path / "train.tsv", "sequence\tlabel\nAC\t1\n")
    with pytest.raises(DataError, match="are all train"):
        open_sequences(tmp_path)


def test_classes_written_as_numbers_have_one_name():
    assert class_texts(pd.Series(["0.0", "1", None, "1.0"])).tolist() == ["0", "1", None, "1"]
    assert class_texts(pd.Series(["0.5", "1"])).tolist() == ["0.5", "1"]
    assert class_texts(pd.Series([0.0, 1.0, np.nan])).tolist()[:2] == ["0", "1"]
