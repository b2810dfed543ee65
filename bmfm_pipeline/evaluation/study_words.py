"""What a study found, in sentences."""

from collections.abc import Sequence
from typing import Any

from bmfm_pipeline.evaluation.wording import NAMES, SMALLER_IS_BETTER, is_share, metric_name


def summary_row(study: dict[str, Any], target: str, metric: str, fraction: float, model: str = "model") -> dict | None:
    """The row of the summary, if it is there."""
    key = (target, metric, fraction, model)
    names = ("target", "metric", "fraction", "model")
    return next((row for row in study["summary"] if tuple(row[name] for name in names) == key), None)


def interval_of_mean(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """The interval of a mean over test cells; where every seed has cells of its own, over seeds."""
    low, high = row.get("over_cells") or (row["ci_low"], row["ci_high"])
    return low, high


def differences_of(study: dict[str, Any], target: str, metric: str) -> list[dict[str, Any]]:
    """Model minus control over all seeds, a row per share, the smallest first."""
    rows = [row for row in study["differences"] if row["seed"] is None]
    rows = [row for row in rows if (row["target"], row["metric"]) == (target, metric)]
    return sorted(rows, key=lambda row: row["fraction"])


def passing_sentences(study: dict[str, Any], target: str, metrics: Sequence[str]) -> list[str]:
    """How many training cells the model needs to pass its control, by metric."""
    rows = {metric: differences_of(study, target, metric) for metric in metrics}
    return [_passing(study, target, metric, found) for metric, found in rows.items() if len(found) > 1]


def curve_sentences(study: dict[str, Any], target: str, metric: str) -> list[str]:
    """The model's score with the fewest and with the most training cells."""
    rows = [
        row for row in study["summary"] if (row["target"], row["metric"], row["model"]) == (target, metric, "model")
    ]
    rows.sort(key=lambda row: row["fraction"])
    if len(rows) < 2:
        return []
    ends = " and ".join(f"{_number(metric, row['mean'])} with {_share(row)}" for row in (rows[0], rows[-1]))
    return [f"{target}: {metric_name(metric)} is {ends}"]


def _passing(study: dict[str, Any], target: str, metric: str, rows: list[dict[str, Any]]) -> str:
    control, level = NAMES.get(rows[0]["control"], rows[0]["control"]), f"{100 * study['level']:g} % interval"
    kinds, what = [row["kind"] for row in rows], metric_name(metric)
    # From which share on it stays ahead; without any, what is said is said of the largest.
    ahead = next((at for at in range(len(rows)) if all(kind == "better" for kind in kinds[at:])), len(rows) - 1)
    row = rows[ahead]
    size = f"{signed(metric, row['value'])} ({level} {_interval(metric, row)}) with {_share_of(study, row)}"
    if kinds[-1] == "better" and ahead == 0:
        return f"{target}: the model is better than {control} in {what} at every share tried: {size}"
    if kinds[-1] == "better":
        return f"{target}: the model needs about {_share_of(study, row, False)} to pass {control} in {what}: {size}"
    if all(kind == "worse" for kind in kinds):
        return f"{target}: the model is worse than {control} in {what} at every share tried: {size}"
    if "better" in kinds:
        some = ", ".join(
            f"{100 * row['fraction']:g} %" for row, kind in zip(rows, kinds, strict=True) if kind == "better"
        )
        return f"{target}: the model is ahead of {control} in {what} at {some} alone, and does not stay so: {size}"
    return f"{target}: no evidence that the model passes {control} in {what} at any share tried: {size}"


def spread_sentences(study: dict[str, Any], target: str, metrics: Sequence[str], fraction: float) -> list[str]:
    """How far scores go apart by the seed, at one share of the training cells."""
    found = [summary_row(study, target, metric, fraction) for metric in metrics]
    return [_spread(study, row) for row in found if row is not None and row["n_seeds"] > 1]


def _spread(study: dict[str, Any], row: dict[str, Any]) -> str:
    metric = row["metric"]
    mean, sd, least, most, low, high = (
        _number(metric, row[name]) for name in ("mean", "sd", "min", "max", "ci_low", "ci_high")
    )
    return (
        f"{row['target']}: {metric_name(metric)} over {row['n_seeds']} seeds is {mean} on average (sd {sd}, from {least} to {most}; "
        f"{100 * study['level']:g} % interval of the mean {low} to {high})"
    )


def mean_sentences(study: dict[str, Any], target: str, metrics: Sequence[str], fraction: float) -> list[str]:
    """The mean over seeds against the control, at one share of the training cells."""
    rows = [row for metric in metrics for row in differences_of(study, target, metric)]
    return [_against(study, row) for row in rows if row["fraction"] == fraction and row["n_seeds"] > 1]


def _against(study: dict[str, Any], row: dict[str, Any]) -> str:
    metric, kind, control = row["metric"], row["kind"], NAMES.get(row["control"], row["control"])
    words = f"the model is {kind} than {control}"
    if kind == "open":
        words = f"no evidence that the model is better or worse than {control}"
    parts = [
        f"{100 * study['level']:g} % interval over {name} {_bounds(metric, row[key])}"
        for name, key in (("test cells", "over_cells"), ("seeds", "over_seeds"))
        if row[key] is not None and row[key][0] is not None
    ]
    return (
        f"{row['target']}: {words}: {metric_name(metric)} {signed(metric, row['value'])} on average ({'; '.join(parts)}), better in "
        f"{row['above']} of {row['n_seeds']} seeds"
    )


def sentence_kind(sentence: str) -> str:
    """better, worse or open, of a sentence of a study."""
    if any(words in sentence for words in (" is better than ", " to pass ")):
        return "better"
    return "worse" if any(words in sentence for words in (" is worse than ", " collapsed at ")) else "open"


def collapsed_sentence(entry: dict[str, Any]) -> str:
    """Which seed has collapsed, why that is thought, and what the others reach."""
    metric = entry["metric"]
    score, floor = _number(metric, entry["value"]), entry["floor"]
    if entry["why"] == "floor":
        ahead = entry["value"] < floor if metric in SMALLER_IS_BETTER else entry["value"] > floor
        words = "hardly better" if ahead else "no better"
        why = f"{metric_name(metric)} {score}, {words} than a constant guess ({_number(metric, floor)})"
    else:
        side = "above" if metric in SMALLER_IS_BETTER else "below"
        why = f"{metric_name(metric)} {score}, far {side} the others (median {_number(metric, entry['median_of_others'])})"
    rest = (
        ""
        if entry["mean_of_others"] is None
        else f"; without it the mean is {_number(metric, entry['mean_of_others'])}"
    )
    share = f"{100 * entry['fraction']:g} % of the training cells"
    return f"{entry['target']}: seed {entry['seed']} collapsed at {share}: {why}{rest}"


def study_text(study: dict[str, Any]) -> str:
    """The model, its control and their difference at each share of the training cells, for a terminal."""
    lines = []
    for target, metric in dict.fromkeys((row["target"], row["metric"]) for row in study["differences"]):
        rows = differences_of(study, target, metric)
        several = any(row["n_seeds"] > 1 for row in rows)
        control = NAMES.get(rows[0]["control"], rows[0]["control"])
        table = [["training cells", "this model", *(["sd", "seeds"] if several else []), control, "difference"]]
        for row in rows:
            model, other = (
                summary_row(study, target, metric, row["fraction"], name) for name in ("model", row["control"])
            )
            mean, low, high, sd = (
                _number(metric, value) for value in (model["mean"], *interval_of_mean(model), model["sd"])
            )
            table.append(
                [
                    f"{100 * row['fraction']:g} % ({model['n_train']:,})",
                    f"{mean} [{low}, {high}]",
                    *([sd, str(row["n_seeds"])] if several else []),
                    _number(metric, other["mean"]),
                    f"{signed(metric, row['value'])} [{_interval(metric, row)}]",
                ]
            )
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines.append(f"{target}, {metric_name(metric)}")
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
    return "\n".join(lines)


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['fraction']:g} % of the training cells ({row['n_train']:,})"


def _share_of(study: dict[str, Any], row: dict[str, Any], counted: bool = True) -> str:
    found = summary_row(study, row["target"], row["metric"], row["fraction"])
    return _share(found) if counted and found else f"{100 * row['fraction']:g} % of the training cells"


def _interval(metric: str, row: dict[str, Any]) -> str:
    return _bounds(metric, row["over_cells"] or row["over_seeds"])


def _bounds(metric: str, bounds: Sequence[float | None] | None) -> str:
    if bounds is None or bounds[0] is None:
        return "not defined"
    return " to ".join(signed(metric, bound, False) for bound in bounds)


def signed(metric: str, value: float, unit: bool = True) -> str:
    """A difference with its sign, in points (hundredths) where the metric is a share."""
    if is_share(metric):
        return f"{round(100 * value, 1) + 0.0:+.1f}{' points' if unit else ''}"
    return f"{value + 0.0:+.3g}"


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if is_share(metric) or 0.01 <= abs(value) < 1000 else f"{value:.3g}"
