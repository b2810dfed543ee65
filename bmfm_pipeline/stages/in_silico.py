"""Perturbations in silico: cells of a file with the expression of chosen genes changed, and what that does to a model's answers.

A model of perturbations predicts the profile of the perturbed cells; any other model says how its predictions and embeddings move.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.perturbations import MODEL_RECORD, looks_like_control
from bmfm_pipeline.data.perturbations.expressions import Change, read_change, value_of
from bmfm_pipeline.data.sources import open_source
from bmfm_pipeline.errors import ConfigError, DataError, did_you_mean
from bmfm_pipeline.stages.models import find_checkpoint
from bmfm_pipeline.stages.predict import check_input, duplicates_rule
from bmfm_pipeline.stages.predicting.chunks import EMBEDDINGS, LOGITS, ChunkPredictor
from bmfm_pipeline.stages.predicting.poolings import named_poolings
from bmfm_pipeline.stages.predicting.predictor import Predictor
from bmfm_pipeline.stages.predicting.tables import write_table
from bmfm_pipeline.storage import (
    Workspace,
    check_allowed,
    disk_errors,
    is_remote,
    local_path,
    localise,
    read_json,
    strip_userinfo,
)

logger = logging.getLogger(__name__)
PROFILES, EFFECTS, CELLS = "perturbed_profiles", "perturbation_effects", "perturbed_cells"
Progress = Callable[[dict[str, Any]], None]


def perturb_file(
    model: str,
    file: str,
    output: str | Path,
    perturbations: Sequence[str],
    *,
    layer: str | None = None,
    batch_size: int | None = None,
    kind: str = "csv",
    workspace: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what each of `perturbations` (GENE=EXPRESSION, see data/perturbations/expressions.py) does to the cells of `file`.

    A model of perturbations: perturbed_profiles (perturbation, gene, control, predicted, change), from the control cells of the file, which
    are all where it does not say. Another model: perturbation_effects (perturbation, label, class, before, after, change: means over cells)
    and perturbed_cells (a row per cell and perturbation). Expressions are on the scale that the model reads. Returns numbers for a person.
    Raises ConfigError for a perturbation that cannot be read, or of a gene that the model does not know, DataError for an unusable file.
    """
    from bmfm_pipeline.models import load_model, model_folder
    from bmfm_pipeline.stages.planning import settled

    if is_remote(output):
        raise ConfigError("--perturb writes into a local folder; copy the tables to s3 afterwards")
    changes = [read_change(text) for text in perturbations]
    place, tell = Workspace(workspace), on_progress or (lambda event: None)
    check_allowed(file, "--input")
    output = local_path(output)
    check_allowed(output, "--output", also=(place.state_dir,))
    named = find_checkpoint(model, place, None, stage="finetune")
    folder = model_folder(named.uri)
    predictor = Predictor.open(folder)
    source = open_source(localise(file), layer, duplicates_rule(predictor))
    genes = check_input(source, predictor)
    network = load_model(folder, source=strip_userinfo(named.uri))
    chunks = ChunkPredictor(
        predictor, source, network, settled(predictor.run), batch_size, named_poolings([predictor.pooling])
    )
    tables, summary = (_profiles if predictor.run.predicts_pairs else _effects)(chunks, changes, tell)
    with disk_errors(output, "--output"):
        output.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            columns = {
                column: values if values and isinstance(values[0], str) else np.array(values, dtype=np.float64)
                for column, values in table.items()
            }
            write_table(output / f"{name}.{kind}", columns)
    files = [str(output / f"{name}.{kind}") for name in tables]
    return {
        "output": str(output),
        "model": str(model),
        "genes": genes,
        "perturbations": [change.text for change in changes],
        "files": files,
        **summary,
    }


# ---- models of perturbations


