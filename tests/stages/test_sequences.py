"""Sequences of nucleotides through every stage: a folder of tables, a genome to pretrain on, and what is refused."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline import cli
from bmfm_pipeline.data.store import CellStore

TINY = [
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=1",
    "model.intermediate_size=32",
    "data_module.batch_size=32",
]
LETTERS = "data_module.sequences.vocabulary.kind=nucleotide"


def table(n: int, seed: int) -> pd.DataFrame:
    """A motif makes the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    texts = ["".join(rng.choice(list("ACGT"), size=40)) for _ in range(n)]
    texts = [text[:10] + "GATTACAGAT" + text[20:] if label else text for text, label in zip(texts, labels, strict=True)]
    return pd.DataFrame({"sequence": texts, "label": labels})


def write(folder: Path, **changed: pd.DataFrame) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate({"train": 240, "dev": 30, "test": 60}.items()):
        changed.get(split, table(size, seed)).to_csv(folder / f"{split}.csv", index=False)
    return folder


def run(workspace, *words) -> tuple[int, dict, str]:
    """(exit code, the JSON of the last line, what was said on the way)"""
    out, said = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        patch.setenv("BMFM_WORKSPACE", str(workspace))
        code = cli.main([*map(str, words), "--workspace", str(workspace), "--json"])
    return code, json.loads(out.getvalue().splitlines()[-1]), said.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sequences")


@pytest.fixture(scope="module")
def folder(place) -> Path:
    """A folder of tables, two test sequences of which are training sequences, one of them on the other strand."""
    test = table(60, 2)
    train = table(240, 0)
    test.loc[0] = train.loc[0]
    turned = train["sequence"][1][::-1].translate(str.maketrans("ACGT", "TGCA"))
    test.loc[1] = {"sequence": turned, "label": train["label"][1]}
    return write(place / "motifs", test=test)


@pytest.fixture(scope="module")
def artefacts(place, folder) -> dict[str, Path]:
    """Of a fine-tune and its evaluation."""
    words = [LETTERS, "data_module.sequences.reverse_complement=true", "task.max_steps=20"]
    code, trained, _ = run(place / "workspace", "finetune", folder, *TINY, *words)
    assert code == 0, trained
    model = trained["artefacts"]["finetune"]
    code, tested, _ = run(
        place / "workspace", "evaluate", folder, f"task.checkpoint={model}", "evaluation.resamples=50",
        "evaluation.controls=[default,gc_logistic]",
    )  # fmt: skip
    assert code == 0, tested
    return {stage: Path(uri) for stage, uri in {**trained["artefacts"], **tested["artefacts"]}.items()}


def test_the_processed_file_holds_letters_tokens_and_labels(artefacts, folder):
    store = CellStore(artefacts["preprocess"] / "processed.h5ad")
    own = pd.read_csv(folder / "test.csv")
    rows = store.rows_of_split("test", "split")
    assert store.sequences.texts(rows) == own["sequence"].tolist()
    assert store.column("label")[rows].tolist() == own["label"].astype(str).tolist()
    assert store.obs_names[rows][0] == "test_0" and len(store.sequences.tokens) == 330 * 40
    assert (np.diff(store.sequences.other_starts) == 40).all()


def test_anndata_opens_it(artefacts):
    import anndata

    found = anndata.read_h5ad(artefacts["preprocess"] / "processed.h5ad")
    assert found.shape == (330, 0) and set(found.uns["sequences"]) >= {"letters", "tokens", "letter_starts"}


def test_leakage_is_counted_with_examples(artefacts):
    found = json.loads((artefacts["preprocess"] / "leakage.json").read_text())
    assert found["identical"]["test"] == 1 and found["reverse_complement"]["test"] == 1
    assert ["test_0", "train_0", "identical"] in found["examples"]


def test_controls_of_sequences_stand_beside_the_model(artefacts):
    rows = json.loads((artefacts["evaluate"] / "metrics.json").read_text())
    accuracy = {row["model"]: row["value"] for row in rows if row["metric"] == "accuracy"}
    assert set(accuracy) == {"model", "majority", "kmer6_logistic", "gc_logistic"}
    assert accuracy["kmer6_logistic"] > 0.8 > accuracy["majority"]
    assert {"mcc", "f1", "auroc", "auprc"} <= {row["metric"] for row in rows if row["model"] == "model"}
    text = (artefacts["evaluate"] / "report.md").read_text()
    assert "60 test sequences" in text and "leakage: test: 1 identical to, 1 the reverse complement of" in text
    assert not re.search(r"\bcells?\b", text), "sequences are called sequences"
    assert (artefacts["evaluate"] / "report.html").stat().st_size > 10_000


