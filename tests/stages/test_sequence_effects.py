"""What changes of sequences do to a model's answers, and which bases they come from: one small model that has learned a motif."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_sequences import run

MOTIF, AT = "GATTACAGAT", 10
LEARNS_IT = [
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=1", "model.intermediate_size=32",
    "++model.classifier_pooling=max", "++model.convolution_layers=1", "data_module.batch_size=32", "task.max_steps=40",
    "trainer.learning_rate=0.02", "trainer.warmup_steps=2", "data_module.sequences.vocabulary.kind=nucleotide",
]  # fmt: skip


def motifs(n: int, seed: int) -> pd.DataFrame:
    """The motif in the middle makes the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    texts = ["".join(rng.choice(list("ACGT"), size=40)) for _ in range(n)]
    texts = [text[:AT] + MOTIF + text[20:] if label else text for text, label in zip(texts, labels, strict=True)]
    return pd.DataFrame({"sequence": texts, "label": labels})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("effects")


@pytest.fixture(scope="module")
def model(place) -> str:
    folder = place / "motifs"
    folder.mkdir()
    for seed, (split, size) in enumerate({"train": 240, "dev": 30, "test": 40}.items()):
        motifs(size, seed).to_csv(folder / f"{split}.csv", index=False)
    code, trained, said = run(place / "workspace", "finetune", folder, *LEARNS_IT)
    assert code == 0, said
    return trained["model"]


def predict(place: Path, model: str, file: Path, output: Path, *words) -> tuple[dict, str]:
    code, found, said = run(
        place / "workspace", "predict", "--model", model, "--input", file, "--output", output, *words
    )
    assert code == 0, found
    return found, said


def refused(place: Path, model: str, file: Path, output: Path, *words) -> str:
    code, found, _ = run(place / "workspace", "predict", "--model", model, "--input", file, "--output", output, *words)
    assert code == 2, found
    return found["error"]


# ---- variants


@pytest.fixture(scope="module")
def genome(place) -> Path:
    """chr1 of 300 letters with the motif from position 101 on, chr2 in lower case."""
    rng = np.random.default_rng(5)
    first, second = ("".join(rng.choice(list("ACGT"), size=size)) for size in (300, 120))
    first = first[:100] + MOTIF + first[110:]
    path = place / "genome.fa"
    path.write_text(f">chr1 of a genome\n{first[:160]}\n{first[160:]}\n>chr2\n{second.lower()}\n")
    return path


def letters_of(genome: Path) -> str:
    return "".join(genome.read_text().split(">chr2")[0].splitlines()[1:])


@pytest.fixture(scope="module")
def vcf(place, genome) -> Path:
    first = letters_of(genome)
    other = "C" if first[2] != "C" else "G"
    rows = [
        ("1", 102, "rs1", "A", "C,G"), ("2", 60, ".", genome.read_text().splitlines()[-1][59].upper(), "<DEL>"),
        ("1", 103, "del", "TTACA", "T"), ("chr9", 5, ".", "A", "C"), ("1", 3, "end", first[2], other), ("1", 102, "wrong", "T", "C"),
    ]  # fmt: skip
    path = place / "v.vcf"
    lines = ["\t".join(map(str, row)) + "\t.\tPASS\t." for row in rows]
    path.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + "\n".join(lines) + "\n")
    return path


def test_every_alternative_has_a_row_in_the_order_of_the_file(place, model, genome, vcf):
    found, said = predict(place, model, genome, place / "variants", "--variants", vcf)
    made = pd.read_csv(place / "variants" / "variant_effects.csv", keep_default_na=False, na_values=[""])
    assert list(zip(made["pos"], made["alt"], strict=True)) == [
        (102, "C"), (102, "G"), (60, "<DEL>"), (103, "T"), (5, "C"), (3, made["alt"].iloc[5]), (102, "C")
    ]  # fmt: skip
    scored = made["label_1_difference"].notna().tolist()
    assert scored == [True, True, False, True, False, True, False]
    reasons = made["reason"].tolist()
    assert reasons[2] == "the alternative is not spelled out" and reasons[4] == "the genome has no such chromosome"
    assert reasons[5].startswith("near the end") and reasons[6].endswith("(it has A)")
    assert (found["alternatives"], found["scored"]) == (7, 4) and sum(found["not_scored"].values()) == 3
    assert found["chromosomes_matched"] == {"1": "chr1", "2": "chr2"} and "1 of the variants is chr1" in said
    assert json.loads((place / "variants" / "variant_effects.json").read_text())["window"] == 40
    assert (made["label_1_difference"][:4].dropna() < -0.5).all(), "a broken motif speaks against its class"


