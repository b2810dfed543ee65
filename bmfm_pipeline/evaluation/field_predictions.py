"""What was predicted at masked positions, stored: field_predictions.parquet, one row per position, and field_baselines.json beside it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bmfm_pipeline.evaluation.metric_kinds.numbers import says_zero
from bmfm_pipeline.storage import read_json, write_json_atomic

FILE, BASELINES = "field_predictions.parquet", "field_baselines.json"
ROWS_AT_ONCE = 250_000  # of a row group: what is held before it is written
NUMBERS = ("label", "prediction", "log_probability", "zero_probability")
Kind = Literal["token", "number"]


@dataclass(frozen=True)
class Baseline:
    """What is known of a field without the model, from training cells, and how many positions are stored of those predicted.

    `token` is the commonest token and `token_counts` (V,) says how often each occurred; `mean` and `median` of the numbers, `zero`
    whether most are zero; `gene_means` {gene: mean of its numbers}; `token_values` (V,) the number of each token, nan for none;
    `ignores_zero`: numbers are scored where the label is not zero; `says_zero`: the model has a score of its own for zeros.
    """

    token: int | None = None
    token_counts: np.ndarray | None = None
    mean: float | None = None
    median: float | None = None
    zero: bool | None = None
    gene_means: dict[str, float] = field(default_factory=dict)
    token_values: np.ndarray | None = None
    ignores_zero: bool = False
    says_zero: bool = False
    has_number: bool = True
    share: float = 1.0


@dataclass(frozen=True)
class FieldRows:
    """The n stored positions of one field, scored as tokens or as numbers.

    `cell` (n,) indexes `cells`, the names of the cells that have any; `gene` (n,) indexes `genes`, -1 where there is none. `label` and
    `prediction` (n,) are token ids, or numbers (prediction nan where a model only says whether it is zero); `log_probability` (n,) of
    the true token and `zero_probability` (n,) that the number is zero, nan where the model gives none.
    """

    name: str
    kind: Kind
    cells: list[str]
    cell: np.ndarray
    genes: list[str]
    gene: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    log_probability: np.ndarray
    zero_probability: np.ndarray
    baseline: Baseline = field(default_factory=Baseline)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def says_zero(self) -> np.ndarray:
        """(n,) whether a number is said to be zero: by the score for it where there is one, else where the prediction rounds to zero."""
        if self.baseline.says_zero:
            return self.zero_probability > 0.5
        return says_zero(self.prediction)


class FieldWriter:
    """Writes rows as they come, in row groups, so that memory does not grow with them. Use it as a context manager."""

    def __init__(self, folder: Path, genes: list[str]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._genes = np.array([*genes, None], dtype=object)  # -1 is no gene
        self._fields: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self._rows = 0
        text = pa.dictionary(pa.int32(), pa.string())
        names = {"cell": text, "field": text, "kind": text, "gene": text}
        self._schema = pa.schema([*names.items(), *((name, pa.float32()) for name in NUMBERS)])
        self._writer = pq.ParquetWriter(folder / FILE, self._schema)
        self._folder = folder

    def __enter__(self) -> "FieldWriter":
        return self

    def __exit__(self, *error) -> None:
        self._flush()
        self._writer.close()

    def add(self, name: str, kind: Kind, cells: np.ndarray, genes: np.ndarray, **numbers: np.ndarray) -> None:
        """Rows of one field: names of the cells (n,), gene numbers (n,), and `label`, `prediction` and probabilities (n,)."""
        if not len(cells):
            return
        self._waiting.append({"name": name, "kind": kind, "cells": cells, "genes": genes, **numbers})
        self._rows += len(cells)
        if self._rows >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows:
            return
        parts, sizes = self._waiting, [len(part["cells"]) for part in self._waiting]
        texts = {
            "cell": np.concatenate([part["cells"] for part in parts]).astype(object),
            "field": np.repeat(np.array([part["name"] for part in parts], dtype=object), sizes),
            "kind": np.repeat(np.array([part["kind"] for part in parts], dtype=object), sizes),
        }
        columns = [pa.array(values, pa.string()).dictionary_encode() for values in texts.values()]
        used, codes = np.unique(np.concatenate([part["genes"] for part in parts]), return_inverse=True)
        genes = pa.array(codes, pa.int32(), mask=(used == -1)[codes])
        columns.append(
            pa.DictionaryArray.from_arrays(genes, pa.array(["" if g is None else g for g in self._genes[used]]))
        )
        for name in NUMBERS:
            values = np.concatenate(
                [part.get(name, np.full(size, np.nan)) for part, size in zip(parts, sizes, strict=True)]
            )
            columns.append(pa.array(values.astype(np.float32), pa.float32(), from_pandas=True))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._waiting, self._rows = [], 0


def write_baselines(folder: Path, baselines: dict[tuple[str, Kind], Baseline]) -> None:
    """field_baselines.json: {field: {kind: what a Baseline holds, without what is not known}}."""
    plain: dict[str, dict[str, Any]] = {}
    for (name, kind), baseline in baselines.items():
        entry = {}
        for key, value in vars(baseline).items():
            if value is None or (isinstance(value, dict) and not value):
                continue
            entry[key] = _sparse(value) if isinstance(value, np.ndarray) else value
        plain.setdefault(name, {})[kind] = entry
    write_json_atomic(folder / BASELINES, plain)


def _sparse(values: np.ndarray) -> dict[str, Any]:
    """Numbers by token, without those that are nan."""
    there = np.flatnonzero(np.isfinite(values))
    return {"size": len(values), "tokens": there.tolist(), "values": values[there].tolist()}


def _dense(entry: dict[str, Any]) -> np.ndarray:
    values = np.full(entry["size"], np.nan)
    values[entry["tokens"]] = entry["values"]
    return values


def read_field_predictions(folder: Path) -> list[FieldRows]:
    """What a FieldWriter and write_baselines left in `folder`; nothing where there is no such file, or no row in it."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not (folder / FILE).exists():
        return []
    table = pq.read_table(folder / FILE, read_dictionary=["cell", "field", "kind", "gene"]).unify_dictionaries()
    about = read_json(folder / BASELINES)
    found = []
    for name, kinds in about.items():
        for kind, entry in kinds.items():
            own = table.filter(pc.and_(pc.equal(table["field"], name), pc.equal(table["kind"], kind)))
            if not own.num_rows:
                continue
            cells, cell = _codes(own["cell"])
            genes, gene = _codes(own["gene"])
            numbers = {name: own[name].to_numpy().astype(np.float64) for name in NUMBERS}
            known = {
                key: _dense(value) if key in ("token_counts", "token_values") else value for key, value in entry.items()
            }
            found.append(FieldRows(name, kind, cells, cell, genes, gene, **numbers, baseline=Baseline(**known)))
    return found


def _codes(column) -> tuple[list[str], np.ndarray]:
    """(the distinct texts there are, which of them each row has; -1 for none)."""
    whole = column.combine_chunks()
    codes = whole.indices.fill_null(-1).to_numpy().astype(np.int64)
    used = np.unique(codes[codes >= 0])
    place = np.full(len(whole.dictionary) + 1, -1)
    place[used] = np.arange(len(used))
    return whole.dictionary.take(used).to_pylist(), place[codes]
