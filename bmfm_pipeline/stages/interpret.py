"""Interpret: which genes the model's predictions come from, by cell and by class. One function per step."""

import csv
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.publishing import publish_staged
from bmfm_pipeline.stages.running import Progress
from bmfm_pipeline.stages.tracked import finish_tracking, start_tracking
from bmfm_pipeline.storage import hash_file, read_json, write_json_atomic

SHOWS_ZEROS = ("all",)
FEW_CELLS = 10
ON_THE_PAGE = ("class", "gene", "mean", "ci_low", "ci_high", "q_null", "n_present", "n_cells")


def _run(job: Job) -> RunConfig:
    return RunConfig.model_validate(job.config)


def _seed(run: RunConfig) -> int:
    return run.seed.seed_value if run.task.seed is None else run.task.seed


def _baseline(run: RunConfig, vocabularies, naming: str):
    """The baseline that task.baseline names; `auto` is zero where cells are shown with genes that they do not express."""
    from bmfm_pipeline.evaluation.attributions.paths import Baseline
    from bmfm_pipeline.stages.interpret_cells import kept_tokens

    module = run.data_module
    if module.sequences is not None:
        return Baseline("pad", kept_tokens(run, vocabularies, naming), run.model.pad_token_id, {})
    shows_zeros = module.dataset_kwargs.expose_zeros in SHOWS_ZEROS or module.pad_zero_expression_strategy is not None
    kind = run.task.baseline if run.task.baseline != "auto" else "zero" if shows_zeros else "pad"
    if kind == "zero" and not shows_zeros:
        raise ConfigError(
            "task.baseline: zero shows the model genes without expression, which it has never seen (its data_module shows expressed genes "
            "only); use task.baseline=pad"
        )
    zeros = {}
    for name, vocabulary in vocabularies.items():
        ids = vocabulary.value_ids() if name != naming else ()
        if len(ids) and ids[0] > 0:
            zeros[name] = int(ids[0])
    return Baseline(kind, kept_tokens(run, vocabularies, naming), run.model.pad_token_id, zeros)


def attribute(job: Job, on_progress: Progress) -> dict[str, Any]:
    """attributions.json, cell by cell, and what the table needs; checks on a few cells."""
    from bmfm_pipeline.evaluation.attributions.cells import attribute_cells
    from bmfm_pipeline.evaluation.attributions.checks import CHECKED_CELLS, check_attributions
    from bmfm_pipeline.evaluation.attributions.integrate import Attributor
    from bmfm_pipeline.evaluation.attributions.paths import naming_row
    from bmfm_pipeline.models import load_model
    from bmfm_pipeline.stages.interpret_cells import open_cells

    shutil.rmtree(job.staging, ignore_errors=True)
    job.staging.mkdir(parents=True)
    start_tracking(job)
    run = _run(job)
    folder = input_folder(job, "model")
    model = load_model(folder, source=job.inputs["model"]["uri"])
    chosen = open_cells(job, run, model, folder, _seed(run))
    fields = model.config.input_fields
    naming = fields[naming_row(fields)].name
    settings = run.task.attribute_kwargs
    attributor = Attributor(
        model,
        [column.name for column in chosen.columns],
        _baseline(run, chosen.vocabularies, naming),
        n_steps=settings.n_steps,
        method=settings.method,
        internal_batch_size=settings.internal_batch_size,
        device="cuda" if run.task.accelerator == "gpu" else "cpu",
    )
    size = min(run.data_module.evaluation_batch_size, settings.internal_batch_size)
    total = len(chosen.rows)
    found = attribute_cells(
        attributor,
        chosen.loader(chosen.rows, size),
        chosen.columns,
        chosen.vocabularies[naming].tokens,
        job.staging / "attributions.json",
        lambda done: on_progress({"kind": "progress", "stage": "interpret", "step": done, "max_steps": total}),
    )
    if not found.facts:
        raise DataError(
            "interpret: no cell has a class to attribute; name classes with task.attribute_filter={LABEL: [CLASS, ...]}"
        )
    _write_own(job.staging / "cell_attributions.parquet", found, chosen)
    _write_facts(job.staging / "cells.csv", found.facts)
    some = chosen.rows[np.unique(np.linspace(0, total - 1, min(total, CHECKED_CELLS)).astype(np.int64))]
    checks = check_attributions(attributor, chosen.loader(some, size), _seed(run), run.task.sanity_checks)
    logos: dict[str, Any] = {}
    if chosen.letters is not None:
        from bmfm_pipeline.stages.sequences.interpret import write_base_attributions

        logos, checks["exchanged"] = write_base_attributions(job.staging, found, chosen, model, folder, run, _seed(run))
    state = {
        "baseline": attributor.baseline.kind,
        "groups": chosen.groups,
        "checks": checks,
        "notes": [*chosen.notes, *_notes(run, chosen)],
        "from_file": "cells" in job.inputs,
        "cells": total,
        "of": "cells" if chosen.letters is None else "sequences",
        "logos": logos,
    }
    write_json_atomic(job.run_dir / "attributed.json", state)
    file = job.staging / "attributions.json"
    return {"uri": str(file), "hash": hash_file(file), "summary": {"cells": total, "baseline": state["baseline"]}}


