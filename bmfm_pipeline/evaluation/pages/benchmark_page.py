"""A benchmark as a page, as markdown and as csv: the same numbers and sentences."""

import csv
import io
from typing import Any

from bmfm_pipeline.evaluation.benchmark_words import grouped, sentence_kind
from bmfm_pipeline.evaluation.pages.charts import forests
from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.markdown import bullets, facts, plain, table
from bmfm_pipeline.evaluation.pages.numbers import number, with_interval
from bmfm_pipeline.evaluation.pages.rendering import render
from bmfm_pipeline.evaluation.study_words import signed
from bmfm_pipeline.evaluation.wording import is_share, metric_name

COLUMNS = (
    "dataset",
    "target",
    "method",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "ci_method",
    "sd",
    "n_seeds",
    "n",
    "difference_to_best",
    "difference_low",
    "difference_high",
    "best",
    "state",
    "seed",
    "reason",
)


def benchmark_html(found: dict[str, Any]) -> str:
    """benchmark.html, self-contained. `found` is benchmark.json."""
    return render("benchmark.html", **_context(found))


def benchmark_markdown(found: dict[str, Any]) -> str:
    context = _context(found)
    parts = [f"# {plain(context['title'])}", bullets(entry["text"] for entry in context["verdicts"])]
    for section in context["sections"]:
        rows = [
            [("**" + plain(row[0]) + "**") if best else plain(row[0]), *map(plain, row[1:])]
            for row, best in section["rows"]
        ]
        parts += [f"## {plain(section['title'])}", _table(section["header"], rows)]
    if context["ranks"]:
        parts += ["## Mean rank", table(context["ranks"]["header"], context["ranks"]["rows"])]
    if context["failed"]:
        parts += ["## Failed", table(["cell", "reason"], [(e["name"], e["reason"]) for e in context["failed"]])]
    parts += ["## Notes", bullets(context["notes"]), "## What was compared", facts(context["facts"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def benchmark_csv(found: dict[str, Any]) -> str:
    """One line per metric of a method on a task, and one per cell that failed."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in found["rows"]:
        behind = row["behind"] or {}
        more = {
            "difference_to_best": behind.get("value"),
            "difference_low": behind.get("ci_low"),
            "difference_high": behind.get("ci_high"),
            "best": "yes" if row["best"] else "no",
            "state": "done",
        }
        writer.writerow({name: row.get(name) for name in COLUMNS[:11]} | more)
    for entry in found["failed"]:
        cell = {"dataset": entry.get("dataset", entry["name"]), "method": entry.get("model"), "seed": entry.get("seed")}
        writer.writerow({**cell, "state": "failed", "reason": " ".join(str(entry["reason"]).split())})
    return stream.getvalue()


def benchmark_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table with one row per method of a task, for the page of a run."""
    rows = []
    for task in found["tasks"]:
        for name, by_metric in _methods(found, task).items():
            ranked = by_metric[task["ranked_by"]]
            values = {metric_name(metric): with_interval(by_metric.get(metric)) for metric in task["metrics"]}
            rows.append(
                {
                    "dataset": task["dataset"],
                    "label": task["target"],
                    "method": name,
                    **values,
                    "sd": ranked["sd"],
                    "seeds": ranked["n_seeds"],
                    "best": "best" if ranked["best"] else "",
                    "state": "done",
                }
            )
    rows += [{"dataset": entry["name"], "state": f"failed: {entry['reason']}"} for entry in grouped(found["failed"])]
    return rows


def _table(header: list[str], rows: list[list[str]]) -> str:
    """As markdown.table, of cells that are markdown already."""
    lines = [[plain(name) for name in header], ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _methods(found: dict[str, Any], task: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {metric: row}} of a task, in the order of its ranking metric."""
    own = [row for row in found["rows"] if (row["dataset"], row["target"]) == (task["dataset"], task["target"])]
    names = [row["method"] for row in own if row["metric"] == task["ranked_by"]]
    return {name: {row["metric"]: row for row in own if row["method"] == name} for name in names}


def _context(found: dict[str, Any]) -> dict[str, Any]:
    ranks = found["ranks"]
    several = ranks["rows"] and len(found["tasks"]) > 1
    return {
        "title": found["title"] or f"Benchmark {found['suite']}",
        "verdicts": [{"text": text, "kind": sentence_kind(text)} for text in found["sentences"]],
        "level": f"{100 * found['level']:g}",
        "sections": [_section(found, task) for task in found["tasks"]],
        "ranks": {
            "header": ["method", "mean rank", *ranks["tasks"]],
            "rows": [
                [row["method"], f"{row['mean_rank']:.2f}", *(f"{rank:g}" for rank in row["ranks"])]
                for row in ranks["rows"]
            ],
        }
        if several
        else None,
        "failed": grouped(found["failed"]),
        "notes": found["notes"],
        "facts": found["about"],
    }


def _section(found: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    methods = _methods(found, task)
    ranked = task["ranked_by"]
    several = any(row["n_seeds"] > 1 for by_metric in methods.values() for row in by_metric.values())
    unit = " (points)" if is_share(ranked) else ""
    header = ["method", *map(metric_name, task["metrics"]), f"{metric_name(ranked)}, to the first{unit}"]
    header += [f"sd of {metric_name(ranked)}", "seeds"] if several else []
    rows = []
    for name, by_metric in methods.items():
        row = by_metric[ranked]
        line = [name, *(with_interval(by_metric.get(metric)) for metric in task["metrics"]), _behind(ranked, row)]
        line += [number(row["sd"]), str(row["n_seeds"])] if several else []
        rows.append((line, row["best"]))
    n = next((row["n"] for by_metric in methods.values() for row in by_metric.values() if row["n"]), None)
    return {
        "title": f"{task['dataset']}: {task['target']}",
        "caption": f"{n:,} tested" if n else "",
        "header": header,
        "rows": rows,
        "drawings": _drawings(found, task, methods),
    }


def _behind(metric: str, row: dict[str, Any]) -> str:
    if row["behind"] is None:
        return "best" if row["best"] else "leads"
    value, low, high = (row["behind"][name] for name in ("value", "ci_low", "ci_high"))
    text = signed(metric, value, False)
    if low is not None:
        text += f" [{signed(metric, low, False)}, {signed(metric, high, False)}]"
    return text if row["kind"] == "worse" else f"{text}, open"


def _drawings(found: dict[str, Any], task: dict[str, Any], methods: dict[str, dict[str, Any]]) -> list[Drawing]:
    """The intervals of all methods, the models emphasised."""
    rows, names = [], {}
    for number_of, (name, by_metric) in enumerate(methods.items()):
        only = sum(row["is_model"] for other in methods.values() for row in [other[task["ranked_by"]]]) == 1
        key = "model" if by_metric[task["ranked_by"]]["is_model"] and only else f"method{number_of}"
        names[key] = name
        rows += [{**row, "model": key} for row in by_metric.values()]
    return forests(task["target"], rows, names)