def test_prediction_says_what_the_evaluation_said_and_every_row_has_a_row(artefacts, folder, place, tmp_path):
    own = pd.read_csv(folder / "test.csv")[["sequence"]]
    own.loc[len(own)] = {"sequence": None}
    own.to_csv(tmp_path / "new.csv", index=False)
    code, found, _ = run(
        place / "workspace", "predict", "--model", artefacts["finetune"], "--input", tmp_path / "new.csv", "--output", tmp_path / "out"
    )  # fmt: skip
    assert code == 0, found
    tested = pd.read_parquet(artefacts["evaluate"] / "predictions.parquet")
    made = pd.read_csv(tmp_path / "out" / "predictions.csv", dtype=str, index_col=0)
    assert len(made) == 61 and made["label"].isna().tolist() == [False] * 60 + [True]
    assert made["reason"].iloc[-1] == "the sequence is empty"
    shares = pd.read_csv(tmp_path / "out" / "probabilities.csv", index_col=0)
    column = next(name for name in shares.columns if name.endswith("1"))
    theirs = np.stack(tested["label_probabilities"].to_numpy())[:, 1].astype(float)
    assert shares[column].to_numpy()[:60] == pytest.approx(theirs, abs=2e-3)
    assert made["label"].tolist()[:60] == tested["label_predicted"].astype(str).tolist()


def test_a_model_is_tested_on_other_sequences_and_those_it_has_seen_are_found(artefacts, place, tmp_path):
    other, train = table(60, 7), table(240, 0)
    other.loc[0] = train.loc[0]
    turned = train["sequence"][1][::-1].translate(str.maketrans("ACGT", "TGCA"))
    other.loc[1] = {"sequence": turned, "label": train["label"][1]}
    other.loc[2] = {"sequence": "", "label": 0}
    other["active"] = other.pop("label").astype(float)
    other.to_csv(tmp_path / "other.csv", index=False)
    words = ["evaluate", tmp_path / "other.csv", "label=active", f"task.checkpoint={artefacts['finetune']}"]
    code, found, _ = run(place / "workspace", *words)
    assert code == 2 and "2 of 59 test cells" in found["error"] and "seq_0, seq_1" in found["error"]
    code, tested, _ = run(place / "workspace", *words, "evaluation.seen_cells=drop", "evaluation.resamples=50")
    assert code == 0, tested
    folder = Path(tested["artefacts"]["evaluate"])
    rows = json.loads((folder / "metrics.json").read_text())
    accuracy = {row["model"]: row["value"] for row in rows if row["metric"] == "accuracy"}
    assert set(accuracy) == {"model", "majority", "kmer6_logistic"} and accuracy["kmer6_logistic"] > 0.8
    said = pd.read_parquet(folder / "predictions.parquet")
    assert len(said) == 57 and {row["split"] for row in rows} == {"held-out"}
    run(
        place / "workspace", "predict", "--model", artefacts["finetune"], "--input", tmp_path / "other.csv", "--output", tmp_path / "out"
    )  # fmt: skip
    made = pd.read_csv(tmp_path / "out" / "predictions.csv", dtype=str, index_col=0)
    assert made["label"][3:].tolist() == said["label_predicted"].astype(str).tolist()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert any("1 sequences are empty" in note for note in evaluation["notes"])


def test_data_without_labels_or_of_cells_are_not_tested(artefacts, place, tmp_path):
    (tmp_path / "genome.fa").write_text(">a\nACGTACGT\n")
    words = [f"task.checkpoint={artefacts['finetune']}"]
    code, found, _ = run(place / "workspace", "evaluate", tmp_path / "genome.fa", *words)
    assert code == 2 and "a FASTA file has no labels" in found["error"]
    code, found, _ = run(place / "workspace", "evaluate", "zheng68k-mini", *words)
    assert code == 2 and "the model reads sequences, and the data hold cells" in found["error"]


def test_a_layer_or_a_copy_of_the_input_is_refused(artefacts, folder, place, tmp_path):
    for words, said in ((["--layer", "counts"], "sequences have no layers"), (["--h5ad", "a.h5ad"], "holds sequences")):
        code, found, _ = run(
            place / "workspace", "predict", "--model", artefacts["finetune"], "--input", folder, "--output", tmp_path / "o", *words
        )  # fmt: skip
        assert code == 2 and said in found["error"]


