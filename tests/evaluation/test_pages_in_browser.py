"""Pages in a real browser: nothing is asked for, nothing complains, nothing is wider than a phone; tables sort, matrices toggle."""

import json

import numpy as np
import pytest
from browser import CHROMIUM, Browser

from bmfm_pipeline.evaluation.pages.palette import DARK, LIGHT, rgb
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.report import write_report
from bmfm_pipeline.evaluation.tables import Settings, evaluate_predictions

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; install it with `apt-get install chromium`"),
    pytest.mark.timeout(120),
]
NAMES = [
    "CD4+/CD45RA+/CD25- Naive T of a_very_long_name_without_a_place_to_break_it_anywhere",
    "B",
    "<NK>",
    "Dendritic",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with every section, about 300 cells."""
    folder = tmp_path_factory.mktemp("page")
    generator = np.random.default_rng(0)
    truth = generator.choice(4, 300, p=[0.4, 0.3, 0.2, 0.1])
    probabilities = generator.dirichlet(np.ones(4), size=300)
    probabilities[np.arange(300), truth] += 0.5
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    model = LabelPredictions(truth, probabilities.argmax(axis=1), probabilities, NAMES)
    control = {"logistic_l2": {"celltype": LabelPredictions(truth, np.roll(truth, 7), None, NAMES)}}
    found = evaluate_predictions(Predictions([str(i) for i in range(300)], {"celltype": model}), control, Settings(resamples=50))  # fmt: skip
    history = folder / "history.jsonl"
    history.write_text("".join(json.dumps({"step": s, "train/loss": 1 / s}) + "\n" for s in range(1, 30)))
    x, y = (generator.normal(size=300).tolist() for _ in "xy")
    named = [NAMES[index] for index in truth]
    gene = {"gene": "CD79A", "mean_true": 0.1, "mean_predicted": 2.0, "effect": 1.9, "mean_confused": 1.0}
    pair = {
        "true": NAMES[0], "predicted": "B", "cells": 4, "of": 10, "share": 0.4, "right_cells": 6, "position": 0.5,
        "training_cells": {"true": 50, "predicted": 60}, "genes_of_classes": [gene], "genes_of_confused": [],
    }  # fmt: skip
    bins = [{"low": 0, "high": 1, "confidence": c, "accuracy": c, "n": 9} for c in (0.2, 0.5, 0.9)]
    points = [{"coverage": c, "risk": c / 10, "n": 1} for c in (0.1, 0.5, 1.0)]
    write_report(
        folder / "report.html",
        found,
        title="run: evaluation",
        facts={"model": "/a" * 60},
        history=history,
        calibration={"celltype": {"temperature": 1.1, "bins": bins, "risk_coverage": points}},
        embedding_map={"method": "umap", "x": x, "y": y, "truth": {"celltype": named}, "confidence": {"celltype": x}},
        confused={"measure": "counts", "labels": {"celltype": [pair]}},
        genes={"categories": {"unknown": {"names": 3, "share_of_counts": 0.5, "examples": ["A" * 80]}}, "names": 4},
        preprocessing=[{"step": "Bin(num_bins=10, binning_method=int_cast)", "cells": 9, "genes": 9, "counts": 9}],
        costs={"evaluate": {"steps": [{"step": "predict", "seconds": 1, "processor_seconds": 1, "peak_bytes": 1e9, "attempts": 1}]}},
        config={"key": "x" * 300},
    )  # fmt: skip
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_page_asks_for_nothing_says_nothing_and_fits(browser, report, width):
    browser.open(report, width=width)
    assert browser.requests == [report.as_uri()]
    assert browser.said == []
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    wide = browser.evaluate(
        "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll') && !one.closest('svg') && !one.closest('pre')"
        " && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(one => one.outerHTML.slice(0, 80))"
    )
    assert wide == []


@pytest.mark.parametrize(("scheme", "colours"), [("light", LIGHT), ("dark", DARK)])
def test_page_follows_the_colour_scheme_of_the_reader(browser, report, scheme, colours):
    browser.open(report, scheme=scheme)
    shown = browser.evaluate("getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color")
    assert shown == "rgb({}, {}, {})".format(*rgb(colours["ground"])) + "rgb({}, {}, {})".format(*rgb(colours["ink"]))
    stroke = browser.evaluate("getComputedStyle(document.querySelector('svg path[style*=mark]')).stroke")
    assert stroke == "rgb({}, {}, {})".format(*rgb(colours["mark"]))


def test_tables_of_classes_sort_by_a_click_and_are_whole_without_one(browser, report):
    browser.open(report)
    column = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[1].textContent)"
    before = browser.evaluate(column)
    assert len(before) == 4
    for direction, turn in (("descending", True), ("ascending", False)):
        browser.evaluate("document.querySelectorAll('table.sortable thead button')[1].click()")
        assert browser.evaluate(column) == sorted(before, key=int, reverse=turn)
        head = "document.querySelectorAll('table.sortable thead th')[1].getAttribute('aria-sort')"
        assert browser.evaluate(head) == direction
    browser.evaluate("document.querySelectorAll('table.sortable thead button')[0].click()")
    names = browser.evaluate("[...document.querySelectorAll('table.sortable tbody tr')].map(row => row.cells[0].title)")
    assert names == ["<NK>", "B", NAMES[0], "Dendritic"]


def test_matrix_shows_cells_or_shares(browser, report):
    browser.open(report)
    visible = "[...document.querySelectorAll('table.matrix td .{}')].filter(one => one.offsetWidth > 0).length"
    assert (browser.evaluate(visible.format("count")), browser.evaluate(visible.format("part"))) == (16, 0)
    browser.evaluate("document.querySelector('input.shares').click()")
    assert (browser.evaluate(visible.format("count")), browser.evaluate(visible.format("part"))) == (0, 16)


def test_printed_page_shows_closed_parts_and_no_controls(browser, report):
    browser.open(report, media="print", width=800)
    assert browser.evaluate("document.querySelector('nav').offsetHeight") == 0
    assert browser.evaluate("document.querySelector('input.shares').offsetWidth") == 0
    assert browser.evaluate("document.querySelector('details.pair table').offsetHeight") > 0
    assert browser.evaluate("document.querySelector('details.only-on-screen').offsetHeight") == 0
