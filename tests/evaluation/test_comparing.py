"""Two evaluations beside each other: how cells are matched, what is paired, what is refused, and the pages that show it."""

import json
import re

import numpy as np
import pytest
from sklearn.metrics import f1_score

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.comparing import Contender, compare_predictions
from bmfm_pipeline.evaluation.field_predictions import Baseline, FieldRows
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.pages.comparison import comparison_html, comparison_markdown, comparison_text
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.resampling import resampled
from bmfm_pipeline.evaluation.wording import verdict_kind

NAMES = ["B", "NK", "T"]
TRUTH = np.random.default_rng(0).integers(0, 3, 400)


def label(right=0.8, seed=0, truth=TRUTH, names=tuple(NAMES)):
    """Of two labels with the same seed, the one of higher `right` is right wherever the other is."""
    generator = np.random.default_rng(seed)
    lucky = generator.random(len(truth)) < right
    scores = 0.5 * generator.random((len(truth), len(names)))
    # An unlucky cell is taken for the next class.
    scores[np.arange(len(truth)), np.where(lucky, truth, (truth + 1) % len(names))] += 0.3 + generator.random(
        len(truth)
    )
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    return LabelPredictions(truth, probabilities.argmax(axis=1), probabilities, list(names))


def side(found, cells=None, groups=None, column=None, target="celltype"):
    cells = [f"c{i}" for i in range(len(found.truth))] if cells is None else cells
    return Contender(Predictions(list(cells), {target: found}), groups, column)


def compare(a, b, **options):
    found = compare_predictions(a, b, **{"resamples": 1000, **options})
    return found, found.targets["celltype"]


def row(entry, metric):
    (one,) = [row for row in entry["rows"] if row["metric"] == metric]
    return one


def at(found, rows):
    return LabelPredictions(found.truth[rows], found.predicted[rows], found.probabilities[rows], found.class_names)


def test_the_same_cells_are_paired_whatever_their_order():
    a, b = label(0.9), label(0.8)
    order = np.random.default_rng(1).permutation(400)
    _, straight = compare(side(a), side(b))
    found, entry = compare(side(a), side(at(b, order), cells=[f"c{i}" for i in order]))
    assert entry["rows"] == straight["rows"]
    assert (entry["paired"], entry["n_a"], entry["n_b"]) == (True, 400, 400)
    assert entry["sentence"] == "paired: the same 400 test cells for both"
    accuracy = row(entry, "accuracy")
    assert accuracy["difference"]["value"] == pytest.approx(
        np.mean(a.predicted == TRUTH) - np.mean(b.predicted == TRUTH)
    )
    assert accuracy["kind"] == accuracy["kind_of_all"] == "better"
    assert row(entry, "f1")["b"]["value"] == pytest.approx(f1_score(TRUTH, b.predicted, average="macro"))
    assert row(entry, "auroc")["difference"]["value"] > 0
    (sentence,) = found.verdicts
    assert re.match(r"celltype: A is better than B by \S+ points of accuracy, 95 % interval .*McNemar p = ", sentence)
    assert verdict_kind(sentence) == "better"


def test_turning_the_sides_round_turns_the_signs():
    _, one = compare(side(label(0.9)), side(label(0.8)))
    _, other = compare(side(label(0.8)), side(label(0.9)))
    for metric in ("accuracy", "f1", "auroc"):
        ours, theirs = row(one, metric)["difference"], row(other, metric)["difference"]
        assert ours["value"] == pytest.approx(-theirs["value"])
        assert (ours["ci_low"], ours["ci_high"]) == pytest.approx((-theirs["ci_high"], -theirs["ci_low"]))
    assert row(other, "accuracy")["kind"] == "worse"


def test_other_cells_are_compared_unpaired_and_the_interval_is_that_of_independent_samples():
    a, b = label(0.9), label(0.8)
    paired, _ = compare(side(a), side(b))
    found, entry = compare(side(a), side(b, cells=[f"d{i}" for i in range(400)]), resamples=4000)
    assert not entry["paired"] and entry["test"] is None
    assert entry["sentence"].startswith(
        "unpaired: the test cells are not the same (400 of A and 400 of B; they share no cell)"
    )
    assert "unpaired" in found.verdicts[0] and "unpaired" not in paired.verdicts[0]
    difference = row(entry, "accuracy")["difference"]
    spread = np.sqrt(sum(resampled(Metric("accuracy", TRUTH, each.predicted), 4000, 9).var() for each in (a, b)))
    assert difference["ci_high"] - difference["ci_low"] == pytest.approx(2 * 1.96 * spread, rel=0.06)
    of_pairs = row(paired.targets["celltype"], "accuracy")["difference"]
    assert difference["ci_high"] - difference["ci_low"] > 1.3 * (of_pairs["ci_high"] - of_pairs["ci_low"])


