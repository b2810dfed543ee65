"""The page of attributions: of every class its top genes with intervals, and whether the numbers can be believed."""

import re
from collections.abc import Sequence
from typing import Any

from bmfm_pipeline.evaluation.pages.charts import nice_ticks
from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.logos import logo
from bmfm_pipeline.evaluation.pages.numbers import number, with_interval
from bmfm_pipeline.evaluation.pages.rendering import render
from bmfm_pipeline.evaluation.wording import in_words

WIDTH, NAMES, TOP, STEP = 360, 110, 44, 20
IN_CHART = 10
# Charts of more classes than these would make a page that nobody reads; the largest classes are drawn.
MOST_CHARTS = 40
OF_CELLS = {
    "true": "cells whose true class it is",
    "predicted": "cells that are predicted as it",
    "all": "all cells",
}


def attributions_page(found: dict[str, Any], title: str, about: dict[str, Any]) -> str:
    """interpret.html, self-contained. `found` is interpretation.json, `about` facts for its end."""
    sections, of = [], found.get("of", "cells")
    for name, label in found["labels"].items():
        drawn = drawings_of(name, label, found.get("of", "cells"))
        left = len(label["classes"]) - len(drawn)
        sections.append(
            {
                "target": name,
                "cells_of": in_words(OF_CELLS[label["cells_of"]], of),
                "logos": [drawing for _, drawing in logos_of(name, label)],
                "drawings": [drawing for _, drawing in drawn],
                "left_out": f"{left} classes of fewer {of} are in attributions.csv only" if left > 0 else "",
                "classes": [_class(entry) for entry in label["classes"]],
                "completeness": label["completeness"],
            }
        )
    return render(
        "interpret.html",
        title=title,
        sentences=found["sentences"],
        words={word: in_words(word, of) for word in ("cell", "cells", "gene", "genes", "Genes")},
        level=f"{100 * found['level']:g}",
        permutations=found["permutations"],
        sections=sections,
        checks=_checks(found.get("checks") or {}),
        notes=found["notes"],
        facts=about,
    )


def logos_of(name: str, label: dict[str, Any]) -> list[tuple[str, Drawing]]:
    """(name of a file without its ending, logo) of the sequences with the highest scores of each class."""
    drawn = []
    for place, one in enumerate(label.get("logos", ())):
        kind = one["class"] if one["class"] is not None else name
        title = f"{kind}: {one['name']}, score {one['score']:.3g}"
        if one["class"] is not None and one["predicted"] != one["class"]:
            title += f", predicted {one['predicted']}"
        end = one["first"] + len(one["letters"]) - 1
        about = (
            f"{title}. Letters are as tall as what they add to the score of {kind}; positions {one['first']} to {end}"
        )
        drawing = logo(title, about, one["letters"], one["scores"], first=one["first"])
        drawn.append((f"logo-{_file_name(name, one['class'], place)}", drawing))
    return drawn


def drawings_of(name: str, label: dict[str, Any], of: str = "cells") -> list[tuple[str, Drawing]]:
    """(name of a file without its ending, chart) of the largest classes, in the order of the classes."""
    classes = [entry for entry in label["classes"] if entry["top"] or entry["against"]]
    largest = sorted(classes, key=lambda entry: -entry["n_cells"])[:MOST_CHARTS]
    drawn = [(entry, _chart(name, entry, of)) for entry in classes if entry in largest]
    return [(_file_name(name, entry["class"], number), chart) for number, (entry, chart) in enumerate(drawn)]


def _file_name(label: str, kind: str | None, number: int) -> str:
    words = re.sub(r"[^\w+-]+", "-", f"{label}-{kind}" if kind is not None else label).strip("-")
    return f"{number:03d}-{words}"[:80]


