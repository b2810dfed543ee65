"""Names of perturbations as several collections spell them, and splits that hold whole perturbations out."""

import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline.config.splits import SplitPlan
from bmfm_pipeline.data.perturbations import read_perturbations, split_by_perturbation
from bmfm_pipeline.errors import DataError

SPELLINGS = {
    "gears": (["KLF1+ctrl", "ctrl+KLF1", "SET+KLF1", "ctrl"], ["KLF1", "KLF1", "KLF1_SET", "Control"]),
    "scperturb": (["KLF1_SET", "HLA-A", "control"], ["KLF1_SET", "HLA-A", "Control"]),
    "adamson": (
        ["SPI1_pDS255", "62(mod)_pBA581", "*", "CREB1_only_pBA", "Gal4-4(mod)_pBA582", None],
        ["SPI1", "Control", None, "CREB1", "Control", None],
    ),
    "replogle": (["AAAS", "non-targeting", "ZNF_1"], ["AAAS", "Control", "ZNF_1"]),
    "plain": (["KLF1", "TP53", "Control", np.nan], ["KLF1", "TP53", "Control", None]),
}


@pytest.mark.parametrize("dialect", SPELLINGS)
def test_each_spelling_is_recognised_and_read(dialect):
    values, wanted = SPELLINGS[dialect]
    found = read_perturbations(values, "gene")
    assert found.dialect == dialect
    assert found.names.tolist() == wanted
    assert list(read_perturbations(values, "gene", dialect).names) == wanted


def test_the_challenge_is_told_by_its_column():
    assert read_perturbations(["TP53", "non-targeting"], "target_gene").dialect == "vcc"


@pytest.mark.parametrize(
    "word",
    ["control", "ctrl", "Control", "NT", "NT-12", "non-targeting_3", "NonTargeting", "safe-targeting", "negCtrl0"],
)
def test_controls_have_many_names(word):
    found = read_perturbations(["A", word, word], "p")
    assert found.controls == {word: 2} and found.is_control.tolist() == [False, True, True]


def test_genes_that_look_a_little_like_controls_are_genes():
    assert read_perturbations(["NT5E", "CTRL1B", "control"], "p").genes == ["CTRL1B", "NT5E"]
    assert read_perturbations(["CTRL", "wild"], "p", control="wild").genes == ["CTRL"]


def test_without_a_control_the_values_are_listed():
    with pytest.raises(
        DataError,
        match=r"obs\['p'\]: no value stands for control cells.*3 values are A, B, wild.*perturbation\.control=VALUE",
    ):
        read_perturbations(["A", "B", "wild", "A"], "p")
    with pytest.raises(DataError, match="no cell has the value 'x'"):
        read_perturbations(["A", "control"], "p", control="x")
    with pytest.raises(DataError, match="every value stands for control"):
        read_perturbations(["ctrl", "control"], "p")


def screen():
    singles = [f"G{number:02}" for number in range(16)]
    doubles = [f"{a}_{b}" for a, b in zip(singles, singles[1:] + singles[:1], strict=True)]
    names = [name if "_" not in name else "_".join(sorted(name.split("_"))) for name in [*singles, *doubles]]
    cells = pd.Series([*np.repeat(names, 3), *["Control"] * 5, None], dtype=object)
    return cells, {name: tuple(name.split("_")) for name in names}


def split(method, seed=3, cells=None, **weights):
    own, targets = screen()
    plan = SplitPlan(
        "perturbation", seed, weights=weights or {"train": 0.7, "dev": 0.1, "test": 0.2}, perturbations=method
    )
    return split_by_perturbation(own if cells is None else cells, targets, plan)


@pytest.mark.parametrize("method", ["single_only", "single", "combo_seen0", "combo_seen1", "combo_seen2", "simulation"])
def test_perturbations_stay_whole_and_groups_tell_the_truth(method):
    cells, targets = screen()
    found = split(method)
    table = pd.DataFrame({"name": cells, "split": found.assigned}).dropna()
    assert (table.groupby("name")["split"].nunique() == 1).all()
    assert set(table.loc[table["name"] == "Control", "split"]) == {"train"} and found.assigned.iloc[-1] == "unused"
    lists = found.notes["perturbations"]
    trained = {gene for name in lists["train"] for gene in targets[name]}
    for name, group in found.notes["perturbation_groups"].items():
        seen = len(trained & set(targets[name]))
        kind = f"combo_seen{seen}" if "_" in name else "seen_single" if seen else "unseen_single"
        assert group in (f"{kind}_dev", f"{kind}_test") and name in lists[group.rpartition("_")[2]]
        if method.startswith("combo_seen"):
            assert kind == method
    if method == "combo_seen2":
        assert all(gene in lists["train"] for name in lists["test"] for gene in targets[name]), (
            "both singles are trained on"
        )
    if method == "single_only":
        assert not any("_" in name for name in [*lists["train"], *lists["test"]])
    assert lists["test"] and lists["train"]


def test_a_split_depends_on_seed_and_names_alone():
    cells, _ = screen()
    shuffled = cells.sample(frac=1, random_state=0)
    first, again = split("simulation"), split("simulation", cells=shuffled)
    assert again.assigned.sort_index().equals(first.assigned)
    assert not split("simulation", seed=4).assigned.equals(first.assigned)


def test_too_few_perturbations_are_said():
    cells = pd.Series(["A", "Control"], dtype=object)
    with pytest.raises(DataError, match="train would have no perturbation; there are 1 of single genes"):
        split_by_perturbation(
            cells,
            {"A": ("A",)},
            SplitPlan("perturbation", 1, weights={"train": 0.5, "dev": 0, "test": 0.5}, perturbations="single"),
        )
