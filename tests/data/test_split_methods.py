"""Every way of splitting cells: what it guarantees, and what it says when cells cannot be divided that way."""

import numpy as np
import pandas as pd
import pytest

from bmfm_pipeline.config.splits import SplitPlan
from bmfm_pipeline.data.splits import assign_split, describe_split, split_column, split_sentence, write_split
from bmfm_pipeline.errors import DataError

WEIGHTS = {"train": 0.72, "dev": 0.08, "test": 0.2}


def cells(n=600, donors=20, seed=0) -> pd.DataFrame:
    """Three classes, donors of unequal size, ages."""
    random = np.random.default_rng(seed)
    shares = np.arange(1, donors + 1) / np.arange(1, donors + 1).sum()
    return pd.DataFrame(
        {
            "celltype": pd.Categorical(random.choice(["A", "B", "C"], n, p=[0.5, 0.3, 0.2])),
            "donor_id": [f"D{number}" for number in random.choice(donors, n, p=shares)],
        },
        index=[f"cell{number}" for number in range(n)],
    )


def split(obs, method="group", **settings):
    given = settings.pop("given", None)
    weights = settings.pop("weights", WEIGHTS if "n_folds" not in settings else None)
    return assign_split(obs, SplitPlan(method, settings.pop("seed", 1), weights=weights, **settings), given)


def refusal(obs, method="group", **settings) -> str:
    with pytest.raises(DataError) as caught:
        split(obs, method, **settings)
    return str(caught.value)


def donors_of(obs, assigned, name) -> set:
    return set(obs["donor_id"][(assigned == name).to_numpy()])


@pytest.mark.parametrize(("method", "stratify"), [("group", None), ("stratified_group", "celltype")])
def test_groups_stay_whole_and_shares_are_near(method, stratify):
    obs = cells()
    assigned = split(obs, method, group="donor_id", stratify=stratify).assigned
    sides = [donors_of(obs, assigned, name) for name in ("train", "dev", "test")]
    assert all(sides) and sum(map(len, sides)) == obs["donor_id"].nunique()
    shares = assigned.value_counts(normalize=True)
    assert abs(shares["test"] - 0.2) < 0.05 and abs(shares["dev"] - 0.08) < 0.05
    assert assigned.equals(split(obs, method, group="donor_id", stratify=stratify).assigned)
    assert not assigned.equals(split(obs, method, group="donor_id", stratify=stratify, seed=2).assigned)


def test_groups_and_classes_are_kept_together():
    obs = cells(2000, donors=40)
    assigned = split(obs, "stratified_group", group="donor_id", stratify="celltype").assigned
    table = pd.crosstab(obs["celltype"], assigned, normalize="columns")
    assert (table.sub(table["train"], axis=0).abs() < 0.1).all(axis=None)


@pytest.mark.parametrize(
    ("group", "stratify"), [(None, None), (None, "celltype"), ("donor_id", None), ("donor_id", "celltype")]
)
def test_every_cell_is_tested_in_one_fold(group, stratify):
    obs = cells()
    folds = [
        split(obs, "kfold", n_folds=4, fold=fold, dev_fraction=0.1, group=group, stratify=stratify).assigned
        for fold in range(4)
    ]
    tested = pd.concat([(assigned == "test") for assigned in folds], axis=1).sum(axis=1)
    assert (tested == 1).all()
    for assigned in folds:
        assert {"train", "dev", "test"} == set(assigned)
        if group:
            sides = [donors_of(obs, assigned, name) for name in ("train", "dev", "test")]
            assert not (sides[0] & sides[2] or sides[0] & sides[1] or sides[1] & sides[2])
        else:
            assert (assigned == "test").sum() == 150
        if stratify and not group:
            shares = obs["celltype"][(assigned == "test").to_numpy()].value_counts(normalize=True)
            assert (shares - obs["celltype"].value_counts(normalize=True)).abs().max() < 0.02


