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
from bmfm_pipeline.stages.predicting.chunks import ROWS, ChunkOutput, ChunkPredictor
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
    """Raise ConfigError for what only a file of cells has."""
    if layer is not None:
        raise ConfigError("--layer: sequences have no layers; leave it out")
    if annotated is not None:
        raise ConfigError("--h5ad: writes into a copy of the cells, and the input holds sequences; leave it out")


class SequenceChunks(ChunkPredictor):
    """ChunkPredictor for a model of sequences; `source` is a SequenceInput. `too_long` counts sequences that were cut.

    With `windows` these are read in overlapping windows instead, and what the model says of each is averaged.
    """

    def __init__(
        self, predictor, source: SequenceInput, network, run, batch_size: int | None, poolings, windows: bool = False
    ):
        super().__init__(predictor, source, network, run, batch_size, poolings)
        self.windows = windows
        self.tokenizer = SequenceTokenizer(predictor.folder / "tokenizers" / FIELD, self.settings.upper_case)
        self.too_long = 0

    @property
    def settings(self) -> SequencesConfig:
        return self.predictor.run.data_module.sequences

    def _prepared(self, first: int) -> Iterator[tuple]:
        for start, letters, starts in self.source.chunks(first, self.settings.upper_case):
            names = [str(name) for name in self.source.obs_names[start : start + len(starts) - 1]]
            yield start, names, None, self._pieces(letters, starts)

    def _pieces(self, letters: np.ndarray, starts: np.ndarray) -> SimpleNamespace:
        tokens, counts = self.tokenizer.encode(letters, starts)
        places = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        reasons = [None if count else EMPTY for count in counts]
        return SimpleNamespace(reasons=reasons, values=SimpleNamespace(indptr=places), tokens=tokens)

    def of_letters(self, letters: np.ndarray, starts: np.ndarray) -> tuple[ChunkOutput, np.ndarray]:
        """What the model says of cleaned sequences that are in no file, and whether each was cut, bool (n,)."""
        pieces = self._pieces(letters, starts)
        counts = np.diff(pieces.values.indptr)
        output = self._of_chunk([str(row) for row in range(len(counts))], None, pieces, lambda done: None)
        return output, counts > self.room

    @property
    def room(self) -> int:
        """How many pieces the model reads of a sequence, without the special ones."""
        return self.run.data_module.evaluation_length - len(self._config().prefix_ids) - 1

    def _config(self):
        run = self.run
        return replace(batching_config(run, self.predictor.vocabularies), max_length=run.data_module.evaluation_length)

    def _of_chunk(self, cells: list[str], chunk: Any, applied, on_cells: Callable[[int], None]) -> ChunkOutput:
        places = applied.values.indptr
        self.too_long += int((np.diff(places) > self.room).sum())
        if not self.windows or not (np.diff(places) > self.room).any():
            return super()._of_chunk(cells, chunk, applied, on_cells)
        owners, begins, ends = overlapping(places, self.room)
        lengths = ends - begins
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = applied.tokens[np.arange(starts[-1]) + np.repeat(begins - starts[:-1], lengths)]
        reasons = [applied.reasons[row] for row in owners.tolist()]
        pieces = SimpleNamespace(reasons=reasons, values=SimpleNamespace(indptr=starts), tokens=tokens)
        names = [f"{cells[row]} {number}" for number, row in enumerate(owners.tolist())]
        share = len(cells) / len(owners)
        found = super()._of_chunk(names, chunk, pieces, lambda done: on_cells(int(share * done)))
        first, counts = np.flatnonzero(np.diff(owners, prepend=-1)), np.bincount(owners)
        means = {
            name: (np.add.reduceat(values.astype(np.float64), first) / counts[:, None]).astype(np.float32)
            for name, values in found.arrays.items()
        }
        return ChunkOutput(means, applied.reasons, found.unknown_values)

    def _predict(self, cells: list[str], chunk: Any, applied, usable: np.ndarray, on_cells: Callable[[int], None]):
        places = applied.values.indptr
        counts = np.diff(places)[usable]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        order = np.arange(starts[-1]) + np.repeat(places[usable] - starts[:-1], counts)
        builder = self.builder(np.array(cells, dtype=object)[usable], applied.tokens[order], starts)
        return self._through(builder, len(usable), on_cells)

    def builder(self, names: np.ndarray, tokens: np.ndarray, starts: np.ndarray):
        """The SequenceBuilder of sequences one after the other: names (n,), tokens, starts int64 (n + 1,)."""
        from bmfm_pipeline.batching import SequenceBuilder

        store = SimpleNamespace(
            name=str(self.source.path), sequences=_Tokens(tokens, starts), obs_names=names, cell_keys=keys_of(names)
        )
        return SequenceBuilder(store, field_specs(self.run, self.predictor.vocabularies, []), self._config())


def overlapping(places: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sequence, begin, end) int64 of windows of at most `room` pieces over sequences at `places` (n + 1,), each overlapping the next by
    half or more: evenly spread, so that every window of a longer sequence is full. A sequence that fits has one, and an empty one too."""
    lengths = np.diff(places)
    step = max(1, room // 2)
    counts = np.where(lengths > room, 1 + -(-(lengths - room) // step), 1)
    owners = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    spare = np.maximum(lengths - room, 0)[owners]
    begins = places[:-1][owners] + number * spare // np.maximum(counts[owners] - 1, 1)
    return owners, begins, begins + np.minimum(lengths, room)[owners]


class _Tokens:
    other_strand = None

    def __init__(self, tokens: np.ndarray, token_starts: np.ndarray):
        self.tokens, self.token_starts = tokens, token_starts

    def __len__(self) -> int:
        return len(self.token_starts) - 1
