"""Cells given as lists of gene names and values, and builders with the vocabulary of a tokenizer folder, for stored vectors."""

import json
from pathlib import Path

import numpy as np

from bmfm_pipeline.batching import BatchBuilder, BatchingConfig, FieldSpec

SPECIAL = 5


class Cells:
    """Cells given as gene names and values, each in its own order: every cell has gene columns of its own."""

    def __init__(self, cells: list[dict], names: list[str] | None = None):
        genes = [cell["genes"] for cell in cells]
        self.var_names = [gene for cell in genes for gene in cell]
        sizes = [len(cell) for cell in genes]
        self.indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.indices = np.arange(len(self.var_names), dtype=np.int32)
        self.data = np.array([value for cell in cells for value in cell["expressions"]], dtype=np.float32)
        self.obs_names = np.array(names or [cell.get("cell_name", "") for cell in cells], dtype=object)
        self.shape = (len(cells), len(self.var_names))


def read_tokens(folder: Path) -> list[str]:
    """The tokens of a saved tokenizer in id order, added ones included."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    ids = dict(stored["model"]["vocab"]) | {entry["content"]: entry["id"] for entry in stored.get("added_tokens", [])}
    tokens = [""] * (max(ids.values()) + 1)
    for token, number in ids.items():
        tokens[number] = token
    return tokens


def value_table(tokens: list[str]) -> np.ndarray:
    """Token id of 0, 1, 2, ... up to the largest whole number among the tokens."""
    ids = {int(token): number for number, token in enumerate(tokens) if token.isdigit()}
    return np.array([ids[value] for value in range(max(ids) + 1)], dtype=np.int32)


def make_builder(
    store, genes: list[str], expressions: list[str], tokenized: bool = True, masked=(), weights=None, tables=None,
    further=(), **settings
):  # fmt: skip
    """Genes and expressions with the given tokens, then the `further` fields."""
    ids = {token: number for number, token in enumerate(genes)}
    fields = [
        FieldSpec(
            "genes",
            "genes",
            is_masked="genes" in masked,
            vocab_size=len(genes),
            column_ids=np.array([ids.get(name, 0) for name in store.var_names], dtype=np.int32),
        ),
        FieldSpec(
            "expressions",
            "values",
            tokenized=tokenized,
            is_masked="expressions" in masked,
            vocab_size=len(expressions),
            value_ids=value_table(expressions) if tokenized else None,
        ),
        *further,
    ]
    return BatchBuilder(store, fields, BatchingConfig(**settings), mask_weights=weights, tables=tables)
