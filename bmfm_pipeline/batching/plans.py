"""What a BatchBuilder settles once from its fields and tables, and small steps of its labels."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bmfm_pipeline.batching import kernels
from bmfm_pipeline.batching.settings import FieldSpec
from bmfm_pipeline.batching.tables import GeneTables
from bmfm_pipeline.errors import DataError


@dataclass(frozen=True)
class Writing:
    """How `kernels.write_fields` writes one group of fields."""

    fields: tuple[FieldSpec, ...]
    kinds: np.ndarray  # (F, 2): kind, index of the value source
    value_ids: np.ndarray
    value_starts: np.ndarray
    dtype: type


def writing(fields: tuple[FieldSpec, ...], layers: Sequence[str]) -> Writing:
    """How to write `fields`, whose values come from the sources 0 (inputs), 1 (labels) and 2 on (`layers`)."""
    kinds = np.zeros((len(fields), 2), dtype=np.int64)
    tables = []
    for number, entry in enumerate(fields):
        if entry.role == "genes":
            kinds[number] = kernels.KIND_GENES, 0
        else:
            kind = kernels.KIND_TOKENS if entry.tokenized else kernels.KIND_CONTINUOUS
            if entry.signed:
                kind = kernels.KIND_SIGNED
            # Source 0 is what the model sees; 1 is what label fields say of the same values; layers follow.
            own = 0 if entry.is_input else 1
            kinds[number] = kind, own if entry.layer is None else 2 + layers.index(entry.layer)
        tables.append(np.zeros(0, np.int32) if entry.value_ids is None else np.asarray(entry.value_ids, np.int32))
    starts = np.cumsum([0, *(len(table) for table in tables)]).astype(np.int64)
    joined = np.concatenate([*tables, np.zeros(0, np.int32)])
    continuous = any(not entry.tokenized for entry in fields)
    return Writing(fields, kinds, joined, starts, np.float32 if continuous else np.int64)


def masking_plan(masked: Sequence[tuple[int, FieldSpec]]) -> tuple[np.ndarray, np.ndarray]:
    """(plan, barred) of `kernels.mask_fields` for the masked input fields, given with their places."""
    plan, barred = np.zeros((len(masked), 6), dtype=np.int64), []
    for m, (number, entry) in enumerate(masked):
        low, high = entry.num_special_tokens, entry.vocab_size
        out = sorted({int(token) for token in entry.never_switch if low <= token < high})
        free = max(high - low - len(out), 1)
        plan[m] = number, not entry.tokenized, low, free, len(barred), len(barred) + len(out)
        barred.extend(out)
    return plan, np.array(barred, dtype=np.int64)


def labels_at(where: np.ndarray, entry: FieldSpec, written: np.ndarray) -> np.ndarray:
    """What a label field says at the positions `where` (B, L), -100 elsewhere."""
    if entry.tokenized:
        where = where & (written != kernels.UNK)  # nothing to learn from a value without a token
    return np.where(where, written, kernels.IGNORED)


def label_tensor(labels: np.ndarray, entry: FieldSpec) -> torch.Tensor:
    return torch.from_numpy(labels.astype(np.int64 if entry.tokenized else np.float32, copy=False))


def allowing(tables: GeneTables, columns: Collection[int] | None, genes: int) -> GeneTables:
    """The tables with `columns`, numbers of gene columns, as the allowed ones; checked."""
    if columns is not None:
        numbers = np.fromiter(columns, dtype=np.int64)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= genes):
            raise DataError(f"allowed_columns {numbers.min()}..{numbers.max()}, gene columns are 0..{genes - 1}")
        allowed = np.zeros(genes, dtype=bool)
        allowed[numbers] = True
        tables = replace(tables, allowed=allowed if tables.allowed is None else allowed & tables.allowed)
    tables.check(genes)
    return tables