def test_of_partly_shared_cells_the_shared_ones_are_paired_and_the_rest_is_said():
    a, b = label(0.9), label(0.8)
    rows = np.arange(100, 400)
    _, entry = compare(side(at(a, np.arange(300))), side(at(b, rows), cells=[f"c{i}" for i in rows]))
    assert (entry["paired"], entry["n_a"]) == (True, 200)
    assert entry["sentence"] == (
        "paired on the 200 test cells that both have (300 of A and 300 of B); the others are left out"
    )
    assert row(entry, "accuracy")["a"]["value"] == np.mean(a.predicted[100:300] == TRUTH[100:300])


def test_a_handful_of_shared_cells_is_no_ground_for_pairing():
    rows = np.arange(390, 790) % 400
    cells = [f"c{i}" for i in range(390, 790)]
    _, entry = compare(side(label(0.9)), side(at(label(0.8), rows), cells=cells))
    assert "they share only 10)" in entry["sentence"] and (entry["n_a"], entry["n_b"]) == (400, 400)


def test_cells_of_the_same_name_with_other_labels_are_other_cells():
    """Cells called 0, 1, 2 in two files."""
    _, entry = compare(side(label(0.9)), side(label(0.8, truth=np.roll(TRUTH, 7))))
    assert not entry["paired"] and re.search(r"\d+ of 400 cells of the same name have other labels", entry["sentence"])


def test_a_few_relabelled_cells_are_left_out_and_counted():
    other = TRUTH.copy()
    other[:6] = (other[:6] + 1) % 3
    relabelled = label(0.8, truth=other)
    relabelled.truth[6] = -100
    found, entry = compare(side(label(0.9)), side(relabelled))
    assert (entry["paired"], entry["n_a"]) == (True, 393)
    assert "celltype: 6 shared cells have another label in B than in A and are left out" in found.notes


def test_other_label_dictionaries_are_refused_with_the_classes_that_differ():
    with pytest.raises(
        DataError,
        match=r"celltype: the label dictionaries of A \(3 classes\) and B \(3\) differ: only A has NK; only B has Mono\. ",
    ):
        compare(side(label()), side(label(names=["B", "Mono", "T"])))
    with pytest.raises(DataError, match=r"only B has Treg\. .* evaluate both models on data of the same labels"):
        compare(side(label()), side(label(names=[*NAMES, "Treg"])))


def test_the_same_classes_in_another_order_are_the_same():
    a, b = label(0.9), label(0.8)
    ids = np.array([2, 0, 1])  # of B's ids for A's
    renamed = LabelPredictions(ids[b.truth], ids[b.predicted], b.probabilities[:, np.argsort(ids)], ["NK", "T", "B"])
    assert compare(side(a), side(renamed))[1]["rows"] == compare(side(a), side(b))[1]["rows"]


def test_nothing_in_common_is_refused_and_labels_of_one_side_are_named():
    with pytest.raises(DataError, match="no label column and no masked field in common: A predicts celltype, B tissue"):
        compare(side(label()), side(label(), target="tissue"))
    both = Predictions([f"c{i}" for i in range(400)], {"celltype": label(), "tissue": label()})
    found, _ = compare(Contender(both), side(label(0.7)))
    assert "only A predicts tissue: not compared" in found.notes
    number = LabelPredictions(TRUTH.astype(float), TRUTH + 0.5)
    with pytest.raises(DataError, match="A predicts classes, B numbers"):
        compare(side(label()), side(number))


