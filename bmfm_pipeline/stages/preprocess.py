"""Preprocess: check the input, split it, fix labels and vocabulary, transform, publish. One function per step."""

import logging
import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.data.labels import build_label_dict, labels_unseen_in_training, write_label_dict
from bmfm_pipeline.data.sources import check_source, open_source
from bmfm_pipeline.data.sources.gene_names import check_genes
from bmfm_pipeline.data.splits import make_split, read_split, split_column, write_split
from bmfm_pipeline.data.transforms import build_chain
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.stages.inputs import find_source
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.running import Progress, step_result
from bmfm_pipeline.stages.tracked import finish_tracking, start_tracking
from bmfm_pipeline.storage import copy_atomic, hash_file, is_remote, read_json, write_json_atomic
from bmfm_pipeline.storage import publish as publish_artefact
from bmfm_pipeline.vocabulary import MultiFieldVocabulary, build_vocabularies

logger = logging.getLogger(__name__)


def _open(job: Job):
    """The run, and its opened source: the same file in every step, fetched or built once into the run folder."""
    run = RunConfig.model_validate(job.config)
    source = find_source(run)
    path = source.open_path(job.run_dir / "source")
    settings = run.data_module.transform_kwargs
    return run, source, open_source(path, None if source.processed else settings.layer, settings.duplicate_genes)


def _stratify_column(run: RunConfig) -> str | None:
    settings = run.data_module
    named = settings.transform_kwargs.stratifying_label or settings.dataset_kwargs.stratifying_label
    if named or settings.transform_kwargs.split_column_name:
        return named
    return next((column.label_column_name for column in run.label_columns if column.is_stratification_label), None)


def _given_split(run: RunConfig) -> str | None:
    settings = run.data_module
    return settings.transform_kwargs.split_column_name or settings.dataset_kwargs.split_column_name


def _counts_needed(run: RunConfig, source) -> bool:
    return not source.processed and run.data_module.transform_kwargs.input_values == "counts"


