"""report.html: one self-contained page; every string from outside is escaped by the template engine."""

import json
from pathlib import Path
from typing import Any

from bmfm_pipeline.evaluation.controls import DESCRIPTIONS
from bmfm_pipeline.evaluation.tables import _LABELS, Evaluation, _with_interval

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    *,
    title: str,
    facts: dict[str, Any],
    notes: list[str] = (),
    history: Path | None = None,
    preprocessing: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write the page: verdict first, metrics beside controls, classes, confusion, curves, data, config.

    `facts` are shown as a list of what and value; `history` is a history.jsonl; `preprocessing` rows of step, cells, genes, counts.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=title,
        verdicts=evaluation.verdicts,
        notes=[*evaluation.notes, *notes],
        tables=_metric_tables(evaluation.rows),
        per_class=evaluation.per_class,
        confusion={name: _shaded(matrix) for name, matrix in evaluation.confusion.items()},
        curves=_curves(history),
        preprocessing=preprocessing or [],
        facts=facts,
        controls={
            name: text for name, text in DESCRIPTIONS.items() if any(row["model"] == name for row in evaluation.rows)
        },
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
    )
    Path(path).write_text(page)


def _metric_tables(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tables = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        models = list(dict.fromkeys(row["model"] for row in own))
        metrics = list(dict.fromkeys(row["metric"] for row in own))
        found = {(row["metric"], row["model"]): row for row in own}
        tables.append(
            {
                "target": target,
                "models": [_LABELS.get(model, model) for model in models],
                "n": next((row["n"] for row in own if row["n"]), None),
                "rows": [
                    [metric, *(_with_interval(found.get((metric, model))) for model in models)] for metric in metrics
                ],
                "notes": sorted({row["note"] for row in own if row.get("note")}),
                "method": next((row["ci_method"] for row in own), ""),
            }
        )
    return tables


def _shaded(matrix: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, counts in zip(matrix["classes"], matrix["counts"], strict=True):
        total = sum(counts)
        rows.append(
            {
                "name": name,
                "total": total,
                "cells": [{"count": count, "share": count / total if total else 0} for count in counts],
            }
        )
    return {"classes": matrix["classes"], "rows": rows}


def _curves(history: Path | None) -> list[dict[str, Any]]:
    """One small chart per curve, as points of an SVG polyline in a 300 x 120 box."""
    if history is None or not Path(history).exists():
        return []
    series: dict[str, list[tuple[int, float]]] = {}
    for line in Path(history).read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name not in ("step", "epoch", "learning_rate") and isinstance(value, int | float):
                series.setdefault(name, []).append((entry["step"], value))
    wanted = [
        name
        for name in series
        if name in ("train/loss", "validation/loss") or name.endswith(("_accuracy", "_f1", "_pcc"))
    ]
    charts = []
    for name in wanted:
        points = series[name]
        if len(points) < 2:
            continue
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        width, height = max(xs) - min(xs) or 1, high - low or 1
        line = " ".join(
            f"{5 + 290 * (x - min(xs)) / width:.1f},{115 - 105 * (y - low) / height:.1f}" for x, y in points
        )
        charts.append(
            {"name": name, "points": line, "low": low, "high": high, "first": min(xs), "last": max(xs), "final": ys[-1]}
        )
    return charts