def test_groups_of_either_side_are_resampled_together():
    donors = np.array([f"donor {i // 40}" for i in range(400)], dtype=object)
    a, b = label(0.9), label(0.8)
    a.predicted[:40] = (a.truth[:40] + 1) % 3  # of one donor all are wrong
    _, alone = compare(side(a), side(b))
    found, entry = compare(side(a), side(b, groups=donors, column="donor"))
    assert (entry["grouped_by"], entry["test"]["name"]) == ("donor", "sign-flip test of 10 groups")
    assert found.verdicts[0].endswith("groups are resampled together")
    widths = [row(each, "accuracy")["difference"] for each in (entry, alone)]
    assert widths[0]["ci_high"] - widths[0]["ci_low"] > 1.5 * (widths[1]["ci_high"] - widths[1]["ci_low"])
    apart, _ = compare(side(a, groups=donors, column="donor"), side(b, cells=[f"d{i}" for i in range(400)]))
    assert any(
        "only the cells of one side are grouped (by donor); those of B count one by one" in note for note in apart.notes
    )
    one, entry = compare(side(a, groups=np.array(["x"] * 400, dtype=object), column="donor"), side(b))
    assert entry["grouped_by"] is None and any("have the same donor" in note for note in one.notes)


def test_numbers_are_compared_by_their_errors():
    truth = np.random.default_rng(0).normal(size=300)
    a, b = (LabelPredictions(truth, truth + scale * np.random.default_rng(1).normal(size=300)) for scale in (0.2, 0.4))
    found, entry = compare(side(a), side(b))
    assert [each["metric"] for each in entry["rows"]] == ["mse", "mae", "pcc"] and entry["per_class"] == []
    assert row(entry, "mse")["difference"]["value"] < 0 and row(entry, "mse")["kind"] == "better"
    assert (
        found.verdicts[0].startswith("celltype: A is better than B by ") and "mean squared error" in found.verdicts[0]
    )
    assert comparison_html({**found.to_dict(), **SIDES})


def test_classes_are_listed_with_the_difference_of_their_f1():
    a, b = label(0.9), label(0.9)
    b.predicted[TRUTH == 1] = 2
    _, entry = compare(side(a), side(b))
    by_name = {each["class"]: each for each in entry["per_class"]}
    assert {name: each["n_a"] for name, each in by_name.items()} == dict(zip(NAMES, np.bincount(TRUTH), strict=True))
    expected = f1_score(TRUTH, a.predicted, average=None) - f1_score(TRUTH, b.predicted, average=None)
    assert [by_name[name]["difference"]["value"] for name in NAMES] == pytest.approx(expected)
    assert (by_name["NK"]["kind"], by_name["NK"]["kind_of_all"], by_name["NK"]["b"]) == ("better", "better", 0.0)


def test_of_several_differences_those_that_chance_explains_are_named():
    found, entry = compare(side(label(0.8, seed=1)), side(label(0.8, seed=2)))
    (note,) = [note for note in found.notes if "differences are listed" in note]
    assert note.startswith(
        "7 differences are listed, each at 95 %: where there is none, about one in 20 still shows by chance."
    )
    entry["rows"][0]["difference"] = {"value": 0.02, "ci_low": 0.001, "ci_high": 0.039}
    from bmfm_pipeline.evaluation import comparing

    comparing._widen([*entry["rows"]], 0.95, lambda row: row["metric"])
    assert entry["rows"][0]["kind_of_all"] == "open", "0.019 to either side is 0.026 once there are seven"
    comparing._widen([entry["rows"][0]], 0.95, lambda row: row["metric"])
    assert entry["rows"][0]["kind_of_all"] == "better", "alone it stays as it is"


def test_two_that_say_the_same():
    found, _ = compare(side(label()), side(label()))
    assert found.verdicts == [
        "celltype: no evidence that A is better or worse than B: both say the same of each of the 400 cells"
    ]
    assert "None leaves out 0" in found.notes[-1]


SIDES = {
    name: {"what": f"data, model {name}<b>", "dataset": "data", "model": name, "evaluation": f"/ws/{name}", "evaluated": "", "split": ""}
    for name in ("a", "b")
}  # fmt: skip


def test_page_markdown_and_text_hold_the_same_numbers_and_escape_names():
    names = ["B <script>", "NK|x", "T"]
    found = compare_predictions(side(label(0.9, names=names)), side(label(0.8, names=names)), resamples=300)
    plain = {**found.to_dict(), **SIDES}
    json.dumps(plain, allow_nan=False)
    page, text, markdown = comparison_html(plain), comparison_text(plain), comparison_markdown(plain)
    accuracy = row(found.targets["celltype"], "accuracy")
    for value in (f"{accuracy['a']['value']:.3f} [", f"{accuracy['difference']['value']:.3f} ["):
        assert value in page and value in text and value in markdown
    assert "A better" in page and "A better" in text
    assert found.verdicts[0] in text and found.targets["celltype"]["sentence"] in page
    assert "B <script>" not in page and "B &lt;script&gt;" in page and "a&lt;b&gt;" in page
    assert "NK\\|x" in markdown and "<svg" in page and 'class="verdict better"' in page
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert lines[0].index("A minus B") == lines[1].index("+0."), "columns are aligned"


