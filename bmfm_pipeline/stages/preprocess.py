"""Preprocess: check the input, split it, fix labels and vocabulary, transform, publish. One function per step."""

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.config.splits import resolve_split
from bmfm_pipeline.data.label_files import write_label_dict
from bmfm_pipeline.data.label_flags import with_gathered_columns
from bmfm_pipeline.data.label_ontology import describe, write_placed
from bmfm_pipeline.data.labels import build_label_dict, count_labels, empty_or_none, labels_unseen_in_training
from bmfm_pipeline.data.sources import check_source, open_several, open_source
from bmfm_pipeline.data.sources.several import SeveralFiles
from bmfm_pipeline.data.splits import read_split
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.stages.conversion import convert_files, converted
from bmfm_pipeline.stages.fitted_chain import chain_of_model, check_for_model, is_for_model
from bmfm_pipeline.stages.gene_names import chain_steps, check_gene_names, merges_genes, write_gene_report
from bmfm_pipeline.stages.gene_tables import local_gene_table
from bmfm_pipeline.stages.inputs import find_source
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.labels import input_dictionary, lost_classes, place_dictionary, place_in_ontologies
from bmfm_pipeline.stages.parts import FileParts, Origins, remove_parts
from bmfm_pipeline.stages.perturbations import (
    look_at_perturbations,
    names_column,
    record_perturbations,
    with_target_genes,
)
from bmfm_pipeline.stages.publishing import publish_staged
from bmfm_pipeline.stages.running import Progress, step_result
from bmfm_pipeline.stages.several_files import look_at_files, numbers_by_file, usable_files
from bmfm_pipeline.stages.splits import publish_named
from bmfm_pipeline.stages.splitting import make_and_record, split_rows, split_summary, stratified_classes
from bmfm_pipeline.stages.tracked import finish_tracking, start_tracking
from bmfm_pipeline.stages.vocabularies import complete_vocabularies, fixed_vocabularies, make_vocabularies
from bmfm_pipeline.storage import (
    content_hash,
    hash_file,
    is_remote,
    other_content,
    place_copy,
    read_json,
    same_content,
    strip_userinfo,
    write_json_atomic,
)

logger = logging.getLogger(__name__)
LOG_NORMALISED = (
    "the input is log-normalised (data_module.transform_kwargs.input_values): nothing was normalised again, and its values are kept in "
    "layers['log_normalised']"
)

# Several files that a step of this process opened last, and the run folder that they belong to.
_held: dict[str, tuple[Path, SeveralFiles]] = {}


def _open(job: Job):
    """The run, and its opened source: the same file in every step, fetched or built once into the run folder.

    Of several files those that the check kept. Label columns that gather others are in its obs.
    """
    run, source, cells = _opened(job)
    if not source.processed:
        cells.obs = with_gathered_columns(cells.obs, run.label_columns, str(cells.path))
    return run, source, cells


def _opened(job: Job):
    run = RunConfig.model_validate(job.config)
    source = find_source(run)
    settings, scratch = run.data_module.transform_kwargs, job.run_dir / "source"
    if source.files:
        names = usable_files(source.files, job.staging)
        place, cells = _held.get("files", (None, None))
        if place != job.run_dir or set(cells.names) != names:
            files = _local_files(job, source, settings, names)
            cells = open_several(
                files, settings.layer, settings.duplicate_genes, scratch, settings.cell_names, source.place, source.about
            )  # fmt: skip
            _hold(job, cells)
        return run, source, copy.copy(cells)
    path = source.open_path(scratch)
    if is_remote(source.uri):
        _refuse_changed(source.uri, job.inputs["source"])
    if not source.processed and not source.builder:
        path = converted(path, job.inputs["source"]["id"], job.place, settings.reading)
    layer = None if source.processed else settings.layer
    return run, source, open_source(path, layer, settings.duplicate_genes, scratch=scratch)