def _chart(name: str, entry: dict[str, Any], of: str) -> Drawing:
    """A bar per gene, the largest first, then those that speak against the class; lines are intervals."""
    rows = [*entry["top"][:IN_CHART], *reversed(entry["against"])]
    ends = [0.0, *(row[key] for row in rows for key in ("mean", "ci_low", "ci_high") if row[key] is not None)]
    ticks = nice_ticks(min(ends), max(ends))
    kind = entry["class"] if entry["class"] is not None else name
    said = "; ".join(f"{row['gene']} {_with_interval(row)}" for row in rows)
    title = f"{kind}: " + in_words(f"mean attribution of genes in {entry['n_cells']} cells", of)
    floor = TOP + STEP * len(rows)
    drawing = Drawing(WIDTH, floor + 24, title, f"{title}: {said}")
    right = WIDTH - 16

    def across(value: float) -> float:
        return NAMES + (right - NAMES) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    drawing.text(4, 16, str(kind), colour="ink", size=13, bold=True)
    drawing.text(
        4, 32, in_words(f"{entry['n_cells']} cells; {entry['stand_out']} of {entry['genes']} genes stand out", of)
    )
    for tick in ticks:
        drawing.line(across(tick), TOP - 4, across(tick), floor)
        anchor = "end" if tick == ticks[-1] else "middle"
        drawing.text(across(tick), floor + 15, f"{tick:g}", anchor=anchor)
    for index, row in enumerate(rows):
        top, zero, end = TOP + STEP * index + 3, across(0.0), across(row["mean"])
        colour = "mark" if row["mean"] > 0 else "second"
        drawing.boxes([(min(zero, end), top, max(abs(end - zero), 0.5), STEP - 7)], colour, 0.55)
        if row["ci_low"] is not None:
            drawing.line(across(row["ci_low"]), top + 6, across(row["ci_high"]), top + 6, "ink", 1.5)
        drawing.text(NAMES - 8, top + 10, _cut(row["gene"]), colour="ink", anchor="end", bold=_stands_out(row))
    drawing.line(across(0.0), TOP - 4, across(0.0), floor, "soft", 1)
    return drawing


def _cut(gene: str) -> str:
    return gene if len(gene) <= 16 else gene[:15] + "…"


def _stands_out(row: dict[str, Any]) -> bool:
    return row["q_null"] is not None and row["q_null"] < 0.05


def _with_interval(row: dict[str, Any]) -> str:
    return with_interval({"value": row["mean"], "ci_low": row["ci_low"], "ci_high": row["ci_high"]})


def _class(entry: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "gene": row["gene"],
            "mean": _with_interval(row),
            "logit": number(row["mean_logit"]),
            "shown": f"{row['n_present']:,} of {row['n_cells']:,}",
            "q": _small(row["q_null"]),
            "stands_out": _stands_out(row),
        }
        for row in [*entry["top"], *entry["against"]]
    ]
    stability = entry["top_stability"]
    return {
        "name": entry["class"],
        "n_cells": entry["n_cells"],
        "stand_out": entry["stand_out"],
        "genes": entry["genes"],
        "stability": "–" if stability is None else f"{100 * stability:.0f} %",
        "rows": rows,
    }


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _checks(checks: dict[str, Any]) -> list[Sequence[str]]:
    """(what was compared, rank correlation, what it should be)"""
    rows = []
    steps = checks.get("steps") or {}
    if steps.get("rank_correlation") is not None:
        rows.append(
            (f"half as many steps ({steps['n_steps']} at least)", number(steps["rank_correlation"]), "close to 1")
        )
    if exchanged := checks.get("exchanged"):
        value = f"scores fall by {number(exchanged['top'])}, with as many random bases by {number(exchanged['random'])}"
        rows.append(
            (f"{100 * exchanged['share']:.0f} % of the bases exchanged, those with the largest scores", value, "larger")
        )
    words = {
        "head": ("weights of the label heads shuffled", "close to 0"),
        "model": ("all weights shuffled", "close to 0"),
        "another_class": ("the score of another class", "below 1"),
    }
    for name, entry in (checks.get("sanity") or {}).items():
        if entry["n"]:
            value = f"{number(entry['mean'])} (half of them in {number(entry['low'])} to {number(entry['high'])})"
            rows.append((words[name][0], value, words[name][1]))
    return rows
