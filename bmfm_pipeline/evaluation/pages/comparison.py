"""Two evaluations side by side as a page, as markdown and as text for a terminal: the same numbers and sentences."""

from typing import Any

from bmfm_pipeline.evaluation.comparing import MOST_FOR_AREAS, SCORE_METRICS
from bmfm_pipeline.evaluation.pages.charts import nice_ticks
from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.markdown import bullets, facts, plain, table
from bmfm_pipeline.evaluation.pages.numbers import number, with_interval
from bmfm_pipeline.evaluation.pages.rendering import render
from bmfm_pipeline.evaluation.wording import SMALLER_IS_BETTER, metric_name, verdict_kind

WIDTH, ROOM = 340, 56  # of the chart, and what the words on a side of its line at 0 take
# What the last column of a table says: of A, by the row's own interval, and by those widened for all rows.
WORDS = {
    ("better", "better"): "A better",
    ("worse", "worse"): "B better",
    ("better", "open"): "A better, alone",
    ("worse", "open"): "B better, alone",
}
MOST_CLASSES_IN_TERMINAL = 5


def said(row: dict[str, Any]) -> str:
    """Which side a difference speaks for; 'alone' where it does not once there are several to choose from."""
    return WORDS.get((row["kind"], row["kind_of_all"]), "open")


def signed(entry: dict[str, Any]) -> str:
    """'+0.013 [-0.004, 0.030]' of a difference."""
    ends = [entry[name] for name in ("value", "ci_low", "ci_high")]
    if any(end is None for end in ends):
        return with_interval(entry)
    small = 0.001 <= max(map(abs, ends)) < 1
    value, low, high = (f"{end + 0.0:.3f}" if small else number(end) for end in ends)
    return f"{'+' if ends[0] > 0 else ''}{value} [{low}, {high}]"


def _context(found: dict[str, Any]) -> dict[str, Any]:
    """`found`: a Comparison as a dictionary, with what the sides are, {"a", "b"} of facts."""
    targets = []
    for target, entry in found["targets"].items():
        rows = [
            [
                metric_name(row["metric"]),
                with_interval(row["a"]),
                with_interval(row["b"]),
                signed(row["difference"]),
                said(row),
            ]
            for row in entry["rows"]
        ]
        classes = [
            [
                row["class"],
                _cells(row, entry["paired"]),
                number(row["a"]),
                number(row["b"]),
                signed(row["difference"]),
                said(row),
            ]
            for row in entry["per_class"]
        ]
        chart = differences_chart(target, entry["rows"], found["level"])
        targets.append(
            {"name": target, "sentence": entry["sentence"], "rows": rows, "classes": classes, "chart": chart}
        )
    return {
        "title": "A against B",
        "lines": {name.upper(): found[name]["what"] for name in ("a", "b")},
        "sides": {
            name.upper(): {key: value for key, value in found[name].items() if key != "what"} for name in ("a", "b")
        },
        "verdicts": [{"text": text, "kind": verdict_kind(text)} for text in found["verdicts"]],
        "targets": targets,
        "notes": found["notes"],
        "level": f"{100 * found['level']:g}",
        "how": how(found),
    }


def _cells(row: dict[str, Any], paired: bool) -> str:
    return f"{row['n_a']:,}" if paired else f"{row['n_a']:,} / {row['n_b']:,}"


def comparison_html(found: dict[str, Any]) -> str:
    return render("comparison.html", **_context(found))


HEADER = ("A", "B", "A minus B", "speaks for")


def comparison_markdown(found: dict[str, Any]) -> str:
    context = _context(found)
    parts = [f"# {context['title']}", *(f"{name}: {plain(line)}" for name, line in context["lines"].items())]
    parts.append(bullets(verdict["text"] for verdict in context["verdicts"]))
    for target in context["targets"]:
        parts += [
            f"## {plain(target['name'])}",
            plain(f"{target['sentence']}; value [{context['level']} % interval]"),
            table(["metric", *HEADER], target["rows"]),
        ]
        if target["classes"]:
            parts += [f"### F1 of the classes of {plain(target['name'])}", table(["class", "cells", *HEADER], target["classes"])]  # fmt: skip
    parts += ["## Notes", bullets([*context["notes"], context["how"]])]
    for name, side in context["sides"].items():
        parts += [f"## What {name} is", facts(side)]
    return "\n\n".join(part for part in parts if part) + "\n"


