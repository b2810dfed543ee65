"""Which cells are interpreted, and as what batches: test cells of the model's data, or cells of a file."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import DataModuleConfig, RunConfig
from bmfm_pipeline.data.label_files import read_label_dict
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.attributions.cells import LabelColumn, choose_cells, wanted_classes
from bmfm_pipeline.stages.inputs import input_folder
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.training.gene_tables import builder_options, with_kept_tables
from bmfm_pipeline.training.prepared import batching_config, field_specs
from bmfm_pipeline.vocabulary import MultiFieldVocabulary
from bmfm_pipeline.vocabulary.building import READ_DEPTH_TOKENS
from bmfm_pipeline.vocabulary.vocabulary import SPECIAL_TOKENS


@dataclass
class ChosenCells:
    """Rows of a store and how they become batches: `loader(rows, batch_size)`.

    `columns` are label columns with what is known of the cells, `groups` the group of each cell by name where the split kept groups whole.
    `letters` by name where the model reads sequences, which then stand for cells.
    """

    rows: np.ndarray
    loader: Callable[[np.ndarray, int], Any]
    columns: list[LabelColumn]
    vocabularies: MultiFieldVocabulary
    groups: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    letters: dict[str, str] | None = None


def label_columns(run: RunConfig, model: Any, folder: Path) -> list[LabelColumn]:
    """The label columns that the model has heads for, with the classes that its heads were trained with."""
    known = read_label_dict(folder / "label_dict.json") if (folder / "label_dict.json").exists() else {}
    heads = {label.name: label for label in model.config.model_labels}
    columns = []
    for entry in run.label_columns:
        name = entry.label_column_name
        if name not in heads:
            continue
        head = heads[name]
        ids = known.get(name, {})
        classes = list(head.class_names or sorted(ids, key=ids.get)) if not head.is_regression else []
        wanted = wanted_classes(name, classes, run.task.attribute_filter)
        columns.append(LabelColumn(name, classes, None, head.is_multilabel, entry.multilabel_str_sep, wanted))
    return columns


def kept_tokens(run: RunConfig, vocabularies: MultiFieldVocabulary, naming: str) -> tuple[int, ...]:
    """Ids of tokens that stand for no gene: [CLS], [SEP], [PAD], what stands before the genes, and read depths."""
    vocabulary = vocabularies[naming]
    words = ["[CLS]", "[SEP]", "[PAD]", *(run.tokenizer.prepend_tokens or []), *READ_DEPTH_TOKENS]
    words += [token for token in vocabulary.tokens[: vocabulary.n_special] if token not in SPECIAL_TOKENS]
    return tuple(sorted({int(index) for index in vocabulary.ids(words) if index}))


def open_cells(job: Job, run: RunConfig, model: Any, folder: Path, seed: int) -> ChosenCells:
    """The cells that the job names. Raises DataError where there are none."""
    columns = label_columns(run, model, folder)
    of_file = _of_file if run.data_module.sequences is None else sequences_of_file
    chosen = (
        of_file(job, run, columns, folder, seed)
        if "cells" in job.inputs
        else _of_split(job, run, columns, folder, seed)
    )
    if not len(chosen.rows):
        raise DataError(
            f"interpret: there is no cell to interpret{'; ' + '; '.join(chosen.notes) if chosen.notes else ''}"
        )
    return chosen


def _of_split(job: Job, run: RunConfig, columns: list[LabelColumn], folder: Path, seed: int) -> ChosenCells:
    """Test cells, at most task.max_cells of each class."""
    from bmfm_pipeline.batching import CellDataset, EpochBatchSampler, make_loader
    from bmfm_pipeline.training.data_module import build_data_module

    own = with_kept_tables(run.model_dump(mode="json")["data_module"], folder)
    run.data_module = DataModuleConfig.model_validate(own)
    data = build_data_module(run, input_folder(job, "data"))
    data.setup("test")
    rows, truth = data.rows["test"], data.prepared.labels(run)
    if not len(rows):
        raise DataError(
            f"{data.prepared.folder}: the split has no test cells; name a file of cells with task.cells=FILE.h5ad"
        )
    for column in columns:
        column.truth = _by_model(column, truth[column.name], data.prepared.label_dict.get(column.name, {}))
    chosen = choose_cells(columns, rows, run.task.max_cells, seed)
    builder = data.builders[run.data_module.evaluation_length]

    def loader(of: np.ndarray, batch_size: int):
        return make_loader(
            CellDataset(builder, of, evaluation=True), EpochBatchSampler(len(of), batch_size, shuffle=False)
        )

    notes = [f"{len(chosen):,} of {len(rows):,} test cells: at most {run.task.max_cells} of each class"]
    if len(chosen) == len(rows):
        notes = [f"all {len(rows):,} test cells"]
    groups, group = {}, data.prepared.split_group
    if group is not None:
        store = data.prepared.store
        values = store.column(group)
        groups = {str(store.obs_names[row]): str(values[row]) for row in chosen}
        notes.append(f"intervals resample whole values of {group}, or cells where a class has a single one")
    found = ChosenCells(chosen, loader, columns, data.prepared.vocabularies, groups, notes)
    if run.data_module.sequences is not None:
        store = data.prepared.store
        names = [str(store.obs_names[row]) for row in chosen]
        found.letters = dict(zip(names, store.sequences.texts(chosen), strict=True))
    return found


def _by_model(column: LabelColumn, values: np.ndarray, ids: dict[str, int]) -> np.ndarray:
    """Labels of the data with the class numbers of the model: -100 for a class it does not know."""
    if not column.classes or not ids or sorted(ids, key=ids.get) == column.classes:
        return values
    names = sorted(ids, key=ids.get)
    if column.several:
        own = np.zeros((len(values), len(column.classes)), dtype=values.dtype)
        for number, name in enumerate(names):
            if name in column.classes:
                own[:, column.classes.index(name)] = values[:, number]
        return own
    table = np.array([column.classes.index(name) if name in column.classes else -100 for name in names])
    return np.where(values >= 0, table[np.maximum(values, 0)], -100)


def _of_file(job: Job, run: RunConfig, columns: list[LabelColumn], folder: Path, seed: int) -> ChosenCells:
    """Cells of an h5ad file, prepared as prediction prepares them; at most task.max_cells times the number of classes."""
    from bmfm_pipeline.batching import BatchBuilder, CellDataset, EpochBatchSampler, make_loader
    from bmfm_pipeline.data.sources import open_source
    from bmfm_pipeline.data.stores import MemoryStore
    from bmfm_pipeline.stages.conversion import readable
    from bmfm_pipeline.stages.predict import check_input, duplicates_rule
    from bmfm_pipeline.stages.predicting.predictor import Predictor
    from bmfm_pipeline.storage import localise

    predictor = Predictor.open(folder)
    own = predictor.run
    path = readable(localise(job.inputs["cells"]["uri"]), job.place)
    source = open_source(path, run.task.layer, duplicates_rule(predictor))
    try:
        check_input(source, predictor)
    except DataError as error:
        raise DataError(str(error).replace("--layer ", "task.layer=")) from None
    most = run.task.max_cells * max((column.outputs for column in columns), default=1)
    wanted, notes = _some(source.n_cells, most, seed, "cells")
    cells, unusable = _read(source, predictor, wanted)
    if unusable:
        notes.append(f"{unusable:,} cells cannot be used and are left out; `bmfm predict` says why of each")
    if cells is None:
        return ChosenCells(
            np.zeros(0, dtype=np.int64), lambda rows, size: (), columns, predictor.vocabularies, {}, notes
        )
    values, counts, names, genes = cells
    store = MemoryStore(values, names, genes, counts=counts)
    config = replace(
        batching_config(own, predictor.vocabularies, predictor.values_from),
        max_length=own.data_module.evaluation_length,
    )
    options = builder_options(own, genes, folder / "transforms.json")
    builder = BatchBuilder(store, field_specs(own, predictor.vocabularies, genes), config, **options)

    def loader(of: np.ndarray, batch_size: int):
        return make_loader(
            CellDataset(builder, of, evaluation=True), EpochBatchSampler(len(of), batch_size, shuffle=False)
        )

    return ChosenCells(np.arange(len(names)), loader, columns, predictor.vocabularies, {}, notes)


def sequences_of_file(job: Job, run: RunConfig, columns: list[LabelColumn], folder: Path, seed: int) -> ChosenCells:
    """Sequences of a table, folder or FASTA file, as prediction reads them; at most task.max_cells times the number of classes."""
    from bmfm_pipeline.batching import CellDataset, EpochBatchSampler, make_loader
    from bmfm_pipeline.stages.predicting.predictor import Predictor
    from bmfm_pipeline.stages.predicting.sequences import SequenceChunks, SequenceInput
    from bmfm_pipeline.storage import localise

    predictor = Predictor.open(folder)
    source = SequenceInput.open(localise(job.inputs["cells"]["uri"]), predictor.run.data_module.sequences)
    chunks = SequenceChunks(predictor, source, None, predictor.run, None, {})
    most = run.task.max_cells * max((column.outputs for column in columns), default=1)
    wanted, notes = _some(source.n_cells, most, seed, "sequences")
    letters: dict[str, str] = {}
    for first, block, starts in source.chunks(0, chunks.settings.upper_case):
        for row in wanted[(wanted >= first) & (wanted < first + len(starts) - 1)].tolist():
            begin, end = starts[row - first : row - first + 2]
            letters[str(source.obs_names[row])] = block[begin:end].tobytes().decode("latin-1")
    kept = {name: text for name, text in letters.items() if text}
    if len(kept) < len(letters):
        notes.append(f"{len(letters) - len(kept):,} sequences are empty and are left out")
    starts = np.cumsum([0, *(len(text) for text in kept.values())]).astype(np.int64)
    tokens, counts = chunks.tokenizer.encode(np.frombuffer("".join(kept.values()).encode("latin-1"), np.uint8), starts)
    places = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    builder = chunks.builder(np.array(list(kept), dtype=object), tokens, places)

    def loader(of: np.ndarray, batch_size: int):
        return make_loader(
            CellDataset(builder, of, evaluation=True), EpochBatchSampler(len(of), batch_size, shuffle=False)
        )

    return ChosenCells(np.arange(len(kept)), loader, columns, predictor.vocabularies, {}, notes, kept)


def _some(count: int, most: int, seed: int, what: str) -> tuple[np.ndarray, list[str]]:
    """(rows, ascending, of at most so many of a file, what is said of the choice)"""
    wanted, notes = np.arange(count), [f"all {count:,} {what} of the file"]
    if count > most:
        wanted = np.sort(np.random.default_rng(seed & 0xFFFFFFFF).choice(count, most, replace=False))
        notes = [f"{most:,} of {count:,} {what} of the file, drawn at random"]
    return wanted, [
        *notes,
        f"true classes are not read from a file: {what} count for the class that they are predicted as",
    ]


def _read(source, predictor, wanted: np.ndarray):
    """((values, counts or None, names, genes) of the wanted cells that can be used, how many cannot)."""
    from scipy import sparse

    parts, names, unusable, genes, order = [], [], 0, None, None
    counts = []
    for start, chunk in source.iter_chunks():
        rows = wanted[(wanted >= start) & (wanted < start + chunk.shape[0])] - start
        if not len(rows):
            continue
        chunk = chunk[rows]
        applied = predictor.chain.apply_to_cells(chunk, source.var_names)
        if genes is None:
            order = np.arange(len(applied.gene_names))
            if not predictor.published:  # as in the processed file, so that a cell is cut and shuffled alike
                order = np.argsort(predictor.vocabularies["genes"].ids(applied.gene_names), kind="stable")
            genes = [applied.gene_names[column] for column in order]
        usable = np.array([place for place, reason in enumerate(applied.reasons) if reason is None], dtype=np.int64)
        unusable += len(rows) - len(usable)
        names += [str(source.obs_names[start + rows[place]]) for place in usable]
        parts.append(applied.values[usable][:, order])
        if predictor.values_from:
            counts.append(predictor.chain.apply_genes(chunk, source.var_names)[usable][:, order])
    if not names:
        return None, unusable
    stacked = sparse.vstack(counts).tocsr() if counts else None
    return (sparse.vstack(parts).tocsr(), stacked, names, genes), unusable