class TestReducedTraining:
    def kept(self, obs, **settings):
        assigned = split(obs, "stratified", stratify="celltype", classes="celltype", **settings).assigned
        return set(assigned.index[assigned == "train"]), assigned

    def test_smaller_parts_lie_in_larger_ones_and_keep_the_shares(self):
        obs = cells()
        parts = [self.kept(obs, train_fraction=share)[0] for share in (0.05, 0.1, 0.25, 1.0)]
        assert parts[0] < parts[1] < parts[2] < parts[3]
        whole = split(obs, "stratified", stratify="celltype").assigned
        assert parts[3] == set(whole.index[whole == "train"]) and abs(len(parts[1]) - 43) <= 1
        shares = obs.loc[sorted(parts[2]), "celltype"].value_counts(normalize=True)
        assert (shares - obs["celltype"].value_counts(normalize=True)).abs().max() < 0.02

    def test_left_out_cells_are_unused_and_test_cells_stay(self):
        obs = cells()
        _, assigned = self.kept(obs, cells_per_class=5)
        whole = split(obs, "stratified", stratify="celltype").assigned
        assert obs["celltype"][(assigned == "train").to_numpy()].value_counts().to_dict() == {"A": 5, "B": 5, "C": 5}
        for name in ("dev", "test"):
            assert ((assigned == name) == (whole == name)).all()
        assert (assigned == "unused").sum() == (whole == "train").sum() - 15

    def test_a_cells_place_does_not_depend_on_the_others(self):
        obs = cells()
        obs["fold"] = "train"
        few, many = (
            split(part, "column", column="fold", weights=None, cells_per_class=20, classes="celltype").assigned
            for part in (obs[::-1].iloc[50:], obs)
        )
        common = few.index.intersection(many.index)
        chosen = many[common][many[common] == "train"].index
        assert (few[chosen] == "train").all()

    def test_classes_with_too_few_cells_are_counted(self):
        obs = cells()
        obs["celltype"] = ["rare" if row < 6 else "A" for row in range(600)]
        notes = split(obs, "stratified", stratify="celltype", classes="celltype", cells_per_class=20).notes
        assert notes["classes_with_fewer_cells"] == {"rare": 4}
        assert notes["training_cells_kept"] == 24


class TestGiven:
    def test_a_column_through_a_mapping(self):
        obs = cells(6)
        obs["set"] = ["training", "training", "validation", "test1", "test2", "training"]
        mapping = {"training": "train", "validation": "dev", "test1": "test", "test2": "unused"}
        assigned = split(obs, "column", column="set", mapping=mapping, weights=None).assigned
        assert assigned.tolist() == ["train", "train", "dev", "test", "unused", "train"]

    def test_unknown_values_are_counted_and_a_mapping_is_proposed(self):
        obs = cells(6)
        obs["set"] = ["training", "training", "val", None, "ood", "test_1"]
        message = refusal(obs, "column", column="set", weights=None)
        assert "found also training (2), val (1), no value (1), ood (1), test_1 (1)" in message
        assert "split.mapping={training: train, val: dev, nan: ..., ood: ..., test_1: test}" in message

    def test_ten_thousand_unknown_values_make_a_short_message(self):
        obs = cells(20_000)
        obs["set"] = [f"s{row // 2}" for row in range(20_000)]
        message = refusal(obs, "column", column="set", weights=None)
        assert "holds no such word: s0 (2)" in message and "9990 more" in message and len(message) < 500

    def test_values_that_are_splits_need_no_mapping_beside_those_that_do(self):
        obs = cells(4)
        obs["set"] = ["train", "test1", "dev", "train"]
        made = split(obs, "column", column="set", mapping={"test1": "test", "test9": "test"}, weights=None)
        assert made.assigned.tolist() == ["train", "test", "dev", "train"]
        assert made.notes == {"mapping_without_cells": ["test9"]}

    def test_dev_cells_for_a_column_that_has_none(self):
        obs = cells()
        obs["set"] = ["test" if row % 5 == 0 else "train" for row in range(600)]
        assigned = split(obs, "column", column="set", dev_fraction=0.1, stratify="celltype", weights=None).assigned
        assert assigned.value_counts().to_dict() == {"train": 432, "test": 120, "dev": 48}
        assert ((assigned == "test") == (obs["set"] == "test")).all()

    def test_a_file_by_cell_name(self, tmp_path):
        obs = cells(30)
        wanted = pd.Series(["train", "dev", "test"] * 10, index=obs.index)
        wanted[::-1].rename("split").to_csv(tmp_path / "mine.csv", index_label="barcode")
        assert (
            split(obs[3:], "file", given=tmp_path / "mine.csv", weights=None).assigned.tolist() == wanted[3:].tolist()
        )
        assert split(obs[3:], "file", given=tmp_path / "mine.csv", weights=None).notes == {"names_not_in_data": 3}
        (tmp_path / "half.csv").write_text("cell,split\n" + "".join(f"cell{row},train\n" for row in range(10)))
        message = refusal(obs, "file", given=tmp_path / "half.csv", weights=None)
        assert "20 of the 30 cells are not in it, e.g. cell10, cell11" in message
        (tmp_path / "other.csv").write_text("cell,split\nx-1,train\n")
        assert "Not one name agrees: it has 'x-1', the data have 'cell0'" in refusal(
            obs, "file", given=tmp_path / "other.csv", weights=None
        )

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("cell0,train\ncell1,test\n", "needs a header line with the columns cell and split; found cell0, train"),
            ("cell,split\ncell0,train\ncell0,test\n", "1 cells are named more than once, e.g. cell0"),
            ('cell,split\ncell0,train\ncell1,te,st\ncell2,"', "is not a csv file"),
            ("", "is not a csv file"),
        ],
    )
    def test_files_that_are_no_split(self, tmp_path, text, words):
        (tmp_path / "mine.csv").write_text(text)
        assert words in refusal(cells(2), "file", given=tmp_path / "mine.csv", weights=None)

    def test_a_split_that_divides_a_group_is_refused_where_groups_matter(self):
        obs = cells()
        obs["set"] = ["test" if row % 5 == 0 else "train" for row in range(600)]
        assert split(obs, "column", column="set", weights=None).assigned.tolist() == obs["set"].tolist()
        message = refusal(obs, "column", column="set", group="donor_id", weights=None)
        assert "groups in obs['donor_id'] have cells in more than one of train, dev and test, e.g. D" in message

    def test_an_earlier_split_must_be_of_the_same_cells(self, tmp_path):
        obs = cells(100)
        made = split(obs, "stratified", stratify="celltype")
        info = write_split(tmp_path, made.assigned)
        shuffled = obs.sample(frac=1, random_state=0)
        again = split(shuffled, "reuse", reuse="mine", given=tmp_path / "split.csv", weights=None).assigned
        assert (again[obs.index] == made.assigned).all()
        assert write_split(tmp_path / "again", again)["hash"] == info["hash"]
        message = refusal(obs[:90], "reuse", reuse="mine", given=tmp_path / "split.csv", weights=None)
        assert (
            "split mine: names 10 cells that these data do not have, e.g. cell90" in message
            and "split.file=" in message
        )
        more = pd.concat([obs, cells(3).rename(index=lambda name: f"new-{name}")])
        assert "3 of the 103 cells are not in it, e.g. new-cell0" in refusal(
            more, "reuse", reuse="mine", given=tmp_path / "split.csv", weights=None
        )