def _profiles(chunks: ChunkPredictor, changes: list[Change], tell: Progress) -> tuple[dict[str, dict], dict[str, Any]]:
    predictor = chunks.predictor
    record = read_json(predictor.folder / MODEL_RECORD)
    vocabulary = predictor.vocabularies["genes"]
    known = vocabulary.tokens[vocabulary.n_special :]
    for change in changes:
        for entry in change.genes:
            if entry.gene not in vocabulary:
                raise ConfigError(
                    f"--perturb {change.text}: the model does not know the gene {entry.gene}{did_you_mean(entry.gene, known, before='; ')}"
                )
            if entry.gene not in record["trained_targets"]:
                logger.warning(
                    "%s: no perturbation in training was of %s, so what is predicted for it is hardly more than the mean of the training "
                    "perturbations", change.text, entry.gene,
                )  # fmt: skip
    values, names, left_out = _control_cells(chunks, record)
    place = {gene: column for column, gene in enumerate(names)}
    control = np.asarray(values.mean(axis=0), dtype=np.float64).ravel()
    columns: dict[str, list] = {name: [] for name in ("perturbation", "gene", "control", "predicted", "change")}
    for number, change in enumerate(changes):
        changed = _changed(values, place, change, _statistics(values, place, [change]))
        predicted = _predicted_profile(chunks, record, changed, names, change)
        columns["perturbation"] += [change.text] * len(names)
        columns["gene"] += names
        for name, found in (("control", control), ("predicted", predicted), ("change", predicted - control)):
            columns[name] += [float(value) for value in found]
        tell({"kind": "progress", "stage": "predict", "step": number + 1, "max_steps": len(changes)})
    return {PROFILES: columns}, {"cells": int(values.shape[0]), "cells_left_out": left_out}


def _control_cells(chunks: ChunkPredictor, record: dict[str, Any]):
    """(values of the control cells (n, genes of the model) CSR, the genes, how many cells were left out)."""
    from scipy import sparse

    source, chain = chunks.source, chunks.predictor.chain
    wanted = np.ones(source.n_cells, dtype=bool)
    if record["column"] in source.obs:
        said = [str(value) for value in source.obs[record["column"]]]
        control = np.array([all(looks_like_control(part) for part in value.split("+")) for value in said])
        if control.any():
            wanted = control
            logger.info(
                "control cells are the %d of %d whose obs['%s'] says so", control.sum(), len(control), record["column"]
            )
    parts, names = [], None
    for start, chunk in source.iter_chunks(1024, 0):
        applied = chain.apply_to_cells(chunk, source.var_names)
        usable = np.array([reason is None for reason in applied.reasons]) & wanted[start : start + chunk.shape[0]]
        names = applied.gene_names
        parts.append(sparse.csr_matrix(applied.values)[np.flatnonzero(usable)])
    values = sparse.vstack(parts, format="csr")
    if not values.shape[0]:
        raise DataError(f"{source.path}: has no cell that could be a control cell")
    order = [names.index(gene) for gene in record["genes"] if gene in set(names)]
    if len(order) < len(record["genes"]):
        logger.warning(
            "%d of the %d genes of the model are not in the file and are read as not expressed",
            len(record["genes"]) - len(order),
            len(record["genes"]),
        )
    place = {gene: column for column, gene in enumerate(names)}
    picked = sparse.csc_matrix(values)
    empty = sparse.csc_matrix((values.shape[0], 1), dtype=values.dtype)
    joined = sparse.hstack(
        [picked[:, place[gene]] if gene in place else empty for gene in record["genes"]], format="csr"
    )
    joined.sort_indices()
    return joined, list(record["genes"]), int(source.n_cells - values.shape[0])