def masked(error=0.5, seed=0, cells=60, per_cell=20, skip=0, kind="number", shift=0.0):
    """Numbers at masked positions: `per_cell` genes of each of `cells` cells, from gene `skip` on."""
    labels = np.random.default_rng(9).normal(size=(cells, 40)).round(3)[:, skip : skip + per_cell].ravel() + shift
    noise = np.random.default_rng(seed).normal(size=(cells, 40))[:, skip : skip + per_cell].ravel()
    blank = np.full(len(labels), np.nan)
    genes = [f"G{number}" for number in range(skip, skip + per_cell)]
    cell, gene = np.repeat(np.arange(cells), per_cell), np.tile(np.arange(per_cell), cells)
    if kind == "token":
        label = (labels > 0).astype(float)
        said = np.where(np.abs(noise) < error, 1 - label, label)
        return FieldRows(
            "expressions", kind, cells_called(cells), cell, genes, gene, label, said, -np.abs(noise), blank
        )
    known = Baseline(mean=0.0, median=0.0)
    return FieldRows(
        "expressions", kind, cells_called(cells), cell, genes, gene, labels, labels + error * noise, blank, blank, known
    )


def cells_called(count):
    return [f"c{i}" for i in range(count)]


def of_fields(rows, groups=None, column=None):
    return Contender(Predictions(cells_called(60), {}), groups, column, [rows])


def compare_masked(a, b):
    found = compare_predictions(of_fields(a), of_fields(b), resamples=500)
    return found, found.targets.get("masked expressions")


def test_masked_fields_are_paired_on_the_positions_that_both_predicted():
    a, b = masked(0.5, seed=1), masked(0.6, seed=2)
    found, entry = compare_masked(a, b)
    assert (entry["paired"], entry["n_a"], entry["test"], entry["per_class"]) == (True, 1200, None, [])
    assert entry["sentence"].startswith("paired on the 1,200 masked positions of 60 cells that both predicted")
    errors = [np.mean((each.prediction - each.label) ** 2) for each in (a, b)]
    assert row(entry, "mse")["difference"]["value"] == pytest.approx(errors[0] - errors[1])
    assert row(entry, "mse")["kind"] == "better"
    assert found.verdicts[0].startswith("masked expressions: A is better than B by ")
    assert found.verdicts[0].endswith("cells are resampled whole")
    _, part = compare_masked(masked(0.5, seed=1, skip=10), b)
    assert part["n_a"] == part["n_b"] == 600 and "600 masked positions of 60 cells" in part["sentence"]
    tokens, entry = compare_masked(masked(0.1, kind="token"), masked(0.4, kind="token"))
    assert row(entry, "accuracy")["kind"] == "better" and "points of accuracy" in tokens.verdicts[0]


def test_masked_positions_that_are_not_shared_are_unpaired_and_other_labels_not_compared():
    _, entry = compare_masked(masked(0.5), masked(0.6, skip=20))
    assert not entry["paired"] and entry["sentence"].startswith("unpaired: the masked positions are not the same")
    found, entry = compare_masked(masked(0.5), masked(0.5, shift=1.0))
    assert entry is None and "other bins, or values transformed in another way" in found.notes[0]


def test_masked_fields_respect_groups():
    donors = np.array([f"donor {i // 6}" for i in range(60)], dtype=object)
    a, b = masked(0.5, seed=1), masked(0.6, seed=2)
    a.prediction[: 6 * 20] += 1  # of one donor all are far off
    wide = compare_predictions(of_fields(a, donors, "donor"), of_fields(b), resamples=500)
    narrow = compare_predictions(of_fields(a), of_fields(b), resamples=500)
    widths = [row(each.targets["masked expressions"], "mse")["difference"] for each in (wide, narrow)]
    assert widths[0]["ci_high"] - widths[0]["ci_low"] > 1.5 * (widths[1]["ci_high"] - widths[1]["ci_low"])
    assert wide.verdicts[0].endswith("groups of cells are resampled together")
