"""report.html: complete without a network, escapes what comes from outside, and shows the numbers of the evaluation."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score

from bmfm_pipeline.evaluation import write_report
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.tables import Evaluation, Settings, evaluate_predictions

HOSTILE = ["<script>alert('B')</script>", '"><img src=x onerror=alert(1)>', "T & NK", "γδ T"]


class Page(HTMLParser):
    """Tags, text and table rows of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.rows, self.in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def predictions(names, n=200, seed=0, strength=0.4):
    generator = np.random.default_rng(seed)
    truth = np.random.default_rng(9).integers(0, len(names), n)
    probabilities = generator.dirichlet(np.ones(len(names)), size=n)
    probabilities[np.arange(n), truth] += strength
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return LabelPredictions(truth, probabilities.argmax(axis=1), probabilities, list(names))


def evaluation(names=tuple(HOSTILE), strength=0.4, **settings) -> tuple[LabelPredictions, Evaluation]:
    model = predictions(names, strength=strength)
    found = evaluate_predictions(
        Predictions([str(i) for i in range(200)], {"celltype": model}),
        {"logistic_l2": {"celltype": predictions(names, seed=1)}},
        Settings(resamples=100, **settings),
    )
    return model, found


def page(tmp_path, found, **options) -> tuple[str, Page]:
    options = {"title": "run: evaluation", "facts": {"dataset": "zheng68k"}, **options}
    write_report(tmp_path / "report.html", found, **options)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def history(tmp_path):
    file = tmp_path / "history.jsonl"
    lines = [{"step": s, "epoch": 0, "train/loss": 2.0 / s, "learning_rate": 1e-4} for s in range(1, 21)]
    lines += [
        {"step": s, "epoch": 0, "validation/loss": 1.0 / s, "validation/celltype_f1": s / 20} for s in (5, 10, 20)
    ]
    lines += [{"step": 21, "epoch": 1, "train/loss": float("nan")}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_page_loads_nothing_and_runs_nothing(tmp_path, history):
    _, found = evaluation()
    text, parsed = page(tmp_path, found, history=history, config={"path": "https://example.org/x.h5ad"})
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "img", "object", "embed", "base"}
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "@import" not in text
    assert "url(" not in text
    assert len(text) < 100_000