def _hold(job: Job, cells) -> None:
    """Keep several files open for the next step, as they are: thousands take a while. One that changes is noticed when it is read."""
    _ = cells.obs, cells.var_names  # read once for all steps
    _held["files"] = job.run_dir, cells


def _local_files(job: Job, source, settings, names=None) -> dict[str, Any]:
    """{name: h5ad on this machine} of several files, or of those in `names`; a file that cannot be made one is its DataError.

    Raises StorageError when they are no longer those of the plan.
    """
    planned = job.inputs["source"]["files"]
    if differ := sorted(set(planned) ^ set(source.files)):
        raise StorageError(
            f"{source.place}: files came or went since the run began ({', '.join(differ[:5])}); run again to use what is there now"
        )
    for name, uri in source.files.items():
        if is_remote(uri):
            _refuse_changed(uri, planned[name])
    files = {name: uri for name, uri in source.files.items() if names is None or name in names}
    contents = {name: planned[name]["id"] for name in files}
    return convert_files(files, contents, job.place, settings.reading, settings.num_workers)


def _origins(job: Job, run: RunConfig, source) -> Origins:
    settings = run.data_module.transform_kwargs
    contents = {name: entry["id"] for name, entry in job.inputs["source"]["files"].items()}
    reading = settings.reading.model_dump()
    return Origins(source.files, contents, job.workspace, reading, settings.layer, settings.duplicate_genes)


def _spread(job: Job, run: RunConfig, source, cells) -> FileParts | None:
    """How the passes over several files are made; None for one file, which is read from its beginning to its end."""
    if not source.files:
        return None
    return FileParts(job, cells, _origins(job, run, source), run.data_module.transform_kwargs.num_workers)


def _refuse_changed(uri: str, planned: dict[str, Any]) -> None:
    if content_hash(uri) != planned["id"]:
        raise StorageError(
            f"{strip_userinfo(uri)}: changed since the run began; wait until it is complete and run again"
        )


def _counts_needed(run: RunConfig, source) -> bool:
    return not source.processed and run.data_module.transform_kwargs.input_values == "counts"


def _log_normalised(run: RunConfig, source) -> bool:
    return not source.processed and run.data_module.transform_kwargs.input_values == "log_normalised"