def test_a_genome_is_pretrained_on_and_hands_its_pieces_to_the_task(place, folder, tmp_path):
    rng = np.random.default_rng(0)
    genome = tmp_path / "genome.fa"
    genome.write_text("".join(f">chr{number}\n{''.join(rng.choice(list('ACGT'), size=4000))}\n" for number in (1, 2)))
    words = [
        *TINY,
        "task.max_steps=4",
        "data_module.sequences.vocabulary.kind=kmer",
        "data_module.sequences.vocabulary.k=3",
    ]
    code, found, _ = run(
        place / "workspace", "pretrain", genome, *words, "data_module.sequences.windows.size=100",
        "data_module.sequences.windows.test=[chr2]",
    )  # fmt: skip
    assert code == 0, found
    split = pd.read_csv(Path(found["artefacts"]["preprocess"]) / "split.csv")
    assert split["split"].value_counts().to_dict() == {"train": 40, "test": 40}
    code, trained, said = run(
        place / "workspace", "finetune", folder, *TINY, "preset=laptop", "task.max_steps=2", "model.convolution_layers=0", "model.position_embedding_type=null",
        f"model.checkpoint={found['artefacts']['pretrain']}",
    )  # fmt: skip
    assert code == 0, trained
    assert "no linear path, for the checkpoint reads pieces of sequences" in said
    pieces = [Path(folder) / "tokenizers" / "dna_chunks" / "tokenizer.json" for folder in (found["artefacts"]["pretrain"], trained["artefacts"]["finetune"])]  # fmt: skip
    assert pieces[0].read_bytes() == pieces[1].read_bytes()


def test_variants_of_a_population_are_written_into_the_windows_of_a_genome(tmp_path):
    rng = np.random.default_rng(0)
    letters = rng.choice(list("ACGT"), size=30_000)
    genome, known = tmp_path / "genome.fa", tmp_path / "known.vcf"
    genome.write_text(f">chr1\n{''.join(letters)}\n")
    lines = [f"1\t{at + 1}\t.\t{letters[at]}\t{'ACGT'.replace(letters[at], '')[0]}" for at in range(10, 30_000, 100)]
    known.write_text("\n".join([*lines, "2\t5\t.\tA\tC", ""]))
    windows = "data_module.sequences.windows"
    words = [
        "preprocess",
        genome,
        f"{windows}.size=100",
        f"{windows}.variants={known}",
        "data_module.sequences.vocabulary.size=60",
    ]
    code, found, said = run(tmp_path / "workspace", *words)
    assert code == 0, found
    assert "1 lie on chromosomes that the genome does not have" in said
    folder = Path(found["artefacts"]["preprocess"])
    check = json.loads((folder / "report.json").read_text())["check"]
    assert check["variants_places"] == check["letters_variants"] == 300 and check["letters_ambiguous"] == 0
    assert json.loads((folder / "report.json").read_text())["unknown_pieces"] == 0
    pieces = json.loads((folder / "tokenizers" / "dna_chunks" / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(check["alleles"]) <= set(pieces) and len(check["alleles"]) == 4
    known.write_text("\n".join([*lines[1:], ""]))
    code, other, _ = run(tmp_path / "workspace", *words)
    assert code == 0 and other["artefacts"]["preprocess"] != found["artefacts"]["preprocess"]
    code, refused, _ = run(tmp_path / "workspace", *words, "data_module.sequences.vocabulary.kind=kmer")
    assert code == 2 and "no room for pairs of alleles" in refused["error"]
    code, refused, _ = run(
        tmp_path / "workspace", "preprocess", write(tmp_path / "data"), f"{windows}.variants={known}"
    )
    assert code == 2 and "is for windows of a genome" in refused["error"]


@pytest.mark.parametrize(
    ("changed", "words", "says"),
    [
        ({"test": table(60, 0).assign(sequence=table(240, 0)["sequence"][:60])}, ["data_module.sequences.leakage=refuse"], "leakage"),
        ({"train": table(240, 0).assign(sequence="")}, [], "are empty"),
        ({"train": table(240, 0).assign(label=np.linspace(0, 1, 240))}, [], "numbers need is_regression_label"),
        ({}, ["label=nothing"], "no column 'nothing' for a label; columns are label"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_refused(tmp_path, changed, words, says):
    folder = write(tmp_path / "data", **changed)
    code, found, _ = run(tmp_path / "workspace", "preprocess", folder, *words)
    assert code == 2 and says in found["error"]


def test_numbers_are_a_label_too(tmp_path):
    numbers = {split: table(size, seed).assign(label=lambda rows: rows["label"] * 2.5) for seed, (split, size) in enumerate({"train": 60, "dev": 10, "test": 20}.items())}  # fmt: skip
    folder = write(tmp_path / "data", **numbers)
    code, found, _ = run(
        tmp_path / "workspace", "preprocess", folder, LETTERS, "++label_columns=[{label_column_name: label, is_regression_label: true}]"
    )  # fmt: skip
    assert code == 0, found
    store = CellStore(Path(found["artefacts"]["preprocess"]) / "processed.h5ad")
    assert sorted({float(value) for value in store.column("label")}) == [0.0, 2.5]