def test_effects_are_differences_of_what_prediction_says_of_both_strands(place, model, genome, vcf, tmp_path):
    made = pd.read_csv(place / "variants" / "variant_effects.csv").iloc[0]
    first = letters_of(genome)
    reference = first[81:121]
    changed = first[81:101] + "C" + first[102:121]
    turned = [text[::-1].translate(str.maketrans("ACGT", "TGCA")) for text in (reference, changed)]
    pd.DataFrame({"sequence": [reference, changed, *turned]}).to_csv(tmp_path / "four.csv", index=False)
    predict(place, model, tmp_path / "four.csv", tmp_path / "out")
    logits = pd.read_csv(tmp_path / "out" / "logits.csv", index_col=0)
    odds = (logits["label_1"] - logits["label_0"]).to_numpy()
    assert made["label_1_ref"] == pytest.approx((odds[0] + odds[2]) / 2, abs=1e-4)
    assert made["label_1_difference"] == pytest.approx((odds[1] + odds[3] - odds[0] - odds[2]) / 2, abs=1e-4)


def test_variants_of_another_genome_and_options_without_meaning_are_refused(place, model, genome, vcf, tmp_path):
    other = tmp_path / "other.fa"
    other.write_text(f">contig7\n{'ACGT' * 30}\n")
    assert "none of its chromosomes (1, 2, chr9)" in refused(place, model, other, tmp_path, "--variants", vcf)
    assert "FASTA" in refused(place, model, vcf, tmp_path, "--variants", vcf)
    assert "--umap: does not go with --variants" in refused(place, model, genome, tmp_path, "--variants", vcf, "--umap")
    assert "--window: goes with --variants only" in refused(place, model, genome, tmp_path, "--window", 5)


# ---- mutagenesis


def test_the_bases_of_the_motif_matter_most(place, model, tmp_path):
    rows = motifs(40, 2).query("label == 1").head(3)[["sequence"]]
    rows.loc[99] = {"sequence": "ACGTN" + MOTIF + "ACGT"}
    rows.loc[100] = {"sequence": None}
    rows.to_csv(tmp_path / "new.csv", index=False)
    found, said = predict(place, model, tmp_path / "new.csv", tmp_path / "out", "--mutagenesis", "--limit", 50)
    made = pd.read_csv(tmp_path / "out" / "mutagenesis.csv")
    assert found["changes"] == len(made) == 3 * (3 * 40 + 18) and found["positions_without_a_base"] == 1
    assert "414 changes: 838 sequences" in said
    assert not (made["ref"] == made["alt"]).any() and made.groupby(["sequence", "position"]).size().eq(3).all()
    first = made[made["sequence"] == "seq_0"].groupby("position")["label_1_difference"].mean()
    assert set(first.nsmallest(3).index) <= set(range(AT + 1, AT + 11)), "the motif is at 11 to 20"
    own = pd.read_csv(tmp_path / "out" / "mutagenesis_sequences.csv", index_col=0)
    assert own["reason"].dropna().to_dict() == {"seq_4": "the sequence is empty"} and own["label_1"].isna().sum() == 1
    figures = sorted((tmp_path / "out" / "figures").iterdir())
    assert len(figures) == 4 and "000-seq_0-label_1.svg" in figures[0].name
    assert figures[0].read_text().startswith("<svg")
    assert "at least one sequence" in refused(
        place, model, tmp_path / "new.csv", tmp_path, "--mutagenesis", "--limit", 0
    )


# ---- attributions


def interpret(place: Path, model: str, *words) -> tuple[int, dict]:
    code, found, _ = run(
        place / "workspace", "interpret", "-cn", "interpret_config", f"task.checkpoint={model}", "task.resamples=20",
        "task.permutations=20", *words,
    )  # fmt: skip
    return code, found


def test_the_bases_of_the_motif_carry_the_score_of_its_class(place, model):
    code, found = interpret(place, model, "task.max_cells=4")
    assert code == 0, found
    folder = Path(found["artefacts"]["interpret"])
    bases = pd.read_csv(folder / "base_attributions.csv")
    assert len(bases) == 8 * 40 and bases.groupby(["sequence", "class"]).size().eq(40).all()
    own = bases[bases["class"] == 1].groupby("position")["score"].mean()
    assert own[AT + 1 : AT + 10].sum() > 2 * abs(own.drop(range(AT + 1, AT + 11)).sum())
    facts = pd.read_csv(folder / "cells.csv").query("own").set_index(["cell", "class"])
    sums = bases.groupby(["sequence", "class"])["score"].sum()
    for place_, total in sums.items():
        assert total == pytest.approx(facts["score"][place_] - facts["baseline_score"][place_], rel=0.02, abs=0.05)
    written = json.loads((folder / "base_attributions.json").read_text())
    assert {one["name"]: one["letters"] for one in written} == {
        name: "".join(rows["base"]) for name, rows in bases.groupby("sequence")
    }
    said = json.loads((folder / "interpretation.json").read_text())
    assert said["checks"]["exchanged"]["top"] > said["checks"]["exchanged"]["random"]
    assert [len(said["labels"]["label"]["logos"]), said["of"]] == [6, "sequences"]
    assert not any("cell" in text or "gene" in text for text in [*said["sentences"], *said["notes"]])
    assert len(list((folder / "figures").glob("logo-*.svg"))) == 6
    page = (folder / "interpret.html").read_text()
    assert "Of each class the sequences with the highest scores" in page and "from a piece in a sequence" in page