def _notes(run: RunConfig, chosen) -> list[str]:
    from bmfm_pipeline.evaluation.attributions.cells import ALL_CLASSES

    notes = []
    for column in chosen.columns:
        if column.wanted is None:
            notes.append(
                f"{column.name} has {len(column.classes)} classes, more than {ALL_CLASSES}: each cell has the attributions of its predicted "
                f"and its true class only; task.attribute_filter={{{column.name}: [CLASS, ...]}} names others"
            )
    if run.task.attribute_kwargs.n_steps is not None:
        notes.append(
            f"task.attribute_kwargs.n_steps is {run.task.attribute_kwargs.n_steps} for every cell, whatever its error"
        )
    return notes


def _write_own(path: Path, found, chosen) -> None:
    """Rows of (label, class, cell, gene, score, logit): every cell's attributions for the classes that it is of."""
    import pyarrow as pa
    from pyarrow import parquet

    words = [(name, pa.string()) for name in ("label", "class", "cell")]
    schema = pa.schema([*words, ("gene", pa.int32()), ("score", pa.float32()), ("logit", pa.float32())])
    classes = {column.name: column.classes for column in chosen.columns}
    with parquet.ParquetWriter(path, schema) as writer:
        order = list(classes)
        for (label, kind), own in sorted(found.own.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
            lengths = [len(one) for one in own.tokens]
            count = sum(lengths)
            name = classes[label][kind] if classes[label] else None
            columns = [
                pa.array([label] * count, pa.string()),
                pa.array([name] * count, pa.string()),
                pa.array(np.repeat(np.array(own.cells, dtype=object), lengths), pa.string()),
                pa.array(np.concatenate(own.tokens), pa.int32()),
                pa.array(np.concatenate(own.scores), pa.float32()),
                pa.array(np.concatenate(own.logits), pa.float32()),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_facts(path: Path, facts: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(facts[0]))
        writer.writeheader()
        writer.writerows(facts)


def table(job: Job, on_progress: Progress) -> dict[str, Any]:
    """attributions.csv and .parquet, one row per class and gene, and interpretation.json."""
    from bmfm_pipeline.evaluation.attributions.summary import completeness, sentences, summarise_class
    from bmfm_pipeline.evaluation.wording import in_words

    run, state = _run(job), read_json(job.run_dir / "attributed.json")
    facts = _read_facts(job.staging / "cells.csv")
    frames, labels = [], {}
    for label in dict.fromkeys(fact["label"] for fact in facts):
        labels[label] = {"cells_of": _cells_of(state, run, label), "classes": []}
    for label, kind, frame, stability in _class_tables(job, run, state):
        frames.append(frame)
        columns = {name: frame[name].to_numpy() for name in frame if name not in ("label", "class")}
        labels[label]["classes"].append(summarise_class(kind, columns, stability))
    for label, entry in labels.items():
        own = [fact for fact in facts if fact["label"] == label]
        shown = {one["class"] for one in entry["classes"]}
        missing = [name for name in dict.fromkeys(fact["class"] for fact in own) if name and name not in shown]
        if missing:
            state["notes"].append(
                f"{label}: no cell here is of {', '.join(missing)}; attributions.json has their scores"
            )
        entry |= {"completeness": completeness(own), "baseline_class": _baseline_class(run, label, own)}
        if label in state["logos"]:
            entry["logos"] = state["logos"][label]
    few = [one["class"] for entry in labels.values() for one in entry["classes"] if 1 < one["n_cells"] < FEW_CELLS]
    if few:
        state["notes"].append(f"intervals of fewer than {FEW_CELLS} cells are too narrow: {', '.join(map(str, few))}")
    _write_frames(job.staging, frames)
    found = {
        "baseline": state["baseline"],
        "cells": state["cells"],
        "level": run.task.level,
        "resamples": run.task.resamples,
        "permutations": run.task.permutations,
        "labels": labels,
        "checks": state["checks"],
        "notes": [
            in_words(text, state["of"]) for text in (f"baseline: {_BASELINES[state['baseline']]}", *state["notes"])
        ],
        "of": state["of"],
    }
    found["sentences"] = [in_words(text, state["of"]) for text in sentences(found)]
    write_json_atomic(job.staging / "interpretation.json", found)
    file = job.staging / "attributions.csv"
    rows = [
        {"class": entry["class"], **row}
        for label in labels.values()
        for entry in label["classes"]
        for row in entry["top"][:3]
    ]
    shown = [{name: row[name] for name in ON_THE_PAGE} for row in rows]
    return {"uri": str(file), "hash": hash_file(file), "summary": {"sentences": found["sentences"]}, "table": shown}


def _baseline_class(run: RunConfig, label: str, facts: list[dict[str, Any]]) -> str | None:
    from bmfm_pipeline.evaluation.attributions.summary import baseline_class

    column = next(entry for entry in run.label_columns if entry.label_column_name == label)
    filtered = label in (run.task.attribute_filter or {})
    return None if column.is_regression_label or column.is_multilabel or filtered else baseline_class(facts)


_BASELINES = {
    "pad": "the cell with padding in place of its genes, which says nothing",
    "zero": "the cell with the same genes, none of them expressed",
}


def _cells_of(state: dict[str, Any], run: RunConfig, label: str) -> str:
    column = next(entry for entry in run.label_columns if entry.label_column_name == label)
    return "all" if column.is_regression_label else "predicted" if state["from_file"] else "true"


def _class_tables(job: Job, run: RunConfig, state: dict[str, Any]):
    """(label, class, DataFrame, stability of the top) of every class that has cells, in the order of the file."""
    import pandas as pd
    from pyarrow import parquet
    from scipy import sparse

    from bmfm_pipeline.evaluation.attributions.table import class_table
    from bmfm_pipeline.vocabulary import MultiFieldVocabulary

    tokens = np.array(_tokens(MultiFieldVocabulary.load(input_folder(job, "model"))), dtype=object)
    task = run.task
    with parquet.ParquetFile(job.staging / "cell_attributions.parquet") as file:
        for number in range(file.num_row_groups):
            part = file.read_row_group(number).to_pandas()
            if part.empty:
                continue
            label, kind = part["label"].iloc[0], part["class"].iloc[0]
            cells, row = np.unique(part["cell"].to_numpy(dtype=object), return_inverse=True)
            genes, column = np.unique(part["gene"].to_numpy(), return_inverse=True)
            matrices = [
                sparse.csr_matrix((part[name].to_numpy(np.float64), (row, column)), shape=(len(cells), len(genes)))
                for name in ("score", "logit")
            ]
            groups = np.array([state["groups"][cell] for cell in cells], dtype=object) if state["groups"] else None
            if groups is not None and len(np.unique(groups)) < 2:
                groups = None
            table, stability = class_table(
                *matrices, level=task.level, resamples=task.resamples, permutations=task.permutations, seed=_seed(run), groups=groups
            )  # fmt: skip
            names = tokens[genes[table.pop("column")]]
            yield label, kind, pd.DataFrame({"label": label, "class": kind, "gene": names, **table}), stability


def _tokens(vocabularies) -> list[str]:
    """Words of the field that names positions: genes, else the first one."""
    return (vocabularies.get("genes") or next(iter(vocabularies.values()))).tokens


def _write_frames(folder: Path, frames: list) -> None:
    import pandas as pd

    from bmfm_pipeline.evaluation.attributions.table import COLUMNS

    whole = (
        pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["label", "class", "gene", *COLUMNS])
    )
    whole.to_csv(folder / "attributions.csv", index=False, float_format="%.6g")
    whole.to_parquet(folder / "attributions.parquet", index=False)


def _read_facts(path: Path) -> list[dict[str, Any]]:
    numbers = ("error", "delta", "positions", "cell_summary", "linear_path")
    with open(path, newline="", encoding="utf-8") as stream:
        return [
            {**row, **{name: float(row[name]) for name in numbers}, "steps": int(row["steps"])}
            for row in csv.DictReader(stream)
        ]


def report(job: Job, on_progress: Progress) -> dict[str, Any]:
    """interpret.html, self-contained, and its figures as SVG."""
    from bmfm_pipeline.evaluation.pages.attributions_page import attributions_page, drawings_of, logos_of

    run, found = _run(job), read_json(job.staging / "interpretation.json")
    about = {
        "dataset": job.name,
        "model": job.inputs["model"]["uri"],
        found["of"]: f"{found['cells']:,}, of {job.inputs['cells' if 'cells' in job.inputs else 'data']['uri']}",
        "method": f"integrated gradients (captum), {run.task.attribute_kwargs.method}",
        "seed": _seed(run),
        "hardware": f"{platform.processor() or platform.machine()}, {run.task.accelerator}",
        "key": job.key,
    }
    file = job.staging / "interpret.html"
    file.write_text(attributions_page(found, f"{job.name}: what predictions come from", about), encoding="utf-8")
    figures = job.staging / "figures"
    figures.mkdir(exist_ok=True)
    for label, entry in found["labels"].items():
        for name, drawing in [*drawings_of(label, entry, found["of"]), *logos_of(label, entry)]:
            (figures / f"{name}.svg").write_text(drawing.svg(alone=True), encoding="utf-8")
    return {"uri": str(file), "hash": hash_file(file)}


def publish(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Publish attributions, tables and page."""
    write_json_atomic(job.staging / "run_config.json", job.config)
    found = read_json(job.staging / "interpretation.json")
    summary = {"name": job.name, "cells": found["cells"]}
    for label, entry in found["labels"].items():
        summary[f"{label}_largest_error"] = entry["completeness"]["largest_error"]
        summary[f"{label}_classes_with_genes"] = sum(bool(one["stand_out"]) for one in entry["classes"])
    artefact = publish_staged(job, summary)
    links = finish_tracking(job, artefact, files=["attributions.csv", "interpretation.json", "interpret.html"])
    links["Report"] = artefact.file("interpret.html")
    return {"uri": artefact.uri, "hash": artefact.hash, "summary": artefact.summary, "links": links}