class TestCellsThatCannotBeDivided:
    def test_small_classes_are_named_or_kept_in_training(self):
        obs = cells()
        obs["celltype"] = ["one", "two", "two", *obs["celltype"].astype(str)[3:]]
        message = refusal(obs, "stratified", stratify="celltype")
        assert "too few cells to stratify by: one (1), two (2); a class needs 3 cells" in message
        assert "split.rare_classes=train" in message and "split.method=random" in message
        made = split(obs, "stratified", stratify="celltype", rare_classes="train")
        assert made.notes["rare_classes_kept_in_train"] == {"one": 1, "two": 2}
        assert made.assigned.iloc[:3].tolist() == ["train"] * 3 and (made.assigned == "test").sum() == 120

    def test_classes_smaller_than_the_folds(self):
        obs = cells()
        obs["celltype"] = ["few"] * 4 + ["A"] * 596
        message = refusal(obs, "kfold", n_folds=5, fold=0, dev_fraction=0.1, stratify="celltype")
        assert "few (4); a class needs 5 cells" in message
        made = split(obs, "kfold", n_folds=5, fold=0, dev_fraction=0.1, stratify="celltype", rare_classes="train")
        assert made.assigned.iloc[:4].tolist() == ["train"] * 4

    @pytest.mark.parametrize("n_folds", [2, 3])
    def test_the_smallest_class_that_is_allowed_can_be_divided(self, n_folds):
        for size in range(2, 8):
            obs = pd.DataFrame({"celltype": ["few"] * size + ["A"] * 94}, index=[f"c{row}" for row in range(size + 94)])
            try:
                made = [
                    split(obs, "kfold", n_folds=n_folds, fold=fold, dev_fraction=0.1, stratify="celltype").assigned
                    for fold in range(n_folds)
                ]
            except DataError as error:
                assert "a class needs" in str(error)
                continue
            assert all({"train", "dev", "test"} == set(assigned) for assigned in made)

    def test_more_folds_or_splits_than_groups(self):
        obs = cells(donors=3)
        assert (
            "has 3 groups (D0, D1, D2), which stay whole, and 5 are needed for n_folds=5; use at most 3 folds"
            in refusal(obs, "kfold", n_folds=5, fold=0, dev_fraction=0, group="donor_id")
        )
        obs["donor_id"] = ["D0", "D1"] * 300
        message = refusal(obs, group="donor_id")
        assert "2 groups" in message and "3 are needed for train, test, dev" in message
        assert split(obs, group="donor_id", weights={"train": 0.8, "dev": 0.0, "test": 0.2}).assigned.nunique() == 2

    def test_groups_that_say_nothing(self):
        obs = cells()
        obs["donor_id"] = "D0"
        assert "all 600 cells have the same value in obs['donor_id'], 'D0'" in refusal(obs, group="donor_id")
        obs = cells()
        obs.loc[["cell3", "cell8"], "donor_id"] = np.nan
        assert "2 of 600 cells have no value in obs['donor_id'], e.g. cell3, cell8" in refusal(obs, group="donor_id")
        assert "no column 'donor'; did you mean 'donor_id'?" in refusal(obs, group="donor")

    def test_shares_that_leave_nothing(self):
        obs = cells(12)
        message = refusal(obs, "random", weights={"train": 0.98, "dev": 0.01, "test": 0.01}, stratify=None)
        assert "dev and test would be empty (12 cells, shares train 0.98, dev 0.01, test 0.01)" in message
        obs["set"] = "test"
        assert "train would be empty (12 cells)" in refusal(obs, "column", column="set", weights=None)
        assert "train is 0" in refusal(obs, "random", weights={"train": 0.0, "dev": 0.5, "test": 0.5})
        assert split(obs, "random", weights={"train": 1.0, "dev": 0.0, "test": 0.0}).assigned.eq("train").all()
        assert "no cells" in refusal(obs[:0], "random")

    def test_ten_thousand_classes(self):
        obs = pd.DataFrame(
            {"clone": [f"t{row % 10_000}" for row in range(70_000)]}, index=[f"c{row}" for row in range(70_000)]
        )
        message = refusal(obs, "stratified", stratify="clone")
        assert "rare_classes=train" in message and len(message) < 600
        obs["clone"] = [f"t{row % 10_000}" if row < 60_000 else f"t{row % 200}" for row in range(70_000)]
        made = split(obs, "stratified", stratify="clone", rare_classes="train")
        assert len(made.notes["rare_classes_kept_in_train"]) == 9_800
        large = obs["clone"].isin([f"t{number}" for number in range(200)]).to_numpy()
        assert (made.assigned[~large] == "train").all() and obs["clone"][
            (made.assigned == "dev").to_numpy()
        ].nunique() == 200
        few = split(obs, "random", cells_per_class=1, classes="clone").assigned
        assert (few == "train").sum() == obs["clone"][few.isin(["train", "unused"]).to_numpy()].nunique()


