"""The page of a study: the curve over shares of the training cells, the spread over seeds, and what they add up to."""

from collections.abc import Iterable, Mapping
from typing import Any

from bmfm_pipeline.evaluation.pages.charts import Box, nice_ticks
from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.markdown import bullets, facts, plain, table
from bmfm_pipeline.evaluation.pages.numbers import number, with_interval
from bmfm_pipeline.evaluation.pages.rendering import render
from bmfm_pipeline.evaluation.study_words import differences_of, interval_of_mean, sentence_kind, signed
from bmfm_pipeline.evaluation.wording import metric_name

WIDTH, HEIGHT = 460, 300
SHOWN = ("accuracy", "f1", "mse")
# Targets beyond these are in study.json alone.
MOST_TARGETS = 8
LINES = (("model", "mark", ""), ("reference", "second", "6 4"), ("floor", "soft", "2 4"))


def study_page(study: dict[str, Any], title: str, names: Mapping[str, str], about: dict[str, Any]) -> str:
    """study.html, self-contained. `study` is study.json, `names` what models are called, `about` facts for its end."""
    return render("study.html", **_context(study, title, names, about))


def study_markdown(study: dict[str, Any], title: str, names: Mapping[str, str], about: dict[str, Any]) -> str:
    """study.md: the same sentences and tables."""
    context = _context(study, title, names, about)
    parts = [f"# {plain(title)}", bullets([*study["verdicts"], *study["findings"]])]
    for section in context["sections"]:
        parts.append(f"## {plain(section['target'])}")
        for found in section["tables"]:
            parts += [f"### {found['metric']}", table(found["header"], found["rows"])]
        parts += ["### Every point", table(section["points_header"], section["points"])]
    parts += ["## Notes", bullets(study["notes"])] if study["notes"] else []
    parts += ["## What was compared", facts(context["facts"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def study_drawings(study: dict[str, Any], target: str, names: Mapping[str, str]) -> list[Drawing]:
    """The charts of one target: a curve per metric over shares, or, of one share, every seed and their mean."""
    metrics = [name for name in SHOWN if _rows(study, target, name, "model")]
    draw = _curve if len({point["fraction"] for point in study["points"]}) > 1 else _spread
    return [draw(study, target, metric, names) for metric in metrics]


def _context(study: dict[str, Any], title: str, names: Mapping[str, str], about: dict[str, Any]) -> dict[str, Any]:
    targets = list(dict.fromkeys(row["target"] for row in study["differences"] or study["summary"]))
    sections = [_section(study, target, names) for target in targets[:MOST_TARGETS]]
    left = f"; {len(targets) - MOST_TARGETS} more are in study.json" if len(targets) > MOST_TARGETS else ""
    return {
        "title": title,
        "level": f"{100 * study['level']:g}",
        "verdicts": [{"text": text, "kind": sentence_kind(text)} for text in study["verdicts"]],
        "findings": study["findings"],
        "sections": sections,
        "left_out": f"The first {MOST_TARGETS} targets are shown{left}." if left else "",
        "notes": study["notes"],
        "facts": about,
    }


def _section(study: dict[str, Any], target: str, names: Mapping[str, str]) -> dict[str, Any]:
    metrics = [name for name in SHOWN if _rows(study, target, name, "model")]
    compared = [metric for metric in metrics if differences_of(study, target, metric)]
    header = [
        "point",
        "training cells",
        *map(metric_name, metrics),
        *(f"{metric_name(m)}, difference" for m in compared),
    ]
    return {
        "target": target,
        "drawings": study_drawings(study, target, names),
        "tables": [_metric_table(study, target, metric, names) for metric in metrics],
        "points_header": header,
        "points": [_point(study, point, target, metrics, compared) for point in study["points"]],
    }


def _metric_table(study: dict[str, Any], target: str, metric: str, names: Mapping[str, str]) -> dict[str, Any]:
    """One row per share of the training cells."""
    models, differences = (
        _models(study, target),
        {row["fraction"]: row for row in differences_of(study, target, metric)},
    )
    several = any(row["n_seeds"] > 1 for row in _rows(study, target, metric, "model"))
    header = [
        "training cells",
        *(names.get(model, model) for model in models),
        *(["difference"] if differences else []),
    ]
    rows = []
    for model in _rows(study, target, metric, "model"):
        found = [_at(study, target, metric, name, model["fraction"]) for name in models]
        line = [f"{100 * model['fraction']:g} % ({model['n_train']:,})", *map(_with_mean, found)]
        if differences:
            row = differences.get(model["fraction"])
            line.append("" if row is None else _difference(metric, row))
        rows.append([*line, *([number(model["sd"]), str(model["n_seeds"])] if several else [])])
    return {"metric": metric_name(metric), "header": [*header, *(["sd", "seeds"] if several else [])], "rows": rows}


def _point(
    study: dict[str, Any], point: dict[str, Any], target: str, metrics: list[str], compared: list[str]
) -> list[str]:
    own = point["metrics"].get(target, {})
    line = [
        point["name"],
        f"{point['n_train']:,}",
        *(with_interval(own.get(metric, {}).get("model")) for metric in metrics),
    ]
    for metric in compared:
        key = (target, metric, point["fraction"], point["seed"])
        names = ("target", "metric", "fraction", "seed")
        row = next((row for row in study["differences"] if tuple(row[name] for name in names) == key), None)
        line.append("" if row is None else _signed_interval(metric, row["value"], (row["ci_low"], row["ci_high"])))
    return line


def _difference(metric: str, row: dict[str, Any]) -> str:
    return _signed_interval(metric, row["value"], row["over_cells"] or row["over_seeds"] or (None, None))


def _signed_interval(metric: str, value: float, bounds) -> str:
    if bounds[0] is None:
        return signed(metric, value, False)
    return f"{signed(metric, value, False)} [{signed(metric, bounds[0], False)}, {signed(metric, bounds[1], False)}]"


def _with_mean(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return with_interval(_as_row(row))


def _as_row(mean: dict[str, Any]) -> dict[str, Any]:
    """A mean as a row of metrics.json has it."""
    low, high = interval_of_mean(mean)
    return {"value": mean["mean"], "ci_low": low, "ci_high": high}


def _models(study: dict[str, Any], target: str) -> list[str]:
    """The model, what it is measured against, and a constant guess."""
    reference = next((row["control"] for row in study["differences"] if row["target"] == target), None)
    there = {row["model"] for row in study["summary"] if row["target"] == target}
    floor = next((name for name in ("majority", "train_mean") if name in there and name != reference), None)
    return [name for name in ("model", reference, floor) if name]


def _rows(study: dict[str, Any], target: str, metric: str, model: str) -> list[dict[str, Any]]:
    own = [row for row in study["summary"] if (row["target"], row["metric"], row["model"]) == (target, metric, model)]
    return sorted(own, key=lambda row: row["fraction"])


def _at(study: dict[str, Any], target: str, metric: str, model: str, fraction: float) -> dict[str, Any] | None:
    return next((row for row in _rows(study, target, metric, model) if row["fraction"] == fraction), None)


def _curve(study: dict[str, Any], target: str, metric: str, names: Mapping[str, str]) -> Drawing:
    """The metric (up) by the share of the training cells (across): mean and interval, every seed as a small mark."""
    models = _models(study, target)
    shown = [(name, _rows(study, target, metric, name), *style) for name, style in zip(models, LINES, strict=False)]
    if len(shown) == len(LINES) and _far(shown):
        shown = shown[:-1]  # it would press the others together, and stands in the table
    called, lines = [names.get(name, name) for name, *_ in shown], [line[1:] for line in shown]
    ends = _ends(row for rows, *_ in lines for row in rows)
    ticks = nice_ticks(min(ends), max(ends))
    said = "; ".join(
        f"{name}: " + ", ".join(f"{100 * row['fraction']:g} % {number(row['mean'])}" for row in rows)
        for name, (rows, *_) in zip(called, lines, strict=True)
    )
    title = f"{metric_name(metric)} of {target}"
    box = Box(
        Drawing(WIDTH, HEIGHT, title, f"{title} by share of the training cells; {said}"),
        (0, 100),
        (ticks[0], ticks[-1]),
        52,
    )
    box.top = 30 + 16 * len(called)
    for tick in ticks:
        x, y = box.place(0, tick)
        box.drawing.line(x, y, box.right, y)
        box.drawing.text(x - 6, y + 4, f"{tick:g}", anchor="end")
    shares = sorted({100 * row["fraction"] for rows, *_ in lines for row in rows})
    for share in shares:
        x, y = box.place(share, ticks[0])
        box.drawing.line(x, y, x, y + 4, "soft")
        if share == shares[0] or share - shares[shares.index(share) - 1] >= 6:
            box.drawing.text(x, y + 16, f"{share:g} %", anchor="middle" if share < 100 else "end")
    box.drawing.text(4, 16, f"{metric_name(metric)} by share of the training cells", colour="ink", size=13, bold=True)
    for index, (name, (rows, _, colour, dash)) in enumerate(zip(called, lines, strict=True)):
        box.drawing.line(8, 29 + 16 * index, 34, 29 + 16 * index, colour, 2, dash)
        box.drawing.text(40, 33 + 16 * index, name, colour="ink")
        shift = (index - (len(lines) - 1) / 2) * 5  # so that error bars of one share stand side by side
        places = [(box.place(100 * row["fraction"], row["mean"]), row) for row in rows]
        box.drawing.curve([place for place, _ in places], colour, 1.8, dash)
        for (x, y), row in places:
            bounds = interval_of_mean(row)
            if None not in bounds:
                low, high = (box.place(0, bound)[1] for bound in bounds)
                box.drawing.line(x + shift, low, x + shift, high, colour, 1.5)
                for end in (low, high):
                    box.drawing.line(x + shift - 3, end, x + shift + 3, end, colour, 1.5)
            box.drawing.dots([(x, y)], colour, size=8 if index == 0 else 7, square=index == 0, hollow=index > 0)
            if index == 0 and len(row["values"]) > 1:
                box.drawing.dots([(x - 8, box.place(0, found["value"])[1]) for found in row["values"]], colour, size=4)
    return box.drawing


def _ends(rows: Iterable[dict[str, Any]]) -> list[float]:
    values = [value for row in rows for value in (row["mean"], row["min"], row["max"], *interval_of_mean(row))]
    return [value for value in values if value is not None]


def _far(shown: list[tuple]) -> bool:
    """Whether the last line lies further from the others than they go apart."""
    own, last = _ends(row for line in shown[:-1] for row in line[1]), _ends(shown[-1][1])
    gap = max(min(own) - max(last), min(last) - max(own))
    return gap > max(own) - min(own)


def _spread(study: dict[str, Any], target: str, metric: str, names: Mapping[str, str]) -> Drawing:
    """Every seed, their mean, and the controls below, with intervals over test cells."""
    models, level = _models(study, target), f"{100 * study['level']:g}"
    mean = _rows(study, target, metric, "model")[0]
    entries = [(f"mean of {mean['n_seeds']} seeds", _as_row(mean), "mark", True)]
    for point in study["points"]:
        if row := point["metrics"].get(target, {}).get(metric, {}).get("model"):
            entries.append((f"seed {point['seed']}", row, "mark", False))
    for model in models[1:]:
        for row in _rows(study, target, metric, model)[:1]:
            entries.append((names.get(model, model), _as_row(row), "soft", False))
    entries = [entry for entry in entries if entry[1]["value"] is not None]
    ends = [row[key] for _, row, *_ in entries for key in ("value", "ci_low", "ci_high") if row[key] is not None]
    ticks, top, step, left = nice_ticks(min(ends), max(ends)), 34, 24, 190
    title, right = f"{metric_name(metric)} of {target}", WIDTH - 14
    said = "; ".join(f"{name} {with_interval(row)}" for name, row, *_ in entries)
    drawing = Drawing(
        WIDTH, top + step * len(entries) + 26, f"{title} by seed", f"{title}, {level} % intervals: {said}"
    )
    drawing.text(4, 16, f"{metric_name(metric)} by seed", colour="ink", size=13, bold=True)
    floor = top + step * len(entries)

    def across(value: float) -> float:
        return left + (right - left) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    for tick in ticks:
        drawing.line(across(tick), top - 6, across(tick), floor)
        drawing.text(across(tick), floor + 15, f"{tick:g}", anchor="end" if tick == ticks[-1] else "middle")
    for index, (name, row, colour, is_mean) in enumerate(entries):
        middle = top + step * index + 10
        drawing.text(4, middle + 4, name, colour="ink", bold=is_mean)
        if row["ci_low"] is not None and row["ci_high"] is not None:
            drawing.line(across(row["ci_low"]), middle, across(row["ci_high"]), middle, colour, 2)
            for end in (row["ci_low"], row["ci_high"]):
                drawing.line(across(end), middle - 4, across(end), middle + 4, colour, 2)
        drawing.dots([(across(row["value"]), middle)], colour, size=9, square=is_mean, hollow=not is_mean)
    return drawing
