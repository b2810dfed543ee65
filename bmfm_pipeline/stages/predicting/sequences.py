"""Sequences as the input of a prediction: every row of a table, or record of a FASTA file, through the tokenizer of the model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bmfm_pipeline.config.sequences import FIELD, SequencesConfig
from bmfm_pipeline.data.sequences import clean, open_sequences
from bmfm_pipeline.data.sequences.genome import is_fasta, read_fasta
from bmfm_pipeline.data.store import keys_of
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages.predicting.chunks import ROWS, ChunkPredictor
from bmfm_pipeline.training.prepared import batching_config, field_specs
from bmfm_pipeline.vocabulary.sequences import SequenceTokenizer

EMPTY = "the sequence is empty"


class SequenceInput:
    """The sequences of a file by row, as a prediction reads its input: names, the other columns, blocks of letters."""

    n_genes = 0

    def __init__(self, path: Path, names, obs, blocks: Callable[[], Iterator[tuple[int, np.ndarray, np.ndarray]]]):
        self.path, self.where = path, "the table"
        self.obs_names, self.obs = np.asarray(names, dtype=object), obs
        self._blocks = blocks

    @classmethod
    def open(cls, path: str | Path, settings: SequencesConfig) -> "SequenceInput":
        """A table or folder of tables, whose column of sequences is found as in training, or a FASTA file: a sequence each record."""
        path = Path(path)
        if not is_fasta(path):
            column = settings.column
            try:
                source = open_sequences(path, column)
            except DataError:
                if column is None:
                    raise
                source = open_sequences(path)  # other files may call it otherwise; it is the first then
            return cls(path, source.obs.index, source.obs, source.blocks)
        import pandas as pd

        names = [name for name, _ in read_fasta(path)]

        def blocks() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
            for row, (_, letters) in enumerate(read_fasta(path)):
                yield row, letters, np.array([0, len(letters)], dtype=np.int64)

        return cls(path, names, pd.DataFrame(index=pd.Index(names, dtype=object)), blocks)

    @property
    def n_cells(self) -> int:
        return len(self.obs_names)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_cells, 0

    def forget_tables(self) -> None:
        """Nothing is held that could be read again."""

    def chunks(self, first: int, upper_case: bool) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, letters, starts) of at most 1,024 rows at a time, cleaned, from row `first` on, where a chunk must begin."""
        for begin, letters, starts in self._blocks():
            for offset in range(0, len(starts) - 1, ROWS):
                if begin + offset < first:
                    continue
                own = starts[offset : offset + ROWS + 1]
                part = clean(letters[own[0] : own[-1]], own - own[0], upper_case)
                yield begin + offset, part.letters, part.starts


def refuse_for_sequences(layer: str | None, annotated: str | None) -> None:
    """ConfigError for what only a file of cells has."""
    if layer is not None:
        raise ConfigError("--layer: sequences have no layers; leave it out")
    if annotated is not None:
        raise ConfigError("--h5ad: writes into a copy of the cells, and the input holds sequences; leave it out")


class SequenceChunks(ChunkPredictor):
    """ChunkPredictor for a model of sequences; `source` is a SequenceInput. `too_long` counts sequences that were cut."""

    def __init__(self, predictor, source: SequenceInput, network, run, batch_size: int | None, poolings):
        super().__init__(predictor, source, network, run, batch_size, poolings)
        self.tokenizer = SequenceTokenizer(predictor.folder / "tokenizers" / FIELD, self.settings.upper_case)
        self.too_long = 0

    @property
    def settings(self) -> SequencesConfig:
        return self.predictor.run.data_module.sequences

    def _prepared(self, first: int) -> Iterator[tuple]:
        for start, letters, starts in self.source.chunks(first, self.settings.upper_case):
            tokens, counts = self.tokenizer.encode(letters, starts)
            names = [str(name) for name in self.source.obs_names[start : start + len(counts)]]
            places = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            reasons = [None if count else EMPTY for count in counts]
            yield (
                start,
                names,
                None,
                SimpleNamespace(reasons=reasons, values=SimpleNamespace(indptr=places), tokens=tokens),
            )

    def _predict(self, cells: list[str], chunk: Any, applied, usable: np.ndarray, on_cells: Callable[[int], None]):
        from bmfm_pipeline.batching import SequenceBuilder

        run, places = self.run, applied.values.indptr
        counts = np.diff(places)[usable]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        order = np.arange(starts[-1]) + np.repeat(places[usable] - starts[:-1], counts)
        names = np.array(cells, dtype=object)[usable]
        arrays = _Tokens(applied.tokens[order], starts)
        store = SimpleNamespace(name=str(self.source.path), sequences=arrays, obs_names=names, cell_keys=keys_of(names))
        length = run.data_module.evaluation_length
        config = replace(batching_config(run, self.predictor.vocabularies), max_length=length)
        builder = SequenceBuilder(store, field_specs(run, self.predictor.vocabularies, []), config)
        self.too_long += int((counts > length - len(config.prefix_ids) - 1).sum())
        return self._through(builder, len(usable), on_cells)


class _Tokens:
    other_strand = None

    def __init__(self, tokens: np.ndarray, token_starts: np.ndarray):
        self.tokens, self.token_starts = tokens, token_starts

    def __len__(self) -> int:
        return len(self.token_starts) - 1