def _predicted_profile(
    chunks: ChunkPredictor, record: dict[str, Any], values, names: list[str], change: Change
) -> np.ndarray:
    from bmfm_pipeline.batching import BatchBuilder, CellDataset, EpochBatchSampler, make_loader
    from bmfm_pipeline.batching.pairs import PairTable
    from bmfm_pipeline.config import RunConfig
    from bmfm_pipeline.data.stores import MemoryStore
    from bmfm_pipeline.evaluation.pair_predictions import predict_profiles
    from bmfm_pipeline.objectives import build_objectives
    from bmfm_pipeline.training.gene_tables import builder_options
    from bmfm_pipeline.training.prepared import batching_config, field_specs

    predictor, run = chunks.predictor, chunks.run
    targets = [entry.gene for entry in change.genes]
    columns = [*names, *(gene for gene in targets if gene not in names)]
    count = values.shape[0]
    store = MemoryStore(values, [f"cell {row}" for row in range(count)], names)
    place = {gene: column for column, gene in enumerate(columns)}
    table = PairTable(
        names=[change.name],
        perturbations=np.zeros(count, np.int64),
        targets=[np.array(sorted(place[gene] for gene in targets), np.int32)],
        measured=len(names),
        controls=np.arange(count),
        train_mean=np.array(record["train_mean"]),
        with_itself=True,
    )
    config = replace(batching_config(run, predictor.vocabularies), max_length=run.data_module.evaluation_length)
    options = builder_options(run, columns, predictor.folder / "transforms.json")
    builder = BatchBuilder(store, field_specs(run, predictor.vocabularies, columns), config, **options, pairs=table)
    loader = make_loader(
        CellDataset(builder, np.arange(count), evaluation=True),
        EpochBatchSampler(count, chunks.batch_size, shuffle=False),
        1,
    )
    trained = RunConfig.model_validate(read_json(predictor.folder / "run_config.json"))
    losses = [entry for entry in trained.trainer.losses or [] if "field_name" in entry]
    objectives = build_objectives(losses, [entry.model_dump(mode="json") for entry in trained.fields], [])
    inputs = {name: row for row, name in enumerate(entry.field_name for entry in run.fields if entry.is_input)}
    found = predict_profiles(
        chunks.network, loader, objectives, predictor.vocabularies["genes"].ids(names), names, inputs, {"train_mean": table.train_mean},
        device="cuda" if run.task.accelerator == "gpu" else "cpu", precision=run.task.precision,
    )  # fmt: skip
    return found.filled(np.asarray(table.train_mean))[0][0]


# ---- every other model


def _effects(chunks: ChunkPredictor, changes: list[Change], tell: Progress) -> tuple[dict[str, dict], dict[str, Any]]:
    for change in changes:
        for entry in change.genes:
            if entry.rule is None:
                raise ConfigError(
                    f"--perturb {change.text}: say what the expression of {entry.gene} becomes, such as {entry.gene}=0 or {entry.gene}=MAX * 0.5"
                )
    seen = _Watching(changes)
    total = chunks.source.n_cells * (len(changes) + 1)
    before, reasons = _answers(chunks, seen, tell, 0, total)
    known = chunks.predictor.vocabularies["genes"]
    for change in changes:
        for entry in change.genes:
            if entry.gene not in seen.genes or entry.gene not in known:
                there = [gene for gene in seen.genes if gene in known]
                raise ConfigError(
                    f"--perturb {change.text}: {entry.gene} is not among the genes of the file that the model reads"
                    f"{did_you_mean(entry.gene, there, before='; ')}"
                )
    effects: dict[str, list] = {name: [] for name in ("perturbation", "label", "class", "before", "after", "change")}
    cells: dict[str, list] = {"cell": [], "perturbation": []}
    usable = np.flatnonzero([reason is None for reason in reasons])
    if not len(usable):
        raise DataError(f"{chunks.source.path}: no cell can be used ({next(filter(None, reasons), 'it is empty')})")
    names = [str(chunks.source.obs_names[row]) for row in usable]
    for number, change in enumerate(changes):
        after, _ = _answers(chunks, _Changing(change, seen.statistics), tell, number + 1, total)
        cells["cell"] += names
        cells["perturbation"] += [change.text] * len(usable)
        for label, classes in chunks.predictor.class_names.items():
            _label_effects(
                effects,
                cells,
                change.text,
                label,
                classes,
                before[LOGITS + label][usable],
                after[LOGITS + label][usable],
            )
        for name in before:
            if name.startswith(EMBEDDINGS):
                shift = np.linalg.norm(after[name][usable].astype(np.float64) - before[name][usable], axis=1)
                cells.setdefault("embedding_shift", []).extend(shift.tolist())
                _add(effects, change.text, "embedding", "shift", 0.0, float(shift.mean()))
    return {EFFECTS: effects, CELLS: cells}, {"cells": len(usable), "cells_left_out": len(reasons) - len(usable)}


