"""Charts of an evaluation: metrics beside controls, learning curves, reliability, risk by coverage."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.numbers import number, observed, percent, with_interval

WIDTH = 340
# Of a target, the metrics that are drawn when it has them, at most FORESTS of them.
DRAWN = ("accuracy", "f1", "f1_without_rare", "mcc", "auroc", "mse", "mae", "pcc", "ece")
FORESTS = 3
# With more targets than these (the classes of a column of several), charts would fill a page.
MOST_TARGETS_WITH_CHARTS = 6
TITLES = {"f1": "macro-F1", "f1_without_rare": "macro-F1 without rare classes", "ece": "calibration error (ECE)"}


def forests(target: str, rows: list[dict[str, Any]], names: dict[str, str]) -> list[Drawing]:
    """One panel per metric: a mark and an interval for the model, and below it each control. `rows` are those of metrics.json."""
    own = [row for row in rows if row["target"] == target and row["value"] is not None]
    panels = []
    for metric in [name for name in DRAWN if any(row["metric"] == name for row in own)][:FORESTS]:
        found = [row for row in own if row["metric"] == metric]
        if len(found) > 1 or found[0]["ci_low"] is not None:
            panels.append(_forest(target, metric, found, names))
    return panels


def _forest(target: str, metric: str, rows: list[dict[str, Any]], names: dict[str, str]) -> Drawing:
    title = f"{TITLES.get(metric, metric)} of {target}"
    said = "; ".join(f"{names.get(row['model'], row['model'])} {with_interval(row)}" for row in rows)
    top, step, left, right = 30, 34, 14, WIDTH - 14
    drawing = Drawing(WIDTH, top + step * len(rows) + 26, title, f"{title}: {said}")
    drawing.text(left, 16, TITLES.get(metric, metric), colour="ink", size=13, bold=True)
    ends = [row[key] for row in rows for key in ("value", "ci_low", "ci_high") if row[key] is not None]
    ticks = nice_ticks(min(ends), max(ends))
    first, last = ticks[0], ticks[-1]

    def across(value: float) -> float:
        return left + (right - left) * (value - first) / (last - first)

    floor = top + step * len(rows)
    for tick in ticks:
        drawing.line(across(tick), top - 4, across(tick), floor)
        anchor = "start" if tick == first else "end" if tick == last else "middle"
        drawing.text(across(tick), floor + 15, f"{tick:g}", anchor=anchor)
    for index, row in enumerate(rows):
        is_model, middle = row["model"] == "model", top + step * index + 23
        colour = "mark" if is_model else "soft"
        drawing.text(
            left, middle - 10, names.get(row["model"], row["model"]), colour="ink", size=12, bold=is_model, halo=True
        )
        drawing.text(right, middle - 10, number(row["value"]), colour="ink", anchor="end", size=12, halo=True)
        if row["ci_low"] is not None and row["ci_high"] is not None:
            drawing.line(across(row["ci_low"]), middle, across(row["ci_high"]), middle, colour, 2)
            for end in (row["ci_low"], row["ci_high"]):
                drawing.line(across(end), middle - 4, across(end), middle + 4, colour, 2)
        drawing.dots([(across(row["value"]), middle)], colour, size=9, square=is_model, hollow=not is_model)
    return drawing


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that hold `low` and `high` between the first and the last of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(start, max(end, start + 1) + 1)]


def curves(history: Path | None) -> list[Drawing]:
    """Learning curves of a history.jsonl: training and validation loss in one chart, each score of validation in its own."""
    series = _series(history)
    losses = [name for name in ("train/loss", "validation/loss") if name in series]
    others = [name for name in series if name.endswith(("_accuracy", "_f1", "_pcc")) and name not in losses]
    return [curve_chart(names, series) for names in [losses, *([name] for name in others)] if names]


def _series(history: Path | None) -> dict[str, list[tuple[float, float]]]:
    if history is None or not Path(history).exists():
        return {}
    series: dict[str, list[tuple[float, float]]] = {}
    for line in Path(history).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if name not in ("step", "epoch", "learning_rate") and numeric:
                series.setdefault(name, []).append((entry["step"], value))
    return {name: points for name, points in series.items() if len(points) > 1}


def curve_chart(names: list[str], series: dict[str, list[tuple[float, float]]]) -> Drawing:
    """One chart of at most two named series of (step, value)."""
    points = [point for name in names for point in series[name]]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    said = "".join(f"{name}, last value {number(series[name][-1][1])}; " for name in names)
    box = Box(
        Drawing(WIDTH, 190, " and ".join(names), f"{said}steps {first:g} to {last:g}"),
        (first, last),
        (min(y for _, y in points), max(y for _, y in points)),
    )
    box.axes(f"step {first:g}", f"{last:g}", number(box.y[0]), number(box.y[1]))
    styles = (("mark", ""), ("second", "5 3"))
    for at, (name, (colour, dash)) in enumerate(zip(names, styles, strict=False)):
        box.curve(thinned(series[name]), colour, dash)
        x = 8 + at * 150
        box.drawing.line(x, 10, x + 18, 10, colour, 2, dash)
        box.drawing.text(x + 23, 14, f"{name} {number(series[name][-1][1])}", colour="ink")
    return box.drawing


def thinned(points: list[tuple[float, float]], most: int = 500) -> list[tuple[float, float]]:
    """At most `most` of the points, evenly, the last among them."""
    step = math.ceil(len(points) / most)
    return points if step <= 1 else [*points[:-1][::step], points[-1]]


def reliability(target: str, entry: dict[str, Any]) -> Drawing | None:
    """How often the model is right (up) by how sure it is (across), one mark for each bin of cells."""
    bins = [part for part in entry.get("bins") or [] if part["n"] and part["accuracy"] is not None]
    if not bins:
        return None
    largest = max(bins, key=lambda part: abs(part["accuracy"] - part["confidence"]))
    side = "too sure" if largest["confidence"] > largest["accuracy"] else "not sure enough"
    box = Box(
        Drawing(
            WIDTH,
            250,
            f"reliability of {target}",
            f"share of right {observed()} against confidence, {len(bins)} bins; expected calibration error {with_interval(entry.get('ece'))}; "
            f"furthest from the diagonal: confidence {number(largest['confidence'])}, right {number(largest['accuracy'])} ({side})",
        ),
        (0, 1),
        (0, 1),
    )
    box.axes("0", "1", "0", "1", across="confidence", up=f"share of right {observed()}; dashed: as often right as sure")
    box.curve([(0, 0), (1, 1)], "soft", "4 4")
    most = max(part["n"] for part in bins)
    for part in bins:
        x, y = box.place(part["confidence"], part["accuracy"])
        _, diagonal = box.place(part["confidence"], part["confidence"])
        box.drawing.line(x, diagonal, x, y, "mark", 2)
        box.drawing.dots([(x, y)], "mark", size=5 + 6 * math.sqrt(part["n"] / most))
    return box.drawing


def risk_coverage(target: str, entry: dict[str, Any]) -> Drawing | None:
    """The share of wrong cells (up) when only the surest share of the cells (across) is answered."""
    points = [(part["coverage"], part["risk"]) for part in entry.get("risk_coverage") or [] if part["risk"] is not None]
    if len(points) < 2:
        return None
    points.sort()
    half = min(points, key=lambda point: abs(point[0] - 0.5))
    box = Box(
        Drawing(
            WIDTH,
            250,
            f"risk by coverage of {target}",
            f"share of wrong {observed()} against share of {observed()} answered, the surest first: {percent(points[-1][1])} of all, "
            f"{percent(half[1])} at coverage {number(half[0])}; area {with_interval(entry.get('aurc'))}",
        ),
        (0, 1),
        (0, max(0.01, *(risk for _, risk in points))),
    )
    box.axes(
        "0",
        "1",
        "0",
        f"{100 * box.y[1]:.3g} %",
        across=f"share of {observed()} answered",
        up=f"share of wrong {observed()} among them",
    )
    box.curve(points, "mark", "")
    threshold = (entry.get("unknown") or {}).get("share")
    if threshold is not None:
        x, _ = box.place(1 - threshold, 0)
        box.drawing.line(x, box.top, x, box.floor, "second", 1.5, "4 3")
        box.drawing.text(x - 5, box.floor - 8, f"{percent(threshold)} unknown", colour="ink", anchor="end", halo=True)
    return box.drawing


class Box:
    """The part of a drawing that holds points: from values of `x` and `y` (low, high) to places on the sheet."""

    def __init__(self, drawing: Drawing, x: tuple[float, float], y: tuple[float, float], left: float = 56):
        self.drawing, self.x, self.y = drawing, x, y
        self.left, self.right, self.top, self.floor = left, drawing.width - 10, 28, drawing.height - 24

    def place(self, x: float, y: float) -> tuple[float, float]:
        wide, tall = self.x[1] - self.x[0] or 1, self.y[1] - self.y[0] or 1
        return (
            self.left + (self.right - self.left) * (x - self.x[0]) / wide,
            self.floor - (self.floor - self.top) * (y - self.y[0]) / tall,
        )

    def axes(self, first: str, last: str, low: str, high: str, *, across: str = "", up: str = "") -> None:
        """Both axes, the numbers at their ends, and what they count."""
        self.drawing.line(self.left, self.floor, self.right, self.floor, "soft")
        self.drawing.line(self.left, self.top, self.left, self.floor, "soft")
        self.drawing.text(self.left, self.floor + 16, first)
        self.drawing.text(self.right, self.floor + 16, last, anchor="end")
        self.drawing.text((self.left + self.right) / 2, self.floor + 16, across, anchor="middle")
        self.drawing.text(self.left - 5, self.floor, low, anchor="end")
        self.drawing.text(self.left - 5, self.top + 9, high, anchor="end")
        self.drawing.text(8, 14, up)

    def curve(self, points: Iterable[tuple[float, float]], colour: str, dash: str) -> None:
        self.drawing.curve([self.place(x, y) for x, y in points], colour, 1.8, dash)