def test_class_names_from_outside_are_escaped(tmp_path):
    _, found = evaluation()
    text, parsed = page(tmp_path, found, title="<b>run</b>", facts={"<i>": "</dl><script>x</script>"}, notes=["<u>"])
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(&#39;B&#39;)&lt;/script&gt;" in text
    for name in HOSTILE:
        assert any(name in row[0] for row in parsed.rows if row), name
    assert "".join(parsed.words).count("<b>run</b>") == 2


def test_page_shows_verdict_metrics_classes_and_confusion_of_the_evaluation(tmp_path):
    model, found = evaluation()
    _, parsed = page(tmp_path, found)
    text = "".join(parsed.words)
    assert found.verdicts[0] in text
    accuracy = accuracy_score(model.truth, model.predicted)
    shown = next(row for row in parsed.rows if row[0] == "accuracy")
    own = next(row for row in found.rows if row["metric"] == "accuracy")
    assert shown[1] == f"{accuracy:.3f} [{own['ci_low']:.3f}, {own['ci_high']:.3f}]"
    assert len(shown) == 3, "the control stands beside the model"
    recalls = recall_score(model.truth, model.predicted, average=None)
    for index, name in enumerate(HOSTILE):
        of_class, of_matrix = (row for row in parsed.rows if row[0] == name)
        assert of_class[1] == str((model.truth == index).sum())
        assert of_class[4] == f"{recalls[index]:.3f}"
        counts = [((model.truth == index) & (model.predicted == other)).sum() for other in range(4)]
        assert [int(cell) for cell in of_matrix[1:]] == counts


def test_caption_says_cells_level_and_method(tmp_path):
    for level, words in ((0.95, "95 %"), (0.9, "90 %"), (0.999, "99.9 %")):
        _, found = evaluation(level=level)
        _, parsed = page(tmp_path, found)
        assert f"200 test cells; value [{words} interval], bootstrap_quantiles unless noted" in parsed.words


def test_metrics_that_share_a_note_are_named_once(tmp_path):
    _, found = evaluation(method="binomial")
    _, parsed = page(tmp_path, found)
    note = "f1, precision, recall, mcc, auroc, auprc: binomial does not fit this metric: bootstrap_quantiles is used"
    assert parsed.words.count(note) == 1


def test_rare_absent_and_unpredicted_classes_are_marked(tmp_path):
    truth = np.array([0] * 60 + [1] * 4)
    model = LabelPredictions(truth, np.zeros(64, dtype=int), None, ["B", "NK", "T"])
    found = evaluate_predictions(Predictions(["x"] * 64, {"celltype": model}), {}, Settings(resamples=20))
    _, parsed = page(tmp_path, found)
    rare = next(row for row in parsed.rows if row[0] == "NK(rare)")
    assert rare[1:] == ["4", "0", "–", "0.000", "0.000"]
    absent = next(row for row in parsed.rows if row[0] == "T")
    assert absent[1:] == ["0", "0", "–", "–", "–"]


def test_curves_are_drawn_inside_their_box(tmp_path, history):
    _, found = evaluation()
    text, parsed = page(tmp_path, found, history=history)
    charts = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    assert [chart["aria-label"] for chart in charts] == [
        "train/loss, last value 0.100; validation/loss, last value 0.050; steps 1 to 20",
        "validation/celltype_f1, last value 1.000; steps 5 to 20",
    ]
    _, _, width, height = (int(part) for part in charts[0]["viewbox"].split())
    lines = re.findall(r'<polyline[^>]*points="([^"]+)"', text)
    assert [len(line.split()) for line in lines] == [20, 3, 3]
    for point in " ".join(lines).split():
        x, y = (float(part) for part in point.split(","))
        assert 0 <= x <= width
        assert 0 <= y <= height


def test_without_history_there_are_no_curves(tmp_path):
    _, found = evaluation()
    text, _ = page(tmp_path, found, history=tmp_path / "missing.jsonl")
    assert "Learning curves" not in text
    (tmp_path / "empty.jsonl").write_text("")
    assert "Learning curves" not in page(tmp_path, found, history=tmp_path / "empty.jsonl")[0]


def test_many_classes_list_their_largest_confusions_instead_of_a_matrix(tmp_path):
    names = [f"class {i}" for i in range(60)]
    model, found = evaluation(names, strength=0.03)
    text, parsed = page(tmp_path, found)
    wrong = (model.truth != model.predicted).sum()
    assert "among 60 classes" in text
    pairs = [row for row in parsed.rows if len(row) == 4 and row[0].startswith("class ")]
    assert len(pairs) == 30
    assert sum(int(row[2]) for row in pairs) <= wrong
    assert [int(row[2]) for row in pairs] == sorted((int(row[2]) for row in pairs), reverse=True)


def test_regression_and_masked_fields_have_tables_without_class_sections(tmp_path):
    truth = np.linspace(0, 1, 50)
    model = Predictions(
        ["x"] * 50,
        {"age": LabelPredictions(truth, truth**2)},
        {"expressions_accuracy": 0.785, "expressions_constant_accuracy": 0.723},
    )
    controls = {"train_mean": {"age": LabelPredictions(truth, np.full(50, 0.5))}}
    text, parsed = page(tmp_path, evaluate_predictions(model, controls, Settings(resamples=50)))
    assert "Confusion" not in text
    assert next(row for row in parsed.rows if row[0] == "pcc")[2] == "-"
    assert next(row for row in parsed.rows if row[0] == "accuracy") == ["accuracy", "0.785", "0.723"]


def test_preprocessing_facts_notes_and_config_are_shown(tmp_path):
    _, found = evaluation()
    steps = [
        {"step": "read", "cells": 68579, "genes": 20387, "counts": 9.1e7},
        {"step": "scale", "cells": 68579, "genes": 16906, "counts": None},
    ]
    text, parsed = page(tmp_path, found, preprocessing=steps, notes=["preset laptop"], config={"seed": "γ"})
    assert ["read", "68,579", "20,387", "91,000,000"] in parsed.rows
    assert ["scale", "68,579", "16,906", "–"] in parsed.rows
    assert "preset laptop" in text
    assert "γ" in text
    assert "zheng68k" in text
