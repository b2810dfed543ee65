"""report.html: one self-contained page; every string from outside is escaped by the template engine."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmfm_pipeline.evaluation.controls import DESCRIPTIONS
from bmfm_pipeline.evaluation.tables import LABELS, Evaluation, number, with_interval

TEMPLATE = Path(__file__).with_name("report.html")
# A larger confusion matrix cannot be read as a table; its largest confusions are listed instead.
LARGEST_MATRIX = 40
LISTED_CONFUSIONS = 30
WIDTH, HEIGHT, LEFT, BOTTOM = 340, 170, 52, 22  # of a chart and of the margins that hold its numbers


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    *,
    title: str,
    facts: dict[str, Any],
    notes: Sequence[str] = (),
    history: Path | None = None,
    preprocessing: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write the page: verdict first, metrics beside controls, classes, confusion, curves, data, config.

    `facts` are shown as a list of what and value; `history` is a history.jsonl; `preprocessing` rows of step, cells, genes, counts.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: "–" if value is None else number(value)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        verdicts=[{"text": text, "kind": _kind(text)} for text in evaluation.verdicts],
        notes=[*evaluation.notes, *notes],
        level=f"{100 * evaluation.level:g}",
        tables=_metric_tables(evaluation.rows),
        per_class=evaluation.per_class,
        confusion={name: _confusion(matrix) for name, matrix in evaluation.confusion.items()},
        curves=_curves(history),
        chart={"width": WIDTH, "height": HEIGHT, "left": LEFT, "floor": HEIGHT - BOTTOM},
        preprocessing=preprocessing or [],
        facts=facts,
        controls={
            LABELS.get(name, name): text
            for name, text in DESCRIPTIONS.items()
            if any(row["model"] == name for row in evaluation.rows)
        },
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
    )
    Path(path).write_text(page, encoding="utf-8")


def _kind(verdict: str) -> str:
    """How the sentence is marked; the words carry the meaning, the colour only repeats it."""
    return next((kind for kind in ("better", "worse") if f"the model is {kind} than" in verdict), "open")


def _metric_tables(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tables = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        models = list(dict.fromkeys(row["model"] for row in own))
        metrics = list(dict.fromkeys(row["metric"] for row in own))
        found = {(row["metric"], row["model"]): row for row in own}
        methods = [row["ci_method"] for row in own if row["ci_low"] is not None]
        tables.append(
            {
                "target": target,
                "models": [LABELS.get(model, model) for model in models],
                "n": next((row["n"] for row in own if row["n"]), None),
                "split": own[0]["split"],
                "rows": [
                    [metric, *(with_interval(found.get((metric, model))) for model in models)] for metric in metrics
                ],
                "notes": _notes(own),
                # The configured method comes first wherever it fits; where it fits nowhere, the notes say what stands in.
                "method": methods[0] if methods else None,
            }
        )
    return tables


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """Each note once, with the metrics it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        for note in (row.get("note") or "").split("; "):
            if note:
                about.setdefault(note, []).append(row["metric"])
    return [f"{', '.join(dict.fromkeys(metrics))}: {note}" for note, metrics in about.items()]


def _confusion(matrix: dict[str, Any]) -> dict[str, Any]:
    """A shaded table, or for many classes the largest confusions."""
    classes, counts = matrix["classes"], matrix["counts"]
    totals = [sum(row) for row in counts]
    if len(classes) > LARGEST_MATRIX:
        wrong = sorted(
            (
                (count, true, guess)
                for true, row in enumerate(counts)
                for guess, count in enumerate(row)
                if count and true != guess
            ),
            key=lambda found: (-found[0], found[1], found[2]),
        )
        pairs = [
            {"true": classes[true], "predicted": classes[guess], "count": count, "total": totals[true]}
            for count, true, guess in wrong[:LISTED_CONFUSIONS]
        ]
        return {"pairs": pairs, "n_classes": len(classes), "n_pairs": len(wrong)}
    rows = [
        {
            "name": name,
            "total": total,
            "cells": [
                {"count": count, "share": count / total if total else 0, "right": guess == true}
                for guess, count in enumerate(row)
            ],
        }
        for true, (name, total, row) in enumerate(zip(classes, totals, counts, strict=True))
    ]
    return {"classes": classes, "rows": rows}


def _curves(history: Path | None) -> list[dict[str, Any]]:
    """One small chart per curve, as points of an SVG polyline; training and validation loss share one."""
    if history is None or not Path(history).exists():
        return []
    series: dict[str, list[tuple[int, float]]] = {}
    for line in Path(history).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if name not in ("step", "epoch", "learning_rate") and numeric:
                series.setdefault(name, []).append((entry["step"], value))
    series = {name: points for name, points in series.items() if len(points) > 1}
    losses = [name for name in ("train/loss", "validation/loss") if name in series]
    others = [name for name in series if name.endswith(("_accuracy", "_f1", "_pcc"))]
    return [_chart(names, series) for names in [losses, *([name] for name in others)] if names]


def _chart(names: list[str], series: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    points = [point for name in names for point in series[name]]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    width, height = last - first or 1, high - low or 1

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - 8) * (x - first) / width
        down = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 10) * (y - low) / height
        return f"{across:.1f},{down:.1f}"

    lines = [
        {
            "name": name,
            "points": " ".join(place(x, y) for x, y in series[name]),
            "final": series[name][-1][1],
        }
        for name in names
    ]
    return {"lines": lines, "low": low, "high": high, "first": first, "last": last}