def how(found: dict[str, Any]) -> str:
    """How the intervals were made."""
    areas = any(row["metric"] in SCORE_METRICS for entry in found["targets"].values() for row in entry["rows"])
    fewer = f" ({MOST_FOR_AREAS:,} for areas under curves)" if areas and found["resamples"] > MOST_FOR_AREAS else ""
    return (
        f"intervals are quantiles of {found['resamples']:,} resamples of the test cells{fewer}, seed {found['seed']}; 'alone': not when intervals are "
        "widened for all rows of the table (Bonferroni)"
    )


def comparison_text(found: dict[str, Any]) -> str:
    """For a terminal: what the sides are, a table for each label column, the sentences, the notes."""
    context = _context(found)
    lines = [f"{name}  {line}" for name, line in context["lines"].items()]
    for target in context["targets"]:
        lines += ["", f"{target['name']}: {target['sentence']}"]
        lines += _aligned([["", *HEADER], *target["rows"]])
        moved = [row for row in target["classes"] if row[-1] != "open"][:MOST_CLASSES_IN_TERMINAL]
        if moved:
            lines += ["  classes whose F1 differs most clearly, of the largest first"]
            lines += _aligned([["", "cells", *HEADER], *moved])
    lines += ["", *(verdict["text"] for verdict in context["verdicts"])]
    lines += [f"note: {note}" for note in [*context["notes"], context["how"]]]
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def differences_chart(target: str, rows: list[dict[str, Any]], level: float) -> Drawing | None:
    """A minus B of every metric of classes, with its interval, about a line at 0; None for metrics of other units."""
    shown = [row for row in rows if row["difference"]["ci_low"] is not None]
    if not shown or any(row["metric"] in SMALLER_IS_BETTER for row in shown):
        return None
    title = f"A minus B, {target}"
    spoken = "; ".join(f"{metric_name(row['metric'])} {signed(row['difference'])}" for row in shown)
    top, step, left, right = 30, 34, 14, WIDTH - 14
    floor = top + step * len(shown)
    drawing = Drawing(WIDTH, floor + 24, title, f"{title}, {100 * level:g} % intervals: {spoken}")
    ends = [row["difference"][name] for row in shown for name in ("ci_low", "ci_high")]
    if not any(ends):
        return None
    ticks = nice_ticks(min(*ends, 0.0), max(*ends, 0.0))
    first, last = ticks[0], ticks[-1]

    def across(value: float) -> float:
        return left + (right - left) * (value - first) / (last - first)

    for tick in ticks:
        drawing.line(across(tick), top - 4, across(tick), floor)
        anchor = "start" if tick == first else "end" if tick == last else "middle"
        drawing.text(across(tick), floor + 15, f"{tick:+g}" if tick else "0", anchor=anchor)
    drawing.line(across(0), top - 4, across(0), floor, "ink", 1.4)
    if across(0) - left > ROOM:
        drawing.text(across(0) - 6, 14, "B better", anchor="end")
    if right - across(0) > ROOM:
        drawing.text(across(0) + 6, 14, "A better")
    for index, row in enumerate(shown):
        entry, middle = row["difference"], top + step * index + 23
        decided = row["kind"] != "open"
        colour = "mark" if decided else "soft"
        drawing.text(left, middle - 10, metric_name(row["metric"]), colour="ink", size=12, bold=decided, halo=True)
        drawing.line(across(entry["ci_low"]), middle, across(entry["ci_high"]), middle, colour, 2)
        for end in (entry["ci_low"], entry["ci_high"]):
            drawing.line(across(end), middle - 4, across(end), middle + 4, colour, 2)
        drawing.dots([(across(entry["value"]), middle)], colour, size=8, hollow=not decided)
    return drawing
