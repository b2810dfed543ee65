"""Figures and colours of pages: readable in both schemes, drawn inside their sheet, the same as SVG and as PNG."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from bmfm_pipeline.evaluation.pages import palette
from bmfm_pipeline.evaluation.pages.charts import forests, nice_ticks, reliability, risk_coverage, thinned
from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.maps import COLOURED, embedding_maps, shaded_confusion
from bmfm_pipeline.evaluation.pages.numbers import duration, number, size, with_interval
from bmfm_pipeline.evaluation.pages.rendering import TEMPLATES

SVG = "{http://www.w3.org/2000/svg}"


def colours_of_css() -> dict[str, dict[str, str]]:
    """{scheme: {name: colour}} of the style that pages carry."""
    light, dark = palette.css().split("@media (prefers-color-scheme: dark)")
    return {
        scheme: dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6});", text)) for scheme, text in (("light", light), ("dark", dark))
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_from_their_ground(scheme):
    colours = colours_of_css()[scheme]
    for name in ("ink", "soft", "mark", "good", "bad", "second"):
        for ground in ("ground", "panel"):
            assert palette.contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in (*palette.CATEGORIES, "other"):
        assert palette.contrast(colours[name], colours["ground"]) >= 3, name
    style = (TEMPLATES / "style.css").read_text()
    strongest = float(re.search(r"var\(--share, 0\) \* (\.\d+)", style).group(1))
    assert strongest == palette.STRONGEST_SHADE
    fullest = palette.mixed(colours["mark"], colours["ground"], strongest)
    assert palette.contrast(colours["ink"], fullest) >= 4.5
    assert set(re.findall(r"var\(--([a-z0-9]+)\)", style)) <= set(colours)


def test_contrast_is_that_of_the_web_guidelines():
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # just too little for text


def drawing() -> Drawing:
    sheet = Drawing(100, 60, "a <title>", 'says "what"')
    sheet.line(0, 0, 100, 60, dash="4 2")
    sheet.area([(0, 0), (10, 0), (10, 10)], "good", 0.5)
    sheet.boxes([(80, 5, 10, 10)], "bad")
    sheet.dots([(50, 30)], "c0", size=12, square=True)
    sheet.dots([(20, 30)], "c1", size=12, hollow=True)
    sheet.dots([], "c2")
    sheet.text(5, 50, "a & $b", halo=True)
    return sheet


def test_svg_is_well_formed_and_says_what_it_shows():
    for alone in (False, True):
        root = ElementTree.fromstring(drawing().svg(alone=alone))
        assert root.attrib["role"] == "img" and root.attrib["aria-label"] == 'says "what"'
        assert root.findtext(f"{SVG}title") == "a <title>" and root.findtext(f"{SVG}desc") == 'says "what"'
        assert root.findtext(f"{SVG}text") == "a & $b"
        assert (root.find(f"{SVG}style") is not None) == alone, "a file brings its colours"


def test_png_has_the_shapes_where_the_svg_has_them(tmp_path):
    from matplotlib.image import imread

    drawing().write_png(tmp_path / "figure.png", scale=1)
    picture = imread(tmp_path / "figure.png")[..., :3]
    assert picture.shape == (60, 100, 3)
    for (x, y), name in {(84, 9): "bad", (50, 30): "c0", (20, 30): "ground", (95, 30): "ground"}.items():
        assert np.abs(picture[y, x] * 255 - palette.rgb(palette.LIGHT[name])).max() < 3, (x, y)


def rows(values: dict[str, tuple], metric="accuracy"):
    return [
        {"metric": metric, "target": "celltype", "model": name, "value": value, "ci_low": low, "ci_high": high}
        for name, (value, low, high) in values.items()
    ]


def test_forest_has_a_mark_for_the_model_and_one_for_each_control():
    found = rows({"model": (0.8, 0.7, 0.9), "majority": (0.3, 0.3, 0.3), "logistic_l2": (0.75, None, None)})
    (panel,) = forests("celltype", found, {"majority": "commonest class"})
    assert "model 0.800 [0.700, 0.900]; commonest class 0.300 [0.300, 0.300]; logistic_l2 0.750" in panel.about
    marks = [shape for shape in panel.shapes if shape[0] == "dots"]
    assert [shape[4] for shape in marks] == [True, False, False], (
        "the model's mark differs in shape, not only in colour"
    )
    xs = [shape[1][0][0] for shape in marks]
    assert all(0 < x < panel.width for x in xs) and xs[1] < xs[2] < xs[0]
    assert forests("celltype", rows({"model": (None, None, None)}), {}) == []
    assert forests("celltype", rows({"model": (0.5, None, None)}), {}) == [], "one number alone is no comparison"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.37), (-3, 250), (0.5, 0.5), (0, 0), (1e-6, 3e-6)])
def test_ticks_hold_the_values_between_them(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 8
    assert len(set(np.round(np.diff(ticks), 12))) == 1


def test_long_curves_are_thinned_and_keep_their_last_point():
    points = [(float(x), 0.0) for x in range(10_001)]
    kept = thinned(points)
    assert len(kept) <= 501 and kept[0] == points[0] and kept[-1] == points[-1]
    assert thinned(points[:10]) == points[:10]


def test_reliability_says_where_the_model_is_too_sure():
    bins = [
        {"low": 0.4, "high": 0.6, "confidence": 0.5, "accuracy": 0.52, "n": 50},
        {"low": 0.6, "high": 1, "confidence": 0.9, "accuracy": 0.6, "n": 10},
        {"low": 1, "high": 1, "confidence": None, "accuracy": None, "n": 0},
    ]
    chart = reliability("celltype", {"bins": bins})
    assert "2 bins" in chart.about and "confidence 0.900, right 0.600 (too sure)" in chart.about
    assert reliability("celltype", {"bins": []}) is None and reliability("celltype", {}) is None


def test_risk_by_coverage_is_read_from_left_to_right():
    points = [{"coverage": c, "risk": r, "n": 1} for c, r in ((1.0, 0.2), (0.5, 0.05), (0.25, 0.0))]
    chart = risk_coverage("celltype", {"risk_coverage": points, "unknown": {"share": 0.25}})
    assert "20.0 % of all, 5.0 % at coverage 0.500" in chart.about
    (line,) = (shape[1][0] for shape in chart.shapes if shape[0] == "path" and shape[2] == "mark")
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert any("25.0 % unknown" in shape[3] for shape in chart.shapes if shape[0] == "text")
    assert risk_coverage("celltype", {"risk_coverage": points[:1]}) is None


def test_a_map_of_five_thousand_cells_is_small_and_counts_every_cell():
    generator = np.random.default_rng(0)
    names = [f"type {i}" for i in range(COLOURED + 3)]
    truth = [names[i] for i in generator.integers(0, len(names), 5000)]
    truth[:7] = [None] * 7
    found = {
        "method": "umap",
        "x": generator.normal(size=5000).tolist(),
        "y": (3 * generator.normal(size=5000)).tolist(),
        "truth": {"celltype": truth},
        "predicted": {"celltype": truth[::-1]},
        "confidence": {"celltype": generator.uniform(size=5000).tolist()},
    }
    maps = embedding_maps(found, "celltype")
    assert [one["what"] for one in maps] == ["truth", "prediction", "confidence"]
    for one in maps:
        assert sum(row["cells"] for row in one["legend"]) == 5000
        assert len(one["drawing"].svg()) < 150_000
        for shape in one["drawing"].shapes:
            if shape[0] == "dots":
                assert all(0 <= x <= one["drawing"].width and 0 <= y <= one["drawing"].height for x, y in shape[1])
        numbers = [shape[1:3] for shape in one["drawing"].shapes if shape[0] == "text"]
        assert all(abs(a - c) >= 13 or abs(b - d) >= 13 for (a, b), (c, d) in itertools.combinations(numbers, 2))
    assert [row["name"] for row in maps[0]["legend"][-2:]] == ["3 more classes", "no label"]
    first, second = ({row["number"]: row["name"] for row in one["legend"] if row["number"]} for one in maps[:2])
    assert first == second, "a class has the same colour and number in both maps"


def test_many_classes_are_shaded_by_their_share_of_the_row():
    counts = [[8, 2, 0], [0, 0, 0], [5, 0, 5]]
    sheet = shaded_confusion("celltype", ["a", "b", "c"], counts)
    boxes = {shape[3]: len(shape[1]) for shape in sheet.shapes if shape[0] == "boxes"}
    assert boxes == {1.0: 1, 0.4: 1, 0.6: 2}
    assert "65.0 % of the cells lie on the diagonal" in sheet.about


def test_numbers_are_short():
    assert [number(x) for x in (None, 0, 0.81234, 0.00123456, 12345.6)] == [
        "–",
        "0.000",
        "0.812",
        "0.001235",
        "1.235e+04",
    ]
    assert with_interval({"value": 0.5, "ci_low": None, "ci_high": 1}) == "0.500" and with_interval(None) == ""
    assert [duration(x) for x in (None, 0.04, 61, 7265)] == ["–", "0.0 s", "1 min 1 s", "2 h 1 min"]
    assert [size(x) for x in (None, 900, 1.5e6, 2e9)] == ["–", "900 B", "1.5 MB", "2 GB"]
