"""report.html, report.md and figures/ of an evaluation: the same numbers as a page, as text, and as pictures."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bmfm_pipeline.evaluation.controls import DESCRIPTIONS
from bmfm_pipeline.evaluation.controls.choice import described
from bmfm_pipeline.evaluation.controls.values import values_read
from bmfm_pipeline.evaluation.pages import sections
from bmfm_pipeline.evaluation.pages.charts import MOST_TARGETS_WITH_CHARTS, curves, forests, reliability, risk_coverage
from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.markdown import evaluation_markdown
from bmfm_pipeline.evaluation.pages.numbers import number, observed, percent, with_interval
from bmfm_pipeline.evaluation.pages.rendering import render
from bmfm_pipeline.evaluation.rows import Evaluation
from bmfm_pipeline.evaluation.tables import LABELS
from bmfm_pipeline.evaluation.wording import in_words, verdict_kind

# What the folder of an evaluation may hold beside its metrics; a section is there when its file is.
CALIBRATION, EMBEDDING_MAP, CONFUSED = "calibration.json", "embedding_map.json", "confused.json"


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    *,
    title: str,
    facts: dict[str, Any],
    lead: str = "",
    notes: Sequence[str] = (),
    history: Path | None = None,
    preprocessing: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
    embedding_map: dict[str, Any] | None = None,
    confused: dict[str, Any] | None = None,
    genes: dict[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    costs: Mapping[str, dict[str, Any]] | None = None,
    text: Path | None = None,
    figures: Path | None = None,
) -> None:
    """Write the page: verdict first, metrics beside controls, classes, confusion, confidence, map, curves, data, cost, config.

    `facts` and `environment` are shown as lists of what and value; `history` is a history.jsonl; `preprocessing` rows of step, cells,
    genes, counts; `calibration`, `embedding_map` and `confused` the contents of these files; `genes` a gene report; `costs` what each
    stage cost by its name. `text`: where the same goes as markdown; `figures`: a folder for the charts as SVG, and as PNG where
    matplotlib is there.
    """
    targets = list(dict.fromkeys(row["target"] for row in evaluation.rows))
    tables = sections.metric_tables(evaluation.rows, LABELS)
    for table in tables:
        drawn = len(targets) <= MOST_TARGETS_WITH_CHARTS
        table["forests"] = forests(table["target"], evaluation.rows, LABELS) if drawn else []
    context: dict[str, Any] = {
        "title": title,
        "lead": lead,
        "verdicts": [{"text": sentence, "kind": verdict_kind(sentence)} for sentence in evaluation.verdicts],
        "level": f"{100 * evaluation.level:g}",
        "tables": tables,
        "many": len(targets) > MOST_TARGETS_WITH_CHARTS,
        "controls": {
            LABELS.get(name, name): in_words(described(name, values_read(evaluation.notes)), observed())
            for name in DESCRIPTIONS
            if any(row["model"] == name for row in evaluation.rows)
        },
        "per_class": {
            name: sections.class_table(classes, f"{100 * evaluation.level:g}")
            for name, classes in evaluation.per_class.items()
        },
        "gene_errors": sections.gene_error_section(evaluation.gene_errors),
        "confusion": {name: sections.confusion_of(name, matrix) for name, matrix in evaluation.confusion.items()},
        "confused": confused if confused and confused.get("labels") else None,
        "calibration": _calibration(calibration),
        "maps": sections.map_sections(embedding_map),
        "curves": curves(history),
        "preprocessing": preprocessing or [],
        "genes": sections.gene_section(genes),
        "notes": list(dict.fromkeys([*evaluation.notes, *notes])),
        "facts": facts,
        "environment": dict(environment or {}),
        "costs": sections.cost_rows(costs or {}),
        "totals": sections.cost_totals(costs or {}),
        "config": json.dumps(config, indent=2, ensure_ascii=False) if config else "",
    }
    context["contents"] = _contents(context)
    Path(path).write_text(render("evaluation.html", **context), encoding="utf-8")
    if text is not None:
        Path(text).write_text(evaluation_markdown(context, evaluation.confusion), encoding="utf-8")
    if figures is not None:
        write_figures(figures, _drawings(context, evaluation))


CONTENTS = (
    ("metrics", "tables", "metrics"),
    ("controls", "controls", "controls"),
    ("classes", "per_class", "classes"),
    ("confusion", "confusion", "confusion"),
    ("confused", "confused", "confused pairs"),
    ("calibration", "calibration", "confidence"),
    ("gene-errors", "gene_errors", "masked genes"),
    ("map", "maps", "map"),
    ("curves", "curves", "learning curves"),
    ("preprocessing", "preprocessing", "preprocessing"),
    ("genes", "genes", "gene names"),
    ("notes", "notes", "notes"),
    ("about", "facts", "data and model"),
    ("cost", "costs", "cost"),
)


def _contents(context: dict[str, Any]) -> list[tuple[str, str]]:
    return [(place, name) for place, part, name in CONTENTS if context[part]]


def _calibration(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Charts and facts of each label of a calibration.json."""
    entries = []
    for target, entry in (found or {}).items():
        if not isinstance(entry, dict):
            continue
        drawings = [drawing for drawing in (reliability(target, entry), risk_coverage(target, entry)) if drawing]
        facts = {}
        if (temperature := entry.get("temperature")) is not None:
            said = f", fitted on {entry['n_dev']:,} dev {observed()}" if entry.get("n_dev") else ""
            facts["temperature"] = (
                f"{number(temperature)}{said}; above 1 the model was too sure, below 1 not sure enough"
            )
        if (share := entry.get("encoder_share")) is not None:
            facts["share of the encoder"] = (
                f"{number(share)}, of the linear path {number(1 - share)}, as fitted the dev {observed()} best"
            )
        for key, name in (
            ("ece", "expected calibration error"),
            ("ece_uncalibrated", "before the temperature"),
            ("brier", "Brier score"),
            ("nll", "negative log-likelihood"),
            ("aurc", "area under risk by coverage"),
        ):
            if isinstance(entry.get(key), dict) and entry[key].get("value") is not None:
                facts[name] = with_interval(entry[key])
        for part in entry.get("accuracy_at_coverage") or []:
            facts[f"right among the surest {100 * part['coverage']:g} %"] = with_interval(part)
        unknown = entry.get("unknown") or {}
        if unknown.get("threshold") is not None:
            facts["called unknown"] = (
                f"{percent(unknown.get('share'))} of the {observed()}, below confidence {number(unknown['threshold'])}; of the others "
                f"{percent(unknown.get('accuracy_of_known'))} are right"
            )
        if drawings or facts:
            entries.append({"target": target, "said": entry.get("sentence", ""), "drawings": drawings, "facts": facts})
    return entries


