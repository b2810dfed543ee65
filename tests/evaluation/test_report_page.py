"""report.html: complete without a network, escapes what comes from outside, and shows the numbers of the evaluation."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score

from bmfm_pipeline.evaluation import write_report
from bmfm_pipeline.evaluation.pages import rendering
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.tables import Evaluation, Settings, evaluate_predictions
from bmfm_pipeline.evaluation.wording import verdict_kind

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
            self.rows[-1][-1] += (" " if data.startswith("[") else "") + data.strip()  # bounds stand apart


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


def test_page_loads_nothing_and_runs_nothing_but_its_own_sorting(tmp_path, history):
    _, found = evaluation()
    text, parsed = page(tmp_path, found, history=history, config={"path": "https://example.org/x.h5ad"})
    assert not {tag for tag, _ in parsed.tags} & {"link", "iframe", "img", "image", "use", "object", "embed", "base"}
    for tag, attributes in parsed.tags:
        assert not {"src", "srcset", "action", "data", "xlink:href"} & set(attributes), tag
        assert attributes.get("href", "#").startswith("#"), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "@import" not in text
    assert "url(" not in text
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    assert scripts == [(rendering.TEMPLATES / "sort.js").read_text().strip()]
    policy = next(one["content"] for tag, one in parsed.tags if one.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert len(text) < 100_000


def test_class_names_from_outside_are_escaped(tmp_path):
    _, found = evaluation()
    text, parsed = page(tmp_path, found, title="<b>run</b>", facts={"<i>": "</dl><script>x</script>"}, notes=["<u>"])
    assert text.count("<script") == 1
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
        shares = [f"{100 * count / (model.truth == index).sum():.0f}" for count in counts]
        assert of_matrix[1:] == [f"{count}{share}" for count, share in zip(counts, shares, strict=True)]


def test_caption_says_cells_level_and_method(tmp_path):
    for level, words in ((0.95, "95 %"), (0.9, "90 %"), (0.999, "99.9 %")):
        _, found = evaluation(level=level)
        _, parsed = page(tmp_path, found)
        assert f"200 test cells; value [{words} interval], bootstrap_quantiles unless noted" in parsed.words


def test_metrics_that_share_a_note_are_named_once(tmp_path):
    _, found = evaluation(method="binomial")
    _, parsed = page(tmp_path, found)
    notes = [
        words
        for words in parsed.words
        if words.endswith(": binomial does not fit this metric: bootstrap_quantiles is used")
    ]
    assert len(notes) == 1 and notes[0].startswith("f1, precision, recall, mcc,")


def test_rare_absent_and_unpredicted_classes_are_marked(tmp_path):
    truth = np.array([0] * 60 + [1] * 4)
    model = LabelPredictions(truth, np.zeros(64, dtype=int), None, ["B", "NK", "T"])
    found = evaluate_predictions(Predictions(["x"] * 64, {"celltype": model}), {}, Settings(resamples=20))
    _, parsed = page(tmp_path, found)
    rare = next(row for row in parsed.rows if row[0] == "NK(rare)")
    assert rare[1:5] == ["4", "0", "–", "0.000"] and rare[5].startswith("0.000")
    absent = next(row for row in parsed.rows if row[0] == "T")
    assert absent[1:] == ["0", "0", "–", "–", "–"]


def test_curves_are_drawn_inside_their_box(tmp_path, history):
    _, found = evaluation()
    text, parsed = page(tmp_path, found, history=history)
    charts = [attributes for tag, attributes in parsed.tags if tag == "svg" and "step" in attributes["aria-label"]]
    assert [chart["aria-label"] for chart in charts] == [
        "train/loss, last value 0.100; validation/loss, last value 0.050; steps 1 to 20",
        "validation/celltype_f1, last value 1.000; steps 5 to 20",
    ]
    width, height = (float(part) for part in charts[0]["viewbox"].split()[2:])
    for path in re.findall(r'<path d="([^"]+)"', text[text.index("Learning curves") :]):
        for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height


def test_without_history_there_are_no_curves(tmp_path):
    _, found = evaluation()
    text, _ = page(tmp_path, found, history=tmp_path / "missing.jsonl")
    assert "Learning curves" not in text and "#curves" not in text
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


def test_numbers_have_tables_without_class_sections(tmp_path):
    truth = np.linspace(0, 1, 50)
    model = Predictions(["x"] * 50, {"age": LabelPredictions(truth, truth**2)})
    controls = {"train_mean": {"age": LabelPredictions(truth, np.full(50, 0.5))}}
    text, parsed = page(tmp_path, evaluate_predictions(model, controls, Settings(resamples=50)))
    assert "Classes of" not in text
    assert next(row for row in parsed.rows if row[0] == "pcc")[2] == "-"


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


def calibration() -> dict:
    def bounded(value):
        return {"value": value, "ci_low": value / 2, "ci_high": value * 2, "ci_method": "bootstrap_quantiles", "n": 200}

    bins = [{"low": x, "high": x + 0.2, "confidence": x + 0.1, "accuracy": x, "n": 40} for x in (0.2, 0.4, 0.6, 0.8)]
    points = [{"coverage": x / 20, "risk": x / 100, "threshold": 1 - x / 20, "n": 10 * x} for x in range(1, 21)]
    entry = {
        "temperature": 1.5,
        "n_dev": 80,
        "encoder_share": 0.35,
        "ece": bounded(0.1),
        "brier": bounded(0.3),
        "bins": bins,
        "risk_coverage": points,
        "aurc": bounded(0.08),
        "unknown": {"threshold": 0.4, "share": 0.125, "accuracy_of_known": 0.9},
    }
    return {"celltype": entry, "age": {}}


def test_sections_are_there_when_their_files_are(tmp_path):
    _, found = evaluation()
    text, _ = page(tmp_path, found)
    for place in ("calibration", "map", "confused", "genes", "cost", "environment", "curves", "gene-errors"):
        assert f'id="{place}"' not in text and f'"#{place}"' not in text
    found.gene_errors = {"expressions": {"genes": 9, "compared": 4, "least_positions": 5, "worse_than_null": 0.25}}
    options = {
        "calibration": calibration(),
        "embedding_map": {"method": "umap", "x": [0, 1, 2], "y": [1, 0, 2], "n_of": 9, "truth": {"celltype": ["B", "B", None]}},
        "confused": {"measure": "counts", "labels": {"celltype": [PAIR]}},
        "genes": {"categories": {"matched": {"names": 3, "share_of_counts": 0.5, "examples": ["A"]}}, "names": 4},
        "costs": {"evaluate": {"steps": [{"step": "predict", "seconds": 61, "processor_seconds": 9, "peak_bytes": 2e9, "attempts": 2}]}},
        "environment": {"processor": "abacus"},
    }  # fmt: skip
    text, parsed = page(tmp_path, found, **options, text=tmp_path / "report.md", figures=tmp_path / "figures")
    for place in ("calibration", "map", "confused", "genes", "cost", "environment", "gene-errors"):
        assert f'id="{place}"' in text, place
    assert "1.500, fitted on 80 dev cells" in text and "12.5 % of the cells, below confidence 0.400" in text
    assert ["CD79A", "0.10", "2.00", "+1.90", "1.00"] in parsed.rows
    assert ["evaluate", "predict", "1 min 1 s", "9.0 s", "2 GB", "in 2 attempts"] in parsed.rows
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"reliability-of-celltype.svg", "reliability-of-celltype.png", "umap-by-truth-of-celltype.svg"} <= names
    written = (tmp_path / "report.md").read_text()
    assert "| CD79A | 0.10 | 2.00 | +1.90 | 1.00 |" in written and "25.0 %" in written


PAIR = {
    "true": "B", "predicted": "T", "cells": 4, "of": 10, "share": 0.4, "right_cells": 6, "position": 0.5,
    "training_cells": {"true": 50, "predicted": 60}, "genes_of_confused": [],
    "genes_of_classes": [{"gene": "CD79A", "mean_true": 0.1, "mean_predicted": 2.0, "difference": 1.9, "effect": 1.9, "mean_confused": 1.0}],
}  # fmt: skip


def test_headings_are_in_order_and_headers_have_a_scope(tmp_path, history):
    _, found = evaluation()
    _, parsed = page(tmp_path, found, history=history, calibration=calibration(), preprocessing=[{"step": "read", "cells": 1, "genes": 1, "counts": 1}])  # fmt: skip
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in parsed.tags if tag == "th")
    pictures = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    assert pictures and all(one["role"] == "img" and one["aria-label"] for one in pictures)
    assert {"title", "desc"} <= {tag for tag, _ in parsed.tags}
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_markdown_has_the_same_numbers_and_takes_nothing_of_the_data_for_markup(tmp_path):
    _, found = evaluation()
    page(tmp_path, found, text=tmp_path / "report.md")
    written = (tmp_path / "report.md").read_text()
    accuracy = next(row for row in found.rows if row["metric"] == "accuracy" and row["model"] == "model")
    assert f"| accuracy | {accuracy['value']:.3f} [{accuracy['ci_low']:.3f}, {accuracy['ci_high']:.3f}] |" in written
    assert "<script" not in written.replace("\\<script", "") and "\\<script\\>" in written
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert lines and all(line.endswith("|") for line in lines)


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("celltype: the model is better than logistic regression by 1.3 points", "better"),
        ("celltype: the model is worse than the commonest class", "worse"),
        ("celltype: no evidence that the model is better or worse than logistic regression", "open"),
        ("no evidence that pretraining helped", "open"),
        ("celltype: the model is not shown to differ from logistic regression", "open"),
    ],
)
def test_verdicts_are_marked_as_their_words_say(sentence, kind):
    assert verdict_kind(sentence) == kind


def test_many_targets_are_folded_under_one_heading_each(tmp_path):
    labels = {f"marks: {name}": predictions(["no", "yes"], seed=index) for index, name in enumerate("abcdefgh")}
    found = evaluate_predictions(Predictions([str(i) for i in range(200)], labels), {}, Settings(resamples=20))
    text, parsed = page(tmp_path, found)
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings[:3] == ["Metrics", "Classes", "Confusion"]
    assert text.count("<summary>marks: c</summary>") == 3
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and "shares-8" in ids


def test_many_classes_without_any_confusion_say_so(tmp_path):
    truth = np.arange(120) % 60
    perfect = LabelPredictions(truth, truth, None, [f"class {i}" for i in range(60)])
    found = evaluate_predictions(
        Predictions([str(i) for i in truth], {"celltype": perfect}), {}, Settings(resamples=20)
    )
    assert "None of the cells were taken for another class." in page(tmp_path, found)[0]
