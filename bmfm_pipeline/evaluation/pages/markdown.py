"""The page of an evaluation as markdown: the same tables and sentences, for repositories and notebooks."""

import re
from collections.abc import Iterable
from typing import Any

from bmfm_pipeline.evaluation.pages.numbers import duration, observed, percent, size
from bmfm_pipeline.evaluation.pages.sections import LISTED_CONFUSIONS, largest_confusions

ESCAPED = str.maketrans({sign: f"\\{sign}" for sign in "\\`*<>|#"} | {"\n": " "})
_EMPHASIS = re.compile(r"(?<!\w)_|_(?!\w)")


def plain(text: Any) -> str:
    """A name from data as it stands: nothing in it is taken for markdown or HTML."""
    return _EMPHASIS.sub(r"\\_", str(text).translate(ESCAPED)).replace("](", "]\\(")


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    first = "| " + " | ".join(plain(cell) for cell in header) + " |"
    rest = ["| " + " | ".join(cell if index == 1 else plain(cell) for cell in line) + " |" for index, line in enumerate(lines) if index]  # fmt: skip
    return "\n".join([first, *rest])


def bullets(entries: Iterable[Any]) -> str:
    return "\n".join(f"- {plain(entry)}" for entry in entries)


def facts(entries: dict[str, Any]) -> str:
    return "\n".join(f"- {plain(name)}: {plain(value)}" for name, value in entries.items())


def evaluation_markdown(context: dict[str, Any], confusion: dict[str, dict[str, Any]]) -> str:
    """`context` is that of the page's template, `confusion` {label: {"classes", "counts"}}."""
    parts = [f"# {plain(context['title'])}", plain(context["lead"]), bullets(v["text"] for v in context["verdicts"])]
    for metrics in context["tables"]:
        parts += [f"## Metrics: {plain(metrics['target'])}"]
        if metrics["n"]:
            brackets = (
                f"; value [{context['level']} % interval], {metrics['method']} unless noted"
                if metrics["method"]
                else ""
            )
            parts.append(f"{metrics['n']:,} {metrics['split']} {metrics['counted']}{brackets}")
        parts += [table(["metric", *metrics["models"]], metrics["rows"]), bullets(metrics["notes"])]
    if context["controls"]:
        parts += ["## Controls", facts(context["controls"])]
    for target, classes in context["per_class"].items():
        parts += [f"## Classes of {plain(target)}", _classes(classes)]
    for target, matrix in confusion.items():
        pairs = largest_confusions(matrix)
        shown = [
            (pair["true"], pair["predicted"], f"{pair['count']:,}", percent(pair["count"] / pair["total"]))
            for pair in pairs[:LISTED_CONFUSIONS]
        ]
        parts += [
            f"## Confusion: {plain(target)}",
            f"the largest {len(shown)} of {len(pairs)} confusions; the whole matrix is in evaluation.json",
            table(["true class", "predicted", observed(), "of the class"], shown) if shown else "",
        ]
    if context["confused"]:
        parts += ["## Most confused pairs, and their genes", *_confused(context["confused"])]
    for entry in context["calibration"]:
        parts += [f"## Confidence: {plain(entry['target'])}", plain(entry["said"]), facts(entry["facts"])]
    for entry in context["gene_errors"]:
        parts += [f"## Masked positions, gene by gene: {plain(entry['field'])}", facts(entry["facts"])]
    if context["maps"] and context["maps"]["integration"]:
        parts += ["## Integration of batches", facts(context["maps"]["integration"])]
    if context["preprocessing"]:
        rows = [
            (row["step"], f"{row['cells']:,}", f"{row['genes']:,}", f"{row['counts']:,.0f}" if row["counts"] else "–")
            for row in context["preprocessing"]
        ]
        parts += ["## Preprocessing", table(["after step", "cells", "genes", "counts"], rows)]
    if genes := context["genes"]:
        rows = [(row["category"], f"{row['names']:,}", percent(row["share"]), row["examples"]) for row in genes["rows"]]
        parts += ["## Gene names", table(["gene names", "number", "of the counts", "most counts"], rows)]
    if context["notes"]:
        parts += ["## Notes", bullets(context["notes"])]
    parts += ["## What was evaluated", facts(context["facts"])]
    if context["environment"]:
        parts += ["## Where and with what", facts(context["environment"])]
    if context["costs"]:
        rows = [
            (row["stage"], row["step"], duration(row["seconds"]), size(row["peak_bytes"]), row["detail"])
            for row in context["costs"]
        ]
        parts += ["## Cost", table(["stage", "step", "time", "most memory", "notes"], rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _classes(classes: dict[str, Any]) -> str:
    rows = [
        [row["name"] + (" (rare)" if row["rare"] else ""), *(text for text, _ in row["cells"])]
        for row in classes["rows"]
    ]
    return table(classes["header"], rows)


def _confused(found: dict[str, Any]) -> list[str]:
    parts = [f"Values are {found['measure']}; d is Cohen's d."]
    for target, pairs in found["labels"].items():
        for pair in pairs:
            said = f"{pair['true']} called {pair['predicted']} ({pair['cells']:,} of {pair['of']:,} cells)"
            parts.append(f"### {plain(target)}: {plain(said)}")
            if pair["genes_of_classes"]:
                rows = [
                    (
                        gene["gene"],
                        *(f"{gene[name]:.2f}" for name in ("mean_true", "mean_predicted")),
                        f"{gene['effect']:+.2f}",
                        f"{gene['mean_confused']:.2f}",
                    )
                    for gene in pair["genes_of_classes"]
                ]
                parts.append(table(["gene", pair["true"], pair["predicted"], "d", "confused cells"], rows))
    return parts
