"""BatchBuilder: the batch of chosen cells, written by compiled kernels straight into the arrays that the model gets."""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bmfm_pipeline.batching import kernels
from bmfm_pipeline.batching.settings import BatchingConfig, FieldSpec, check_settings
from bmfm_pipeline.errors import ConfigError, DataError

_OUTSIDE, _EMPTY, _CELLS = range(3)
_THREADS, _WORKERS = 128, 128
_THREAD, _NEXT_ROW = threading.local(), itertools.count()


@dataclass
class BatchReport:
    """What was left out on the way: counted, never silent. Forked loader workers add to them once `share` was called."""

    unknown_genes: int = 0
    unknown_gene_examples: list[str] = field(default_factory=list)
    _counts: torch.Tensor = field(
        default_factory=lambda: torch.zeros((_THREADS + _WORKERS, 3), dtype=torch.int64), repr=False
    )

    def share(self) -> None:
        """Put the counts into memory that worker processes share."""
        self._counts.share_memory_()

    def add(self, outside: int, empty: int, cells: int) -> None:
        """Count one batch; every thread and worker process has a row of its own, so that none overwrites another's."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            row = _THREADS + worker.id % _WORKERS
        else:
            row = getattr(_THREAD, "row", None)
            if row is None:
                row = _THREAD.row = next(_NEXT_ROW) % _THREADS
        counts = self._counts.numpy()[row]
        counts[_OUTSIDE] += outside
        counts[_EMPTY] += empty
        counts[_CELLS] += cells

    @property
    def values_outside_vocabulary(self) -> int:
        """Tokenised values that became [UNK] because their vocabulary ends before them; counted at every use."""
        return int(self._counts[:, _OUTSIDE].sum())

    @property
    def cells_without_genes(self) -> int:
        """Cells that had no gene with a token, so that only special tokens were left; counted at every use."""
        return int(self._counts[:, _EMPTY].sum())

    @property
    def cells_built(self) -> int:
        """Cells put into batches so far."""
        return int(self._counts[:, _CELLS].sum())


@dataclass(frozen=True)
class _Writing:
    """How `kernels.write_fields` writes one group of fields."""

    fields: tuple[FieldSpec, ...]
    kinds: np.ndarray  # (F, 2): kind, index of the value source
    value_ids: np.ndarray
    value_starts: np.ndarray
    dtype: type


class BatchBuilder:
    """Builds batches from a store that offers `indptr`, `indices`, `data` (CSR of cells by genes) and `obs_names`.

    A store may also offer `cell_keys`, int64 (cells,): what makes a cell's random draws its own, whatever file it lies in; without
    them the row number does.
    labels: label column -> values of all cells of the store, int64 class ids (cells,) or float32 (cells,) or (cells, C).
    mask_weights: relative masking rate by gene column, float32 (genes,), see `gene_mask_weights`; None masks uniformly.
    Genes without a token are left out and counted in `report`. Raises ConfigError for settings that cannot make a batch, DataError
    for arrays that do not fit the store. Pickles without the store's arrays when the store does.
    """

    def __init__(
        self,
        store,
        fields: Sequence[FieldSpec],
        config: BatchingConfig,
        labels: dict[str, np.ndarray] | None = None,
        mask_weights: np.ndarray | None = None,
    ):
        check_settings(config, fields)
        self.store, self.config, self.fields = store, config, tuple(fields)
        self.labels = {name: np.asarray(values) for name, values in (labels or {}).items()}
        self.mask_weights = np.zeros(0, np.float32) if mask_weights is None else np.asarray(mask_weights, np.float32)
        inputs = tuple(entry for entry in self.fields if entry.is_input)
        genes = next(entry for entry in inputs if entry.role == "genes")
        self._column_ids = np.ascontiguousarray(genes.column_ids, dtype=np.int32)
        self._open_store()
        self._check_arrays()
        self._layers = sorted({entry.layer for entry in self.fields if entry.layer is not None})
        self._inputs = self._writing(inputs)
        targets = {f"label_{entry.name}": entry.name for entry in inputs if entry.is_masked}
        self._targets = self._writing(
            tuple(entry for entry in self.fields if not entry.is_input and entry.name in targets)
        )
        self._plan_masking(inputs)
        self._prefix = np.array(config.prefix_ids, dtype=np.int64)
        unknown = np.flatnonzero(self._column_ids == 0)
        names = getattr(store, "var_names", None)
        self.report = BatchReport(len(unknown), [str(names[i]) for i in unknown[:10]] if names is not None else [])

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of the store's arrays: a worker that is not forked opens the store anew instead of copying it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_csr", "_names", "_cell_keys")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_store()

    def _open_store(self) -> None:
        self._csr = {None: _csr(self.store)}
        for entry in self.fields:
            if entry.layer is not None and entry.layer not in self._csr:
                matrix = getattr(self.store, entry.layer, None)
                if matrix is None:
                    raise DataError(f"fields.{entry.name}: the store has no matrix '{entry.layer}'")
                self._csr[entry.layer] = _csr(matrix)
        self._names = np.asarray(self.store.obs_names, dtype=object)
        keys = getattr(self.store, "cell_keys", None)
        self._cell_keys = None if keys is None else np.asarray(keys, dtype=np.int64)
        self.n_cells = len(self._csr[None][0]) - 1
        self._longest = int(np.diff(self._csr[None][0]).max(initial=0))

    def _check_arrays(self) -> None:
        """Kernels do not check bounds: everything they index is checked here, once."""
        shape = getattr(self.store, "shape", None)
        for layer, (indptr, indices, _) in self._csr.items():
            width = int(shape[1]) if shape is not None else int(indices.max(initial=-1)) + 1
            if len(indptr) - 1 != self.n_cells:
                raise DataError(f"matrix '{layer}' of the store has {len(indptr) - 1} cells, X has {self.n_cells}")
            if width > len(self._column_ids):
                raise DataError(
                    f"the store has {width} gene columns, but column_ids names the tokens of {len(self._column_ids)}; "
                    "build it from the store's var_names"
                )
        if len(self._names) != self.n_cells:
            raise DataError(f"the store has {self.n_cells} cells, but {len(self._names)} obs_names")
        for name, values in self.labels.items():
            if len(values) != self.n_cells:
                raise DataError(f"labels of '{name}' are {len(values)}, the store has {self.n_cells} cells")
        if len(self.mask_weights) not in (0, len(self._column_ids)):
            raise DataError(f"mask_weights are {len(self.mask_weights)}, gene columns {len(self._column_ids)}")

    def _writing(self, fields: tuple[FieldSpec, ...]) -> _Writing:
        kinds = np.zeros((len(fields), 2), dtype=np.int64)
        tables = []
        for number, entry in enumerate(fields):
            if entry.role == "genes":
                kinds[number] = kernels.KIND_GENES, 0
            else:
                kind = kernels.KIND_TOKENS if entry.tokenized else kernels.KIND_CONTINUOUS
                # Source 0 is X, normalised for inputs where that is asked for; 1 is X as it is; layers follow.
                own = 0 if entry.is_input else 1
                kinds[number] = kind, own if entry.layer is None else 2 + self._layers.index(entry.layer)
            tables.append(np.zeros(0, np.int32) if entry.value_ids is None else np.asarray(entry.value_ids, np.int32))
        starts = np.cumsum([0, *(len(table) for table in tables)]).astype(np.int64)
        joined = np.concatenate([*tables, np.zeros(0, np.int32)])
        continuous = any(not entry.tokenized for entry in fields)
        return _Writing(fields, kinds, joined, starts, np.float32 if continuous else np.int64)

    def _plan_masking(self, inputs: tuple[FieldSpec, ...]) -> None:
        self._masked = [(number, entry) for number, entry in enumerate(inputs) if entry.is_masked]
        if not self.config.masks:
            self._masked = []
        plan, barred = np.zeros((len(self._masked), 6), dtype=np.int64), []
        for m, (number, entry) in enumerate(self._masked):
            low, high = entry.num_special_tokens, entry.vocab_size
            out = sorted({int(token) for token in entry.never_switch if low <= token < high})
            plan[m] = (
                number,
                not entry.tokenized,
                low,
                max(high - low - len(out), 1),
                len(barred),
                len(barred) + len(out),
            )
            barred.extend(out)
        self._plan, self._barred = plan, np.array(barred, dtype=np.int64)

    def _room(self) -> int:
        """The most genes a cell can bring into a batch."""
        caps = [self._longest, self.config.max_mfi_data_len or self._longest]
        if self.config.truncation:
            caps.append(self.config.max_length - len(self._prefix) - 1)
        return max(min(caps), 1)

    def _length(self, counts: np.ndarray) -> int:
        config = self.config
        length = int(counts.max(initial=0)) + len(self._prefix) + 1
        if config.padding == "max_length":
            length = max(length, config.max_length)
        multiple = config.pad_to_multiple_of
        return -(-length // multiple) * multiple if multiple and config.padding is not False else length

    def build(self, rows: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        """The batch of store rows `rows` (B,) in `epoch` (0 or more).

        input_ids (B, F, L): int64, or float32 when an input field is continuous; attention_mask (B, L) int64, or (B, L, L) with
        prevent_attention_to_masked; cell_name, a list of B; cell_index (B,) int64; labels, where there are any: masked field ->
        (B, L), label column -> (B,) or (B, C). Safe to call from several threads.
        """
        rows = np.array(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.n_cells):
            raise DataError(f"rows {rows.min()}..{rows.max()} asked for, the store has rows 0..{self.n_cells - 1}")
        config, batch, room, first = self.config, len(rows), self._room(), len(self._prefix)
        seed, epoch = np.uint64(config.seed & 0xFFFFFFFFFFFFFFFF), np.uint64(epoch)
        columns, counts = np.empty((batch, room), np.int32), np.empty(batch, np.int64)
        values, sums = np.empty((1, batch, room), np.float32), np.empty(batch, np.float64)
        keys = rows if self._cell_keys is None else self._cell_keys[rows]
        by_row = (rows, *self._csr[None], self._column_ids, config.limit_genes is None)
        ranking, broken = np.zeros(0, np.int32), -1
        if config.sequence_order == "sorted":
            indptr = self._csr[None][0]
            ranking = np.empty(int(np.sum(indptr[rows + 1] - indptr[rows])), np.int32)
            broken = kernels.rank_genes(*by_row, ranking)
        if broken < 0:
            broken = kernels.pick_genes(
                *by_row, config.sequence_order == "random", ranking, config.max_mfi_data_len or self._longest, keys, seed, epoch,
                config.log_normalize_transform, columns, values[0], counts, sums,
            )  # fmt: skip
        if broken >= 0:
            raise DataError(
                f"cell '{self._names[rows[broken]]}' names a gene column outside 0..{len(self._column_ids) - 1}: the processed file "
                "is damaged or not the one the vocabulary was built for; run `bmfm preprocess` again"
            )
        length = self._length(counts)
        sources = self._sources(rows, counts, columns, values, sums)
        attention = np.empty((batch, length), np.int64)
        ids, outside = self._write(self._inputs, rows, counts, columns, sources, length, attention)
        labels: dict[str, torch.Tensor] = {}
        marks = np.empty((batch, length), np.uint8)
        if self._masked:
            targets = np.empty((len(self._masked), batch, length), dtype=ids.dtype)
            kernels.mask_fields(
                keys, counts, columns, first, seed, epoch, config.change_ratio, config.mask_ratio, config.switch_ratio,
                config.comask_across_fields, self.mask_weights, self._plan, self._barred, ids, marks, targets,
            )  # fmt: skip
            labels.update(self._field_labels(rows, counts, columns, sources, targets))
        if config.with_label_columns:
            labels.update({name: torch.from_numpy(values[rows]) for name, values in self.labels.items()})
        if config.prevent_attention_to_masked and self._masked:
            attention = np.zeros((batch, length, length), dtype=np.int64)
            kernels.attention_without_masked(counts, first, marks, attention)
        self.report.add(outside, batch - int(np.count_nonzero(counts)), batch)
        result = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(attention),
            "cell_name": self._names[rows].tolist(),
            "cell_index": torch.from_numpy(rows),
        }
        if labels:
            result["labels"] = labels
        return result

    def _sources(self, rows, counts, columns, values: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Values by source (S, B, room): X for inputs, X as it is, further layers. Only what the fields need."""
        if not self.config.log_normalize_transform and not self._layers and not self._targets.fields:
            return values
        sources = np.zeros((2 + len(self._layers), *columns.shape), dtype=np.float32)
        within = np.arange(columns.shape[1]) < counts[:, None]
        sources[:2] = np.where(within, values, 0)
        if self.config.log_normalize_transform:
            sources[0] = np.log1p(sources[0] * (1e4 / (sums + 1.0))[:, None])
        for number, layer in enumerate(self._layers):
            kernels.look_up_values(rows, *self._csr[layer], counts, columns, sources[2 + number])
        return sources

    def _write(self, how: _Writing, rows, counts, columns, sources, length: int, attention: np.ndarray):
        ids, outside = np.empty((len(rows), len(how.fields), length), dtype=how.dtype), np.zeros(1, np.int64)
        bad = kernels.write_fields(
            counts, columns, sources, self._prefix, how.kinds, self._column_ids, how.value_ids, how.value_starts, ids,
            attention, outside,
        )  # fmt: skip
        if bad >= 0:
            cell, place = divmod(bad, columns.shape[1])
            column = int(columns[cell, place])
            names = getattr(self.store, "var_names", None)
            gene = f"gene '{names[column]}'" if names is not None else f"gene column {column}"
            raise DataError(
                f"cell '{self._names[rows[cell]]}', {gene}: a continuous value is negative or not finite; special tokens are "
                "written as negative numbers, so values must be 0 or more. Change the transforms, or tokenise the field"
            )
        return ids, int(outside[0])

    def _field_labels(self, rows, counts, columns, sources, targets: np.ndarray) -> dict[str, torch.Tensor]:
        """Labels of masked fields, from a field `label_<field>` where there is one."""
        own = {}
        if self._targets.fields:
            ids, outside = self._write(
                self._targets, rows, counts, columns, sources, targets.shape[2], np.empty((0, 0), np.int64)
            )
            self.report.add(outside, 0, 0)
            own = {entry.name: (entry, ids[:, number]) for number, entry in enumerate(self._targets.fields)}
        labels = {}
        for m, (_, entry) in enumerate(self._masked):
            chosen, tokenized = targets[m], entry.tokenized
            if f"label_{entry.name}" in own:
                source, written = own[f"label_{entry.name}"]
                tokenized = source.tokenized
                ignored = chosen == kernels.IGNORED
                if tokenized:
                    ignored |= written == kernels.UNK  # nothing to learn from a value without a token
                chosen = np.where(ignored, kernels.IGNORED, written)
            labels[entry.name] = torch.from_numpy(chosen.astype(np.int64 if tokenized else np.float32, copy=False))
        return labels


def _csr(matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices and data as plain read-only views: one compiled kernel for memory maps and arrays alike."""
    arrays = (np.asarray(matrix.indptr, dtype=np.int64), np.asarray(matrix.indices), np.asarray(matrix.data))
    if arrays[0].ndim != 1 or len(arrays[0]) < 1:
        raise DataError("the store's indptr is empty")
    if len(arrays[1]) != len(arrays[2]) or int(arrays[0][-1]) > len(arrays[2]) or np.any(np.diff(arrays[0]) < 0):
        raise DataError(
            f"the store's arrays do not fit: indptr ends at {int(arrays[0][-1])}, {len(arrays[1])} indices, {len(arrays[2])} values"
        )
    if arrays[2].dtype.kind not in "iufb":
        raise ConfigError(f"the store's values are of type {arrays[2].dtype}; numbers are needed")
    views = tuple(array.view() for array in arrays)
    for view in views:
        view.flags.writeable = False
    return views
