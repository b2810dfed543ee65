"""What a benchmark found, in sentences."""

from collections.abc import Sequence
from typing import Any

from bmfm_pipeline.evaluation.study_words import signed
from bmfm_pipeline.evaluation.wording import metric_name

LISTED = 3


def task_sentence(rows: list[dict[str, Any]], task: dict[str, Any], level: float) -> str:
    """Which method leads a task, and over which ones its lead is shown. `rows` are those of the ranking metric, the best first."""
    place, metric = f"{task['dataset']}, {task['target']}", task["ranked_by"]
    first, *others = rows
    if not others:
        return f"{place}: only {first['method']} was tested"
    second = others[0]
    size = signed(metric, -second["behind"]["value"])
    if first["best"]:
        low, high = (second["behind"][name] for name in ("ci_low", "ci_high"))
        bounds = ""
        if low is not None:
            ends = sorted((-low, -high))
            bounds = (
                f", {100 * level:g} % interval {signed(metric, ends[0], False)} to {signed(metric, ends[1], False)}"
            )
        return (
            f"{place}: {first['method']} is best in {metric_name(metric)}, ahead of every other method; of the next one, "
            f"{second['method']}, by {size}{bounds}"
        )
    open_ones = [row["method"] for row in others if row["kind"] != "worse"]
    more = f" and {len(open_ones) - LISTED} more" if len(open_ones) > LISTED else ""
    return (
        f"{place}: no method is shown to be best in {metric_name(metric)}: {first['method']} leads {second['method']} by {size}, and its lead "
        f"over {', '.join(open_ones[:LISTED])}{more} may be luck"
    )


def ranked_sentence(ranks: dict[str, Any]) -> str:
    """The method with the best mean rank."""
    first, *others = ranks["rows"]
    text = f"mean rank over {len(ranks['tasks'])} tasks: " + ", ".join(
        f"{row['method']} {row['mean_rank']:.3g}" for row in (first, *others[: LISTED - 1])
    )
    left = f"; not ranked, for not every task has them: {', '.join(ranks['left_out'])}" if ranks["left_out"] else ""
    return f"{text} (ranks tell the order, not by how much{left})"


def failed_sentence(failed: Sequence[dict[str, str]]) -> str:
    what = "cell is" if len(failed) == 1 else "cells are"
    return f"{len(failed)} {what} missing because they failed: {'; '.join(entry['name'] for entry in grouped(failed))}"


def grouped(failed: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Failures with those of several seeds, where the reason is the same, as one: `name` then says how many seeds."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in failed:
        found.setdefault((entry["name"].rpartition(", seed ")[0] or entry["name"], entry["reason"]), []).append(
            entry["name"]
        )
    return [
        {"name": names[0] if len(names) == 1 else f"{what}, {len(names)} seeds", "reason": reason}
        for (what, reason), names in found.items()
    ]


def sentence_kind(sentence: str) -> str:
    """better, worse or open, as pages mark it."""
    if " is best in " in sentence:
        return "better"
    return "worse" if "because they failed" in sentence else "open"


def benchmark_text(found: dict[str, Any]) -> str:
    """The table for a terminal."""
    from bmfm_pipeline.evaluation.pages.numbers import with_interval

    lines: list[str] = []
    for task in found["tasks"]:
        own = [row for row in found["rows"] if (row["dataset"], row["target"]) == (task["dataset"], task["target"])]
        names = [row["method"] for row in own if row["metric"] == task["ranked_by"]]
        several = any(row["n_seeds"] > 1 for row in own)
        table = [["", *(metric_name(metric) for metric in task["metrics"]), *(["sd", "seeds"] if several else []), ""]]
        for name in names:
            by_metric = {row["metric"]: row for row in own if row["method"] == name}
            ranked = by_metric[task["ranked_by"]]
            spread = ["-" if ranked["sd"] is None else f"{ranked['sd']:.3f}", str(ranked["n_seeds"])] if several else []
            values = [with_interval(by_metric.get(metric)) for metric in task["metrics"]]
            table.append([name, *values, *spread, "best" if ranked["best"] else ""])
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines += ["", f"{task['dataset']}, {task['target']}"]
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
    if found["ranks"]["rows"] and len(found["tasks"]) > 1:
        lines += ["", "mean rank"]
        lines += [f"  {row['mean_rank']:5.2f}  {row['method']}" for row in found["ranks"]["rows"]]
    for entry in grouped(found["failed"]):
        lines += ["", f"failed: {entry['name']}", f"  {entry['reason']}"]
    return "\n".join(lines).lstrip("\n")
