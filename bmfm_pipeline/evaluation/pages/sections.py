"""What the parts of an evaluation's page show, as plain values for its template."""

from collections.abc import Mapping
from typing import Any

from bmfm_pipeline.evaluation.pages.maps import embedding_maps, shaded_confusion
from bmfm_pipeline.evaluation.pages.numbers import counted, number, observed, percent, with_interval

# A larger confusion matrix cannot be read as a table: it is drawn, and its largest confusions are listed.
LARGEST_MATRIX = 40
LISTED_CONFUSIONS = 30
LISTED_GENES = 10


def metric_tables(rows: list[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """One table per target: metrics by row, the model and its controls by column. `names` is what models are called."""
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
                "models": [names.get(model, model) for model in models],
                "n": next((row["n"] for row in own if row["n"]), None),
                "counted": counted(own),
                "split": own[0]["split"],
                "rows": [
                    [metric, *(with_interval(found.get((metric, model))) for model in models)] for metric in metrics
                ],
                "notes": metric_notes(own, names),
                # The configured method comes first wherever it fits; where it fits nowhere, the notes say what stands in.
                "method": methods[0] if methods else None,
            }
        )
    return tables


def metric_notes(rows: list[dict[str, Any]], names: Mapping[str, str]) -> list[str]:
    """Each note once, with the metrics it is about, and of whom it is said where that is not everybody."""
    about: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for note in (row.get("note") or "").split("; "):
            if note:
                about.setdefault(note, {}).setdefault(row["metric"], []).append(row["model"])
    everybody: dict[str, set[str]] = {}
    for row in rows:
        everybody.setdefault(row["metric"], set()).add(row["model"])
    said = []
    for note, metrics in about.items():
        words = [
            metric
            if set(models) == everybody[metric]
            else f"{metric} ({', '.join(names.get(model, model) for model in dict.fromkeys(models))})"
            for metric, models in metrics.items()
        ]
        said.append(f"{', '.join(words)}: {note}")
    return said


def class_table(classes: list[dict[str, Any]], level: str) -> dict[str, Any]:
    """{"header", "rows": [{"name", "rare", "cells": [(text, number to sort by or None)]}]} of one label's classes."""
    columns = [("precision", "precision"), ("recall", "recall"), ("f1", "F1"), ("auroc", "AUROC"), ("auprc", "AUPRC")]
    columns += [("f1_logistic_l2", "F1, logistic regression")]
    there = [(key, words) for key, words in columns if classes and key in classes[0]]
    bounded = any(row.get("f1_low") is not None for row in classes)
    names = [f"F1 [{level} % interval]" if key == "f1" and bounded else words for key, words in there]
    rows = []
    for row in classes:
        cells = [(f"{row[key]:,}", row[key]) for key in ("support", "predicted")]
        for key, _ in there:
            low, high = (row.get("f1_low"), row.get("f1_high")) if key == "f1" else (None, None)
            value = {"value": row[key], "ci_low": low, "ci_high": high}
            cells.append(("–" if row[key] is None else with_interval(value), row[key]))
        rows.append({"name": row["class"], "rare": row["rare"], "cells": cells})
    own = 3 + next((at for at, (key, _) in enumerate(there) if key == "f1"), 0)
    return {"header": ["class", f"test {observed()}", "predicted", *names], "rows": rows, "own": own}