def _answers(
    chunks: ChunkPredictor, edit, tell: Progress, number: int, total: int
) -> tuple[dict[str, np.ndarray], list[str | None]]:
    chunks.edit = edit
    parts: dict[str, list[np.ndarray]] = {}
    reasons: list[str | None] = []
    for done, found in chunks.run_from(0, lambda cells: None):
        for name, values in found.arrays.items():
            parts.setdefault(name, []).append(values)
        reasons += found.reasons
        tell(
            {"kind": "progress", "stage": "predict", "step": number * chunks.source.n_cells + done, "max_steps": total}
        )
    return {name: np.concatenate(values) for name, values in parts.items()}, reasons


def _label_effects(
    effects, cells, perturbation: str, label: str, classes: list[str], before: np.ndarray, after: np.ndarray
) -> None:
    if not classes:
        cells.setdefault(f"{label}_before", []).extend(before[:, 0].tolist())
        cells.setdefault(f"{label}_after", []).extend(after[:, 0].tolist())
        _add(effects, perturbation, label, "", float(before.mean()), float(after.mean()))
        return
    for word, logits in (("before", before), ("after", after)):
        cells.setdefault(f"{label}_{word}", []).extend(classes[place] for place in logits.argmax(axis=1))
    first, second = _softmax(before).mean(axis=0), _softmax(after).mean(axis=0)
    for place, name in enumerate(classes):
        _add(effects, perturbation, label, name, float(first[place]), float(second[place]))


def _add(effects: dict[str, list], perturbation: str, label: str, name: str, before: float, after: float) -> None:
    for column, value in zip(effects, (perturbation, label, name, before, after, after - before), strict=True):
        effects[column].append(value)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


class _Watching:
    """An edit that changes nothing: it notes what MAX, MIN and MEAN of the chosen genes are."""

    def __init__(self, changes: list[Change]):
        self.wanted = {entry.gene for change in changes for entry in change.genes}
        self.genes: list[str] = []
        self._seen: dict[str, list[float]] = {}

    def __call__(self, values, genes: list[str]):
        self.genes = genes
        for column, gene in enumerate(genes):
            if gene in self.wanted:
                own = values[:, [column]].toarray().ravel().astype(np.float64)
                high, low, total, count = self._seen.get(gene, [-np.inf, np.inf, 0.0, 0])
                self._seen[gene] = [
                    max(high, own.max(initial=-np.inf)),
                    min(low, own.min(initial=np.inf)),
                    total + own.sum(),
                    count + len(own),
                ]
        return values

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        return {
            gene: {"MAX": high, "MIN": low, "MEAN": total / max(1, count)}
            for gene, (high, low, total, count) in self._seen.items()
        }


class _Changing:
    """An edit that sets the values of the genes of one perturbation."""

    def __init__(self, change: Change, statistics: dict[str, dict[str, float]]):
        self.change, self.statistics = change, statistics

    def __call__(self, values, genes: list[str]):
        return _changed(values, {gene: column for column, gene in enumerate(genes)}, self.change, self.statistics)


def _statistics(values, place: dict[str, int], changes: list[Change]) -> dict[str, dict[str, float]]:
    watching = _Watching(changes)
    watching(values, list(place))
    return watching.statistics


def _changed(values, place: dict[str, int], change: Change, statistics: dict[str, dict[str, float]]):
    """CSR values with those of the perturbed genes set; whole numbers stay whole. Genes without a column are left alone."""
    table = values.tolil(copy=True)
    whole = np.issubdtype(values.dtype, np.integer) or not np.any(values.data != np.rint(values.data))
    for entry in change.genes:
        if entry.gene not in place or entry.rule is None:
            continue
        column = place[entry.gene]
        own = values[:, [column]].toarray().ravel()
        found = np.array([value_of(entry, float(value), statistics[entry.gene]) for value in own])
        table[:, column] = (np.rint(found) if whole else found).reshape(-1, 1)
    changed = table.tocsr()
    changed.eliminate_zeros()
    changed.sort_indices()
    return changed.astype(values.dtype)