def _drawings(context: dict[str, Any], evaluation: Evaluation) -> list[Drawing]:
    found = [drawing for table in context["tables"] for drawing in table["forests"]]
    found += [drawing for entry in context["calibration"] for drawing in entry["drawings"]]
    found += [entry["drawing"] for drawn in (context["maps"] or {"maps": {}})["maps"].values() for entry in drawn]
    found += [
        sections.shaded_confusion(name, matrix["classes"], matrix["counts"])
        for name, matrix in evaluation.confusion.items()
        if len(evaluation.confusion) <= MOST_TARGETS_WITH_CHARTS
    ]
    return [*found, *context["curves"]]


def write_figures(folder: Path, drawings: Sequence[Drawing]) -> list[Path]:
    """NAME.svg of each drawing, named after its title, and NAME.png where matplotlib is there."""
    folder.mkdir(parents=True, exist_ok=True)
    can_draw = find_spec("matplotlib") is not None
    written: dict[str, Path] = {}
    for drawing in drawings:
        base = re.sub(r"[^a-z0-9]+", "-", drawing.title.lower()).strip("-") or "figure"
        name, again = base, 2
        while name in written:
            name, again = f"{base}-{again}", again + 1
        written[name] = folder / f"{name}.svg"
        written[name].write_text(drawing.svg(alone=True), encoding="utf-8")
        if can_draw:
            drawing.write_png(folder / f"{name}.png")
    return list(written.values())