def test_the_record_counts_classes_and_groups_and_who_is_on_both_sides():
    obs = cells()
    made = split(obs, group="donor_id").assigned
    found = describe_split(obs, made, ["celltype"], "donor_id")
    assert found["counts_by"]["celltype"]["A"]["test"] == ((obs["celltype"] == "A") & (made == "test")).sum()
    assert sum(found["counts_by"]["donor_id"]["D19"].values()) == (obs["donor_id"] == "D19").sum()
    assert found["groups"]["donor_id"]["in_train_and_test"] == 0
    by_cell = describe_split(obs, split(obs, "random").assigned, ["celltype"], None)
    assert by_cell["groups"]["donor_id"]["in_train_and_test"] > 10 and "donor_id" not in by_cell["counts_by"]


@pytest.mark.parametrize(
    ("plan", "column", "words"),
    [
        (SplitPlan("random", 3), "split_random", "by cell, at random, seed 3"),
        (SplitPlan("stratified", 3, stratify="celltype"), "split_stratified_celltype", "by cell, balanced over celltype"),
        (SplitPlan("group", 3, group="donor", train_fraction=0.1), "split_group_donor", "whole groups of donor, at random, seed 3; 0.1 of"),
        (SplitPlan("kfold", 3, n_folds=5, fold=2), "split_fold_2_of_5", "fold 2 of 5, by cell"),
        (SplitPlan("column", 3, column="set"), "set", "given by the column set"),
        (SplitPlan("column", 3, column="set", cells_per_class=4), "split_set", "at most 4 training cells a class"),
        (SplitPlan("reuse", 3, reuse="zheng-v1"), "split_reused", "the split zheng-v1, used again"),
    ],
)  # fmt: skip
def test_the_column_and_the_sentence_say_how_it_was_made(plan, column, words):
    assert split_column(plan) == column
    assert words in split_sentence(plan.made_with())
