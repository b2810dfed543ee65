"""BatchBuilder: fields, order, truncation, padding, masking and labels of a batch, without a Python loop over cells or genes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bmfm_pipeline.batching import kernels
from bmfm_pipeline.errors import ConfigError

_ORDERS = {None: kernels.ORDER_NONE, "random": kernels.ORDER_RANDOM, "sorted": kernels.ORDER_SORTED}


@dataclass(frozen=True)
class FieldSpec:
    """One field of the batch.

    `column_ids` (genes) is the token id of each gene column, 0 where unknown; `value_ids` (tokenised values) the token id of each
    whole value. Continuous values need neither.
    """

    name: str
    role: str  # "genes" or "values"
    tokenized: bool = True
    is_masked: bool = False
    is_input: bool = True
    vocab_size: int = 0
    num_special_tokens: int = 5
    column_ids: np.ndarray | None = None
    value_ids: np.ndarray | None = None


@dataclass(frozen=True)
class BatchingConfig:
    """How cells become a batch. Lengths in tokens, special ones included; ratios in 0..1."""

    collation_strategy: str = "multitask"
    mlm: bool = True
    max_length: int = 512
    max_mfi_data_len: int | None = None
    padding: str | bool = "max_length"
    truncation: bool = True
    pad_to_multiple_of: int | None = 16
    sequence_order: str | None = None
    change_ratio: float = 0.15
    mask_ratio: float = 1.0
    switch_ratio: float = 0.0
    comask_across_fields: bool = False
    prevent_attention_to_masked: bool = False
    seed: int = 1234


@dataclass
class BatchReport:
    """What was left out on the way: counted, never silent."""

    unknown_genes: int = 0
    unknown_gene_examples: list[str] = field(default_factory=list)
    values_outside_vocabulary: int = 0


class BatchBuilder:
    """Builds batches from a store that offers `indptr`, `indices`, `data`, `obs_names` and `shape`.

    `labels` maps a label column to its values for all cells of the store: int64 class ids, or float32 (cells,) or (cells, C).
    Genes without a token are left out and counted in `report`.
    """

    def __init__(
        self, store, fields: list[FieldSpec], config: BatchingConfig, labels: dict[str, np.ndarray] | None = None
    ):
        self.store, self.config, self.labels = store, config, labels or {}
        self.inputs = [entry for entry in fields if entry.is_input]
        self.masks = config.mlm and config.collation_strategy in ("language_modeling", "multitask")
        self.with_labels = config.collation_strategy in ("sequence_classification", "multitask")
        self.continuous = any(not entry.tokenized for entry in self.inputs)
        self._check(config)
        genes = next((entry for entry in self.inputs if entry.role == "genes"), None)
        if genes is None or genes.column_ids is None:
            raise ConfigError("fields: an input field of genes is needed to choose which genes enter a batch")
        self._column_ids = np.ascontiguousarray(genes.column_ids, dtype=np.int32)
        unknown = np.flatnonzero(self._column_ids == 0)
        names = getattr(store, "var_names", None)
        self.report = BatchReport(len(unknown), [str(names[i]) for i in unknown[:10]] if names is not None else [])
        longest = int(np.max(np.diff(store.indptr))) if len(store.indptr) > 1 else 0
        self._scratch = np.empty(max(longest, 1), dtype=np.int64)
        # Memory maps share their bytes between workers; plain views are what the kernels are compiled for.
        self._indptr, self._indices, self._data = (
            np.asarray(array) for array in (store.indptr, store.indices, store.data)
        )

    @staticmethod
    def _check(config: BatchingConfig) -> None:
        if config.sequence_order not in _ORDERS:
            raise ConfigError(f"sequence_order must be none, random or sorted, found {config.sequence_order!r}")
        if config.max_length < 3:
            raise ConfigError(f"max_length {config.max_length} leaves no room for a gene between [CLS] and [SEP]")
        multiple = config.pad_to_multiple_of
        if multiple and config.truncation and config.padding is not False and config.max_length % multiple:
            lower = config.max_length // multiple * multiple
            near = f"{lower} or {lower + multiple}" if lower else str(multiple)
            raise ConfigError(
                f"max_length {config.max_length} is not a multiple of pad_to_multiple_of {multiple}; use {near}"
            )
        if config.mask_ratio + config.switch_ratio > 1 + 1e-9:
            raise ConfigError("mask_ratio + switch_ratio must not exceed 1")

    def _cap(self) -> int:
        caps = [self.config.max_length - 2] if self.config.truncation else []
        if self.config.max_mfi_data_len:
            caps.append(self.config.max_mfi_data_len)
        return min(caps) if caps else len(self._scratch)

    def _length(self, counts: np.ndarray) -> int:
        config = self.config
        longest = int(counts.max(initial=0)) + 2
        if config.padding == "max_length":
            longest = max(longest, config.max_length)
        multiple = config.pad_to_multiple_of
        return -(-longest // multiple) * multiple if multiple and config.padding is not False else longest

    def build(self, rows: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        """The batch of store rows `rows` (B,) in `epoch`.

        input_ids (B, F, L): int64, or float32 when a field is continuous; attention_mask (B, L) int64, or (B, L, L) with
        prevent_attention_to_masked; labels {field: (B, L), label column: (B,)}; cell_name and cell_index (B,).
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        config, cap, batch = self.config, self._cap(), len(rows)
        counts = np.empty(batch, dtype=np.int64)
        kernels.token_counts(rows, self._indptr, self._indices, self._column_ids, cap, counts)
        length = self._length(counts)
        genes = np.empty((batch, length), dtype=np.int32)
        values = np.empty((batch, length), dtype=np.float32)
        seed = config.seed & 0xFFFFFFFFFFFFFFFF
        order = _ORDERS[config.sequence_order]
        kernels.select_genes(
            rows,
            self._indptr,
            self._indices,
            self._data,
            self._column_ids,
            cap,
            order,
            seed,
            epoch,
            genes,
            values,
            self._scratch,
        )
        ids = np.empty((batch, len(self.inputs), length), dtype=np.float32 if self.continuous else np.int64)
        for position, spec in enumerate(self.inputs):
            self._write(spec, counts, genes, values, ids[:, position])
        labels: dict[str, torch.Tensor] = {}
        taken = np.zeros((batch, length), dtype=np.bool_)
        if self.masks:
            labels.update(self._mask(rows, counts, epoch, ids, taken))
        if self.with_labels:
            labels.update({name: torch.from_numpy(array[rows]) for name, array in self.labels.items()})
        if config.prevent_attention_to_masked and self.masks:
            attention = np.zeros((batch, length, length), dtype=np.int64)
            kernels.attention_without_masked(counts, taken, attention)
        else:
            attention = (np.arange(length) < (counts + 2)[:, None]).astype(np.int64)
        result = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(attention),
            "cell_name": self.store.obs_names[rows].tolist(),
            "cell_index": torch.from_numpy(rows),
        }
        if labels:
            result["labels"] = labels
        return result

    def _write(
        self, spec: FieldSpec, counts: np.ndarray, genes: np.ndarray, values: np.ndarray, out: np.ndarray
    ) -> None:
        if spec.role == "genes":
            kernels.write_ids(counts, genes, out)
        elif spec.tokenized:
            self.report.values_outside_vocabulary += kernels.write_value_ids(counts, values, spec.value_ids, out)
        else:
            kernels.write_values(counts, values, out)

    def _mask(self, rows, counts, epoch: int, ids: np.ndarray, taken: np.ndarray) -> dict[str, torch.Tensor]:
        config, labels = self.config, {}
        seed = config.seed & 0xFFFFFFFFFFFFFFFF
        together = config.comask_across_fields
        for position, spec in enumerate(self.inputs):
            if not spec.is_masked:
                continue
            dtype = np.int64 if spec.tokenized else np.float32
            target = np.full(ids[:, position].shape, kernels.IGNORED, dtype=dtype)
            stream = 1 if together else 1 + position
            kernels.mask_field(
                rows, counts, seed, epoch, stream, config.change_ratio, config.mask_ratio, config.switch_ratio,
                not spec.tokenized, not together, spec.num_special_tokens, max(spec.vocab_size, spec.num_special_tokens + 1),
                taken, ids[:, position], target,
            )  # fmt: skip
            labels[spec.name] = torch.from_numpy(target)
        return labels
