"""From a chunk of cells as they lie in a file to what the model says of each: logits and embeddings, one row a cell."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bmfm_pipeline.data.stores import MemoryStore
from bmfm_pipeline.stages.predicting.poolings import Pooling, atoms
from bmfm_pipeline.stages.predicting.predictor import Predictor
from bmfm_pipeline.training.gene_tables import builder_options
from bmfm_pipeline.training.prepared import batching_config, field_specs

ROWS = 1024  # at most so many cells at a time
LOGITS, EMBEDDINGS = "logits.", "embeddings."
Edit = Callable[[Any, list[str]], Any]


@dataclass
class ChunkOutput:
    """`arrays` {name: float32 (n, width)}, nan where a cell could not be used, and why not (None where it could)."""

    arrays: dict[str, np.ndarray]
    reasons: list[str | None]
    unknown_values: int


@dataclass
class _Columns:
    """What follows from the genes of the file alone, the same for every chunk."""

    source: list[str]
    order: np.ndarray
    genes: list[str]
    fields: list
    options: dict[str, Any]


class ChunkPredictor:
    """A model that takes chunks of one source. `run` must have the accelerator and precision of this machine settled.

    `edit` may change the values that the model reads: it gets them by cell and gene (CSR), with the names of the genes.
    """

    def __init__(
        self, predictor: Predictor, source, network, run, batch_size: int | None, poolings: dict[str, Pooling]
    ):
        self.predictor, self.source, self.network, self.run, self.poolings = predictor, source, network, run, poolings
        self.batch_size = batch_size or run.data_module.evaluation_batch_size
        self.edit: Edit | None = None
        self._columns: _Columns | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Columns of each array: logits (1 where a number is predicted), and embeddings by pooling."""
        heads = {LOGITS + name: max(1, len(classes)) for name, classes in self.predictor.class_names.items()}
        size = self.network.config.hidden_size
        sizes = {name: size * (len(how) if isinstance(how, list) else 1) for name, how in self.poolings.items()}
        return heads | {EMBEDDINGS + name: width for name, width in sizes.items()}

    def run_from(self, first: int, on_cells: Callable[[int], None]) -> Iterator[tuple[int, ChunkOutput]]:
        """(rows done by then, output) for chunk after chunk from row `first` on, which must be where a chunk began.

        The next chunk is read and transformed while the model works. `on_cells` hears how many rows are done, batch by batch.
        """
        chunks = self._prepared(first)
        with ThreadPoolExecutor(1, thread_name_prefix="chunks") as reader:
            waiting = reader.submit(next, chunks, None)
            while (found := waiting.result()) is not None:
                waiting = reader.submit(next, chunks, None)
                start, cells, chunk, applied = found
                output = self._of_chunk(cells, chunk, applied, lambda done, start=start: on_cells(start + done))
                yield start + len(cells), output

    def _prepared(self, first: int) -> Iterator[tuple]:
        for start, chunk in self.source.iter_chunks(ROWS, first):
            cells = [str(name) for name in self.source.obs_names[start : start + chunk.shape[0]]]
            yield start, cells, chunk, self.predictor.chain.apply_to_cells(chunk, self.source.var_names)

    def _of_chunk(self, cells: list[str], chunk, applied, on_cells: Callable[[int], None]) -> ChunkOutput:
        arrays = {name: np.full((len(cells), width), np.nan, np.float32) for name, width in self.widths.items()}
        usable = np.flatnonzero([reason is None for reason in applied.reasons])
        # Cells of one length side by side: less to pad for a model that pads, fewer and larger groups for one that does not.
        usable = usable[np.argsort(-np.diff(applied.values.indptr)[usable], kind="stable")]
        unknown = 0
        if len(usable):
            found, unknown = self._predict(cells, chunk, applied, usable, on_cells)
            for name, classes in self.predictor.class_names.items():
                numbers = found.logits[name] if classes else found.labels[name].predicted[:, None]
                arrays[LOGITS + name][usable] = numbers
            for name, embedding in self._split(found.embeddings).items():
                arrays[EMBEDDINGS + name][usable] = embedding
        return ChunkOutput(arrays, applied.reasons, unknown)

    def _split(self, joined: np.ndarray) -> dict[str, np.ndarray]:
        """Embeddings by pooling, from those of all their parts side by side."""
        methods, size = atoms(list(self.poolings.values())), self.network.config.hidden_size
        place = {method: slice(number * size, (number + 1) * size) for number, method in enumerate(methods)}
        parts = {name: how if isinstance(how, list) else [how] for name, how in self.poolings.items()}
        return {
            name: np.concatenate([joined[:, place[method]] for method in chosen], axis=1)
            for name, chosen in parts.items()
        }

    def _of_genes(self, names: list[str]) -> _Columns:
        if self._columns is None or self._columns.source != names:
            predictor, order = self.predictor, np.arange(len(names))
            if not predictor.published:
                # Genes in the order of the vocabulary, as in the processed file: the same cell is cut and shuffled alike in both.
                order = np.argsort(predictor.vocabularies["genes"].ids(names), kind="stable")
            genes = [names[column] for column in order]
            fields = field_specs(self.run, predictor.vocabularies, genes)
            options = builder_options(self.run, genes, predictor.folder / "transforms.json")
            self._columns = _Columns(names, order, genes, fields, options)
        return self._columns

    def _predict(self, cells: list[str], chunk, applied, usable: np.ndarray, on_cells: Callable[[int], None]):
        from bmfm_pipeline.batching import BatchBuilder

        columns, predictor, run = self._of_genes(applied.gene_names), self.predictor, self.run
        values = applied.values[usable][:, columns.order]
        values.sort_indices()
        names = np.array(cells, dtype=object)[usable]
        from_counts, counts = predictor.values_from, None
        if from_counts:
            counts = predictor.chain.apply_genes(chunk, self.source.var_names)[usable][:, columns.order]
        if self.edit is not None:
            if counts is None:
                values = self.edit(values, columns.genes)
            else:
                counts = self.edit(counts, columns.genes)
        store = MemoryStore(values, names, columns.genes, counts=counts)
        config = replace(
            batching_config(run, predictor.vocabularies, from_counts), max_length=run.data_module.evaluation_length
        )
        return self._through(BatchBuilder(store, columns.fields, config, **columns.options), len(usable), on_cells)

    def _through(self, builder, n: int, on_cells: Callable[[int], None]):
        """(what the model says of the `n` rows of a builder, in order, how many of their values are unknown)."""
        from bmfm_pipeline.batching import CellDataset, EpochBatchSampler, make_loader
        from bmfm_pipeline.evaluation.inference import predict_loader

        predictor, run = self.predictor, self.run
        loader = make_loader(
            CellDataset(builder, np.arange(n), evaluation=True),
            EpochBatchSampler(n, self.batch_size, shuffle=False),
            num_workers=1,
        )
        found = predict_loader(
            self.network,
            loader,
            predictor.class_names,
            pooling=atoms(list(self.poolings.values())) or None,
            keep_logits=True,
            precision=run.task.precision,
            device="cuda" if run.task.accelerator == "gpu" else "cpu",
            on_batch=on_cells,
        )
        return found, builder.report.values_outside_vocabulary