def check(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Look for every problem of the input at once, before anything is computed."""
    shutil.rmtree(job.staging, ignore_errors=True)
    start_tracking(job)
    run, source, cells = _open(job)
    _chain(run, source)  # names and arguments of the steps
    weights = run.data_module.transform_kwargs.split_weights
    report = check_source(
        cells,
        [(column.label_column_name, column.is_regression_label) for column in run.label_columns],
        need_counts=_counts_needed(run, source),
        stratify=None if _given_split(run) else _stratify_column(run),
        min_class_size=1 + (weights.test > 0) + (weights.dev > 0),
        duplicate_genes=run.data_module.transform_kwargs.duplicate_genes,
    )
    file = job.staging / "check.json"
    write_json_atomic(file, report)
    rows = [{"what": name, "found": value} for name, value in report.items() if isinstance(value, str | int | float)]
    return {"uri": str(file), "hash": hash_file(file), "summary": report, "table": rows}


def split(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Assign every cell to train, dev or test, before anything is fitted."""
    run, _, cells = _open(job)
    settings = run.data_module.transform_kwargs
    seed = run.seed.seed_value if settings.random_state is None else settings.random_state
    weights, stratify, column = settings.split_weights.model_dump(), _stratify_column(run), _given_split(run)
    assigned = make_split(cells.obs, weights=weights, stratify=stratify, seed=seed, column=column)
    made_with = {"weights": weights, "stratify": stratify, "seed": seed, "from_column": column}
    info = write_split(job.staging, assigned, name=split_column(stratify, column), **made_with)
    labels = [entry.label_column_name for entry in run.label_columns if not entry.is_regression_label]
    unseen = labels_unseen_in_training(cells.obs, assigned, labels)
    summary = {**info["counts"], "labels_not_in_training": unseen}
    rows = [{"split": name, "cells": count} for name, count in info["counts"].items()]
    return {"uri": str(job.staging / "split.csv"), "hash": info["hash"], "summary": summary, "table": rows}


def label_dictionary(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Fix the class ids of every label column; a dictionary file of the user is honoured, never silently extended."""
    run, _, cells = _open(job)
    path = run.data_module.dataset_kwargs.label_dict_path
    existing = require_path(path, "data_module.dataset_kwargs.label_dict_path") if path else None
    labels = build_label_dict(
        cells.obs, run.label_columns, path=existing if existing and Path(existing).exists() else None
    )
    file = job.staging / "label_dict.json"
    write_label_dict(file, labels)
    summary = {name: len(values) for name, values in labels.items()}
    rows = [{"label": name, "classes": count} for name, count in summary.items()]
    return {"uri": str(file), "hash": hash_file(file), "summary": summary, "table": rows}


def vocabulary(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Fix the token ids of genes and binned expressions: built from the training rows, or copied from a tokenizer folder."""
    run, source, cells = _open(job)
    chain = _chain(run, source)
    genes = chain.vocabulary_genes(cells, _fit_rows(job, run))
    identifier = run.tokenizer.identifier
    if identifier == "data":
        vocabularies = build_vocabularies(genes, chain.n_values)
        summary = {"genes": len(genes), "known": len(genes), "unknown": 0, "unknown_examples": []}
    else:
        vocabularies = MultiFieldVocabulary.load(require_path(identifier, "tokenizer.identifier"))
        summary = check_genes(genes, vocabularies["genes"].tokens, identifier)
        if summary["unknown"]:
            logger.warning(
                "%d of %d genes are not in %s and the model will not see them, e.g. %s",
                summary["unknown"], summary["genes"], identifier, ", ".join(summary["unknown_examples"]),
            )  # fmt: skip
    vocabularies.save(job.staging)
    write_json_atomic(job.staging / "vocabulary.json", summary)
    file = job.staging / "tokenizers" / "genes" / "tokenizer.json"
    return {"uri": str(job.staging / "tokenizers"), "hash": hash_file(file), "summary": summary}


def _chain(run: RunConfig, source):
    steps = run.data_module.transform_kwargs.transforms or []
    return build_chain([] if source.processed else [step.model_dump() for step in steps])


def _fit_rows(job: Job, run: RunConfig):
    """Row numbers that statistics may see: the training rows, or None for all (fit_on: all)."""
    if run.data_module.transform_kwargs.fit_on == "all":
        return None
    return (read_split(job.staging).to_numpy() == "train").nonzero()[0]


def transform(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Run the chain in two passes and write the processed h5ad, with raw counts beside the values."""
    run, source, cells = _open(job)
    chain = _chain(run, source)
    assigned = read_split(job.staging).to_numpy()
    column = read_json(job.staging / "split.json")["column"]
    file = job.staging / "processed.h5ad"
    keep_counts = _counts_needed(run, source)
    report = chain.run(cells, _fit_rows(job, run), file, {column: assigned}, keep_counts=keep_counts)
    for step, count in report.dropped_cells.items():
        logger.warning("%d of %d cells were dropped by %s", count, cells.n_cells, step)
    write_json_atomic(job.staging / "transforms.json", chain.to_json())
    plain = {
        **report.to_dict(),
        "check": step_result(job, "check")["summary"],
        "split": step_result(job, "split")["summary"],
    }
    plain["vocabulary"] = step_result(job, "vocabulary")["summary"]
    write_json_atomic(job.staging / "report.json", plain)
    last = report.steps[-1]
    summary = {"cells": last.cells, "genes": last.genes, "share_of_counts": round(report.share_of_counts, 4)}
    rows = [
        {"step": entry.step, "cells": entry.cells, "genes": entry.genes, "counts": entry.counts}
        for entry in report.steps
    ]
    return {"uri": str(file), "hash": hash_file(file), "summary": summary, "table": rows}


def publish(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Publish the artefact, and copy it to the places that the config names."""
    run = RunConfig.model_validate(job.config)
    write_json_atomic(job.staging / "run_config.json", job.config)
    summary = {"name": job.name, **step_result(job, "transform")["summary"], **step_result(job, "split")["summary"]}
    _refuse_other_content(run, job)
    artefact = publish_artefact(
        job.staging,
        job.place,
        job.stage,
        job.key,
        inputs=job.inputs,
        config=job.view,
        code_version=job.code,
        summary=summary,
    )
    copies = place_copies(run, artefact.local(job.run_dir / "published"))
    shutil.rmtree(job.run_dir / "source", ignore_errors=True)
    links = finish_tracking(job, artefact, files=["report.json", "split.json", "label_dict.json"])
    return {"uri": artefact.uri, "hash": artefact.hash, "summary": {**summary, "copies": copies}, "links": links}


def _asked_copies(run: RunConfig) -> dict[str, str]:
    """{file of the artefact: where the config wants a copy}."""
    settings = run.data_module
    if not settings.transform_datasets:
        return {}
    asked = {
        "processed.h5ad": settings.transform_kwargs.processed_data_source
        or settings.dataset_kwargs.processed_data_source,
        "label_dict.json": settings.dataset_kwargs.label_dict_path,
    }
    return {name: require_path(path, name) for name, path in asked.items() if path and not is_remote(path)}


def _refuse_other_content(run: RunConfig, job: Job) -> None:
    for name, path in _asked_copies(run).items():
        target = Path(path)
        if (
            target.exists()
            and hash_file(target) != hash_file(job.staging / name)
            and not (name == "label_dict.json" and "label_dict" in job.inputs)
        ):
            raise StorageError(
                f"{target}: exists with other content and is not overwritten; move it away, name another path, or use it as it is with "
                "data_module.transform_datasets=false"
            )


def place_copies(run: RunConfig, folder: Path) -> list[str]:
    """Copy what the config asks for out of a published artefact; files that are there already stay."""
    placed = []
    for name, path in _asked_copies(run).items():
        if not Path(path).exists():
            copy_atomic(folder / name, Path(path))
        placed.append(path)
    return placed