def check(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Look for every problem of the input at once, before anything is computed."""
    shutil.rmtree(job.staging, ignore_errors=True)
    start_tracking(job)
    run = RunConfig.model_validate(job.config)
    source, files = find_source(run), None
    chain = _chain(job, run, source)  # names and arguments of the steps
    if source.files:
        files = look_at_files(
            job,
            run,
            _local_files(job, source, run.data_module.transform_kwargs),
            source,
            _origins(job, run, source),
            _counts_needed(run, source),
            chain if is_for_model(job) else None,
        )
        _hold(job, files.cells)
        cells = files.cells = copy.copy(files.cells)
        cells.obs = with_gathered_columns(cells.obs, run.label_columns, source.place)
    else:
        run, source, cells = _open(job)
    if not is_for_model(job):
        chain.look_at(cells)
    stratify, fewest = stratified_classes(resolve_split(run))
    report = check_source(
        cells,
        [(column.label_column_name, column.is_regression_label) for column in run.label_columns],
        need_counts=_counts_needed(run, source),
        log_normalised=_log_normalised(run, source),
        stratify=stratify,
        min_class_size=fewest,
        duplicate_genes="sum" if merges_genes(chain) else run.data_module.transform_kwargs.duplicate_genes,
        values=None if files is None else files.values,
    )
    check_for_model(job, run, chain, cells)
    genes = check_gene_names(run, chain, cells, report.pop("gene_totals"), job.inputs)
    if files is not None:
        files.finish(genes, job.staging)
        report |= {"files": len(files.rows), "files_set_aside": len(files.set_aside), "selection": source.selection}
    report |= look_at_perturbations(run, cells.obs, chain.gene_names(cells.var_names))
    report["gene_names"] = write_gene_report(genes, job.staging, None if files is None else files.of_genes())
    file = job.staging / "check.json"
    write_json_atomic(file, report)
    rows = [{"what": name, "found": value} for name, value in report.items() if isinstance(value, str | int | float)]
    rows += [] if files is None else files.table()
    rows += genes.rows()
    return {"uri": str(file), "hash": hash_file(file), "summary": report, "table": rows}


def split(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Assign every cell to train, dev or test, before anything is fitted."""
    run, _, cells = _open(job)
    entries = [entry for entry in run.label_columns if not entry.is_regression_label]
    separators = {entry.label_column_name: entry.multilabel_str_sep for entry in entries if entry.is_multilabel}
    labels = [entry.label_column_name for entry in entries]
    single = [name for name in labels if name not in separators]
    made, info = make_and_record(job, resolve_split(run), cells.obs, single, run, cells.var_names)
    unseen = labels_unseen_in_training(cells.obs, made.assigned, labels, separators)
    summary = {**split_summary(info), "labels_not_in_training": unseen}
    file = str(job.staging / "split.csv")
    return {"uri": file, "hash": info["hash"], "summary": summary, "table": split_rows(info)}


def label_dictionary(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Fix the class ids of every label column; a dictionary file of the user is honoured, never silently extended."""
    run, _, cells = _open(job)
    known = build_label_dict(cells.obs, run.label_columns, path=input_dictionary(job, run))
    labels = {column.label_column_name: known[column.label_column_name] for column in run.label_columns}
    file = job.staging / "label_dict.json"
    write_label_dict(file, labels)
    counts = count_labels(cells.obs, run.label_columns, labels)
    for line in empty_or_none(cells.obs, run.label_columns):
        logger.warning("%s", line)
    placed = place_in_ontologies(job, run, labels)
    for name, classes in placed.items():
        counts[name]["ontology"] = describe(classes)
    if placed:
        write_placed(job.staging, placed)
    write_json_atomic(job.staging / "labels.json", counts)
    summary = {name: len(values) for name, values in labels.items()}
    rows = [{"label": name, "classes": summary[name], "cells_without": counts[name]["missing"]} for name in counts]
    for row in rows:
        if row["label"] in placed:
            row["in_ontology"] = counts[row["label"]]["ontology"]["placed"]
    return {"uri": str(file), "hash": hash_file(file), "summary": summary, "table": rows}


def vocabulary(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Fix the token ids of genes and binned expressions: built from the training rows, or copied from a tokenizer folder."""
    run, source, cells = _open(job)
    chain = _chain(job, run, source)
    if is_for_model(job):
        genes = chain.fitted_genes(cells.var_names)
    else:
        spread = _spread(job, run, source, cells)
        genes = with_target_genes(run, cells.obs, chain.vocabulary_genes(cells, _fit_rows(job, run), spread))
    write_json_atomic(job.staging / "transforms.json", chain.to_json())
    vocabularies, summary = make_vocabularies(run, genes, chain.n_values, _fixed(run, chain))
    if summary["unknown"]:
        logger.warning(
            "%d of %d genes are not in %s and the model will not see them, e.g. %s",
            summary["unknown"], summary["genes"], run.tokenizer.identifier, ", ".join(summary["unknown_examples"]),
        )  # fmt: skip
    vocabularies.save(job.staging)
    write_json_atomic(job.staging / "vocabulary.json", summary)
    file = job.staging / "tokenizers" / "genes" / "tokenizer.json"
    return {"uri": str(job.staging / "tokenizers"), "hash": hash_file(file), "summary": summary}


def _fixed(run: RunConfig, chain):
    return fixed_vocabularies(run, chain.n_values, table=local_gene_table(run))


def _chain(job: Job, run: RunConfig, source):
    if is_for_model(job):
        return chain_of_model(job)
    return build_chain([] if source.processed else chain_steps(run))


def _fit_rows(job: Job, run: RunConfig):
    """Row numbers that statistics may see: the training rows, or None for all (fit_on: all)."""
    if run.data_module.transform_kwargs.fit_on == "all":
        return None
    return (read_split(job.staging).to_numpy() == "train").nonzero()[0]


def transform(job: Job, on_progress: Progress) -> dict[str, Any]:
    """Run the chain as it was fitted for the vocabulary and write the processed h5ad, with raw counts beside the values."""
    run, source, cells = _open(job)
    chain = Chain.from_json(read_json(job.staging / "transforms.json"))
    assigned = read_split(job.staging).to_numpy()
    column = read_json(job.staging / "split.json")["column"]
    file = job.staging / "processed.h5ad"
    logs = _log_normalised(run, source)
    keep_counts = logs or _counts_needed(run, source)
    report = chain.run(
        cells, None, file, {column: assigned, **names_column(run, cells.obs)}, keep_counts=keep_counts, fitted=True, row_filters=not is_for_model(job),
        layer="log_normalised" if logs else "counts", spread=_spread(job, run, source, cells),
    )  # fmt: skip
    remove_parts(job)
    if logs:
        report.notes.append(LOG_NORMALISED)
    for step, count in report.dropped_cells.items():
        logger.warning("%d of %d cells were dropped by %s", count, cells.n_cells, step)
    complete_vocabularies(run, job.staging, column)
    perturbed = record_perturbations(run, cells.obs, job.staging, column)
    lost = lost_classes(run, cells.obs, file)
    for label, gone in lost.items():
        shown = ", ".join(f"{name} ({count} cells)" for name, count in list(gone.items())[:5])
        logger.warning("%d classes of %s lost all of their cells in the transforms: %s", len(gone), label, shown)
    plain = {
        **report.to_dict(),
        **perturbed,
        "lost_classes": lost,
        "check": step_result(job, "check")["summary"],
        "split": step_result(job, "split")["summary"],
    }
    plain["labels"] = read_json(job.staging / "labels.json")
    plain["vocabulary"] = read_json(job.staging / "vocabulary.json")
    plain["gene_names"] = read_json(job.staging / "gene_report.json")
    last = report.steps[-1]
    summary = {"cells": last.cells, "genes": last.genes, "share_of_counts": round(report.share_of_counts, 4)}
    if source.files:
        plain["files"] = numbers_by_file(job.staging, file)
        summary |= {name: step_result(job, "check")["summary"][name] for name in ("files", "files_set_aside")}
    write_json_atomic(job.staging / "report.json", plain)
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
    plan = resolve_split(run)
    named = {"split_artefact": publish_named(job, plan.name)} if plan.name else {}
    artefact = publish_staged(job, summary)
    _held.clear()
    copies = place_copies(run, artefact.local())
    shutil.rmtree(job.run_dir / "source", ignore_errors=True)
    links = finish_tracking(job, artefact, files=["report.json", "gene_report.json", "split.json", "label_dict.json"])
    summary = {**summary, **named, "copies": copies}
    return {"uri": artefact.uri, "hash": artefact.hash, "summary": summary, "links": links}


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
    return {name: require_path(path, name) for name, path in asked.items() if path}


def _refuse_other_content(run: RunConfig, job: Job) -> None:
    for name, path in _asked_copies(run).items():
        if name != "label_dict.json" and same_content(job.staging / name, path) is False:
            raise other_content(path)


def place_copies(run: RunConfig, folder: Path) -> list[str]:
    """Copy what the config asks for out of a published artefact; what is there already stays, and must be the same.

    A label dictionary that is there gets the columns that it lacks.
    """
    placed = []
    for name, path in _asked_copies(run).items():
        if name == "label_dict.json":
            place_dictionary(run, folder / name)
        else:
            place_copy(folder / name, path)
        placed.append(path)
    return placed
