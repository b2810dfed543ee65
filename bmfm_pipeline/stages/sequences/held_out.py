"""A model of sequences on sequences that it does not come from: how they are prepared, and which of them it has seen."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.sequences import open_sequences, reverse_complement
from bmfm_pipeline.data.sequences.cleaning import class_texts
from bmfm_pipeline.data.sequences.genome import is_fasta
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.seen_cells import SeenCells
from bmfm_pipeline.stages.sequences.inputs import find_sequences
from bmfm_pipeline.storage import localise

BLOCK = 20_000


def sequences_to_prepare(
    test: RunConfig, stored: dict[str, Any], tokenizers: str, classes: list[str]
) -> dict[str, Any]:
    """The plain run that prepares the sequences which `test` names, with the pieces of the model: nothing is learned, all are test
    sequences. `stored` is the run of the model, `tokenizers` its folder, `classes` the columns that hold a class each."""
    if is_fasta(find_sequences(test)):
        raise ConfigError("evaluate: a FASTA file has no labels; `bmfm predict` gives predictions for it")
    named = test.model_dump(mode="json")["data_module"]
    own, theirs = stored["data_module"]["sequences"], named["sequences"]
    sequences = {"upper_case": own["upper_case"], "leakage": "off"}
    sequences |= {key: theirs[key] for key in ("source", "part", "column")}
    return {
        "seed": stored["seed"],
        "dataset": test.dataset,
        "fields": stored["fields"],
        "label_columns": [{"label_column_name": name} for name in classes],  # so that 0.0 is the class 0
        "tokenizer": {"identifier": tokenizers, "prepend_tokens": stored["tokenizer"].get("prepend_tokens")},
        "data_module": {
            "data_dir": named["data_dir"],
            "sequences": sequences,
            "transform_kwargs": {
                "transforms": [],
                "split": {"method": "random", "weights": {"train": 0, "dev": 0, "test": 1}},
            },
        },
    }


def opened_tables(test: RunConfig, classes: list[str]) -> Iterator[Any]:
    """The table, or folder of tables, that `test` names, as what labels are read from: obs and path. `classes` as above."""
    source = open_sequences(localise(find_sequences(test)), test.data_module.sequences.column)
    for name in set(classes) & set(source.obs.columns):
        source.obs[name] = class_texts(source.obs[name])
    source.path, source.named = find_sequences(test), ""
    yield source


class _BothArrays:
    """The letters of two files of sequences, one after the other."""

    def __init__(self, first, second):
        self.letters = np.concatenate([first.letters, second.letters])
        self.letter_starts = np.concatenate(
            [first.letter_starts, first.letter_starts[-1] + np.asarray(second.letter_starts[1:])]
        )

    def __len__(self) -> int:
        return len(self.letter_starts) - 1


class BothSequences:
    """Training sequences, then the others; what controls read."""

    counts = log_values = None
    n_genes, var_names = 0, ()

    def __init__(self, stores: list):
        first, second = stores
        self.sequences = _BothArrays(first.sequences, second.sequences)
        self.n_cells = len(self.sequences)
        # Names of a folder's rows are the same in every folder: training sequences are never looked up by name.
        self.obs_names = np.concatenate([[f"training {name}" for name in first.obs_names], second.obs_names])


def find_seen_sequences(new, rows: np.ndarray, training, training_rows: np.ndarray) -> SeenCells:
    """Which `rows` of the store `new` are among the `training_rows` of the store `training`, on either strand, whatever they are called."""
    known = set(_letters(training, training_rows))
    turned = set(_letters(training, training_rows, other_strand=True))
    seen = np.array([text in known or text in turned for text in _letters(new, rows)], dtype=bool)
    return SeenCells(seen, np.zeros(len(rows), dtype=bool))


def _letters(store, rows: np.ndarray, other_strand: bool = False) -> Iterator[bytes]:
    arrays = store.sequences
    for first in range(0, len(rows), BLOCK):
        own = rows[first : first + BLOCK]
        begins, ends = arrays.letter_starts[own], arrays.letter_starts[own + 1]
        starts = np.concatenate([[0], np.cumsum(ends - begins)]).astype(np.int64)
        places = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], ends - begins)
        letters = np.asarray(arrays.letters[places])
        whole = (reverse_complement(letters, starts) if other_strand else letters).tobytes()
        for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            yield whole[begin:end]


def notes_of_sequences(source: str, check: dict[str, Any], with_labels: bool) -> list[str]:
    """What an evaluation says of other sequences; `check` is what their preprocessing found."""
    notes = [
        f"held-out data: {source}, which the model does not come from; its sequences are cut into the model's pieces, with nothing learned "
        "from them"
    ]
    if with_labels:
        notes.append(
            "held-out data: controls are fitted on the model's training sequences and asked about the same test sequences"
        )
    if check["set_aside_empty"]:
        notes.append(f"held-out data: {check['set_aside_empty']} sequences are empty and are not tested")
    return notes