def gene_error_section(found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each masked field what is known of its genes: {"field", "facts", "best", "worst"}."""
    sections = []
    for field, entry in found.items():
        facts = {
            "genes": f"{entry['genes']:,}, of which {entry['compared']:,} with at least {entry['least_positions']} positions"
        }
        for key, words in (
            ("worse_than_null", "predicted worse than by their own mean in training"),
            ("worse_than_null_nonzero", "the same where the gene is expressed"),
        ):
            if entry.get(key) is not None:
                facts[words] = percent(entry[key])
        for key, words in (("zero_f1", "F1 of telling zeros"), ("zero_auroc", "AUROC of telling zeros")):
            if entry.get(key) is not None:
                facts[words] = number(entry[key])
        listed = {key: (entry.get(key) or [])[:LISTED_GENES] for key in ("best", "worst")}
        sections.append({"field": field, "facts": facts, **listed})
    return sections


def confusion_of(target: str, matrix: dict[str, Any]) -> dict[str, Any]:
    """{"classes", "rows"} of a table, and for many classes {"pairs", "n_classes", "n_pairs", "drawing"} instead."""
    classes, counts = matrix["classes"], matrix["counts"]
    if len(classes) > LARGEST_MATRIX:
        pairs = largest_confusions(matrix)
        return {
            "pairs": pairs[:LISTED_CONFUSIONS],
            "n_classes": len(classes),
            "n_pairs": len(pairs),
            "drawing": shaded_confusion(target, classes, counts),
        }
    totals = [sum(row) for row in counts]
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


def largest_confusions(matrix: dict[str, Any]) -> list[dict[str, Any]]:
    """Every pair of classes that was confused, most cells first: {"true", "predicted", "count", "total"}."""
    classes, counts = matrix["classes"], matrix["counts"]
    wrong = sorted(
        (
            (count, true, guess)
            for true, row in enumerate(counts)
            for guess, count in enumerate(row)
            if count and true != guess
        ),
        key=lambda found: (-found[0], found[1], found[2]),
    )
    return [
        {"true": classes[true], "predicted": classes[guess], "count": count, "total": sum(counts[true])}
        for count, true, guess in wrong
    ]


def map_sections(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Maps by label, scores of integration and notes of an embedding_map.json; None where there is nothing to draw."""
    if not found or len(found.get("x") or []) < 2:
        return None
    targets = dict.fromkeys([*(found.get("truth") or {}), *(found.get("predicted") or {})])
    maps = {target: drawn for target in targets if (drawn := embedding_maps(found, target))}
    scores = {
        name: entry if isinstance(entry, dict) else {"value": entry}
        for name, entry in (found.get("integration") or {}).items()
    }
    if not maps and not scores:
        return None
    return {
        "method": found.get("method", "map"),
        "maps": maps,
        "shown": len(found["x"]),
        "n_of": found.get("n_of") or len(found["x"]),
        "integration": {name: with_interval(entry) for name, entry in scores.items() if "value" in entry},
        "notes": found.get("notes") or [],
    }


def gene_section(genes: dict[str, Any] | None) -> dict[str, Any] | None:
    """Categories with names in them, and the largest losses, of the gene report that preprocessing made."""
    if not genes or not genes.get("categories"):
        return None
    rows = [
        {
            "category": name,
            "names": entry["names"],
            "share": entry["share_of_counts"],
            "examples": ", ".join(map(str, entry.get("examples") or [])),
        }
        for name, entry in genes["categories"].items()
        if entry["names"]
    ]
    return {
        "rows": rows,
        "names": genes.get("names"),
        "known": genes.get("genes_known"),
        "kept": genes.get("share_of_counts_kept"),
        "naming": genes.get("naming"),
        "compared_with": genes.get("compared_with"),
        "damaged": (genes.get("spreadsheet") or {}).get("examples") or [],
        "losses": genes.get("largest_losses") or [],
    }


def cost_rows(costs: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step and stage from {stage: {"steps", ..}}, with what a training says of itself where it does."""
    return [
        {"stage": stage, **step, "detail": cost.get("detail", "") if step["step"] == "train" else ""}
        for stage, cost in costs.items()
        for step in cost.get("steps") or []
    ]


def cost_totals(costs: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds and processor seconds of all steps, and the most memory of any of them."""
    rows = cost_rows(costs)
    return {
        "seconds": sum(row["seconds"] for row in rows),
        "processor_seconds": sum(row["processor_seconds"] for row in rows),
        "peak_bytes": max((row["peak_bytes"] for row in rows), default=0),
    }


def training_detail(summary: Mapping[str, Any]) -> str:
    """'on cpu, 151 cells/s, 0.62 GB' of the summary of a training."""
    parts = []
    if summary.get("accelerator"):
        parts.append(f"on {summary.get('device') or summary['accelerator']}")
    if summary.get("steps") is not None:
        parts.append(f"{summary['steps']:,} steps")
    if summary.get("cells_per_s"):
        parts.append(f"{summary['cells_per_s']:,} {observed()}/s")
    if summary.get("loader_wait_share") is not None:
        parts.append(f"{100 * summary['loader_wait_share']:.1f} % waiting for data")
    if summary.get("peak_gpu_memory_gb"):
        parts.append(f"{summary['peak_gpu_memory_gb']} GB on the device")
    return ", ".join(parts)