def test_sequences_of_a_file_are_interpreted(place, model, tmp_path):
    rows = motifs(8, 3)[["sequence"]]
    rows.loc[len(rows)] = {"sequence": "ACGTNR" + MOTIF}
    rows.assign(name=[f"s{row}" for row in range(9)]).to_csv(tmp_path / "new.csv", index=False)
    code, found = interpret(place, model, f"task.cells={tmp_path / 'new.csv'}", "task.attribute_kwargs.n_steps=16")
    assert code == 0, found
    bases = pd.read_csv(Path(found["artefacts"]["interpret"]) / "base_attributions.csv")
    assert "".join(bases[bases["sequence"] == "s8"]["base"]) == "ACGTNR" + MOTIF
    for word, says in (
        ("task.baseline=zero", "sequences have no values"),
        ("task.layer=counts", "sequences have no layers"),
    ):
        code, found = interpret(place, model, word)
        assert code == 2 and says in found["error"]


# ---- sequences longer than the model reads


@pytest.fixture(scope="module")
def short(place, model) -> str:
    """The same model, which reads 40 letters at most."""
    import shutil

    folder = place / "short"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "bmfm.json").read_text())
    settings["data_module"] |= {"max_length": 42, "test_max_length": 42, "pad_to_multiple_of": 2}
    (folder / "bmfm.json").write_text(json.dumps(settings))
    return str(folder)


def test_windows_cover_a_sequence_and_overlap_by_half():
    from bmfm_pipeline.stages.predicting.sequences import overlapping

    owners, begins, ends = overlapping(np.array([0, 10, 10, 35]), 10)
    assert owners.tolist() == [0, 1, 2, 2, 2, 2]
    assert begins.tolist() == [0, 10, 10, 15, 20, 25] and ends.tolist() == [10, 10, 20, 25, 30, 35]
    assert overlapping(np.array([0, 3]), 1)[1].tolist() == [0, 1, 2]


def test_a_long_sequence_is_cut_and_counted_or_read_in_windows_whose_answers_are_averaged(place, short, tmp_path):
    texts = motifs(3, 4)["sequence"].tolist()
    long = texts[0] + texts[1]
    pd.DataFrame({"sequence": [long, texts[2], None, long[:40], long[20:60], long[40:]]}).to_csv(
        tmp_path / "long.csv", index=False
    )
    found, said = predict(place, short, tmp_path / "long.csv", tmp_path / "cut")
    assert found["longer_than_the_model"] == 1 and "--windows reads all of them" in said
    cut = pd.read_csv(tmp_path / "cut" / "logits.csv", index_col=0)["label_1"].to_numpy()
    assert cut[0] == pytest.approx(cut[3], abs=1e-5)
    found, said = predict(place, short, tmp_path / "long.csv", tmp_path / "whole", "--windows")
    assert found["longer_than_the_model"] == 1 and found["in_windows"] and "whose answers are averaged" in said
    whole = pd.read_csv(tmp_path / "whole" / "logits.csv", index_col=0)["label_1"].to_numpy()
    assert whole[0] == pytest.approx(cut[3:].mean(), abs=1e-5)
    assert whole[1:] == pytest.approx(cut[1:], abs=1e-5, nan_ok=True) and np.isnan(whole[2])
    embeddings = pd.read_csv(tmp_path / "whole" / "embeddings.csv", index_col=0, header=None).to_numpy()
    assert embeddings[0] == pytest.approx(embeddings[3:].mean(axis=0), abs=1e-4)


def test_of_a_long_sequence_what_the_model_reads_is_changed(place, short, tmp_path):
    long = "".join(motifs(2, 6)["sequence"])
    (tmp_path / "long.fa").write_text(f">long\n{long}\n")
    found, _ = predict(place, short, tmp_path / "long.fa", tmp_path / "out", "--mutagenesis", "--one-strand")
    assert found["longer_than_the_model"] == 1 and found["changes"] == 120 and found["strands"] == "as given"
    assert "--windows: does not go with" in refused(
        place, short, tmp_path / "long.fa", tmp_path, "--mutagenesis", "--windows"
    )
