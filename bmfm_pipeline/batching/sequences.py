"""SequenceBuilder: the batch of chosen sequences, their tokens copied from flat arrays and masked by the kernel that masks cells."""

from typing import Any

import numpy as np
import torch

from bmfm_pipeline.batching import kernels
from bmfm_pipeline.batching.draws import compiled, draw, stream
from bmfm_pipeline.batching.plans import label_tensor, masking_plan
from bmfm_pipeline.batching.report import BatchReport
from bmfm_pipeline.batching.settings import BatchingConfig, FieldSpec, check_lengths
from bmfm_pipeline.errors import ConfigError, DataError

_STRAND = 2101  # keeps the draws of this purpose apart from those of cells
_SEP, _PAD = 1, 2  # the special tokens, as vocabularies have them


@compiled
def write_tokens(rows, tokens, starts, other, other_starts, turned, prefix, most, ids, attention, counts):
    """Fill ids (B, L) and attention (B, L) with [CLS] tokens [SEP] and padding, and counts (B,) with the tokens of each.

    Sequence `rows[b]` is read from `other` where `turned[b]`. At most `most` tokens are kept. Returns how many are unknown.
    """
    unknown, first = 0, len(prefix)
    for b in range(len(rows)):
        source, begin, end = tokens, starts[rows[b]], starts[rows[b] + 1]
        if turned[b]:
            source, begin, end = other, other_starts[rows[b]], other_starts[rows[b] + 1]
        count = min(end - begin, most)
        counts[b] = count
        for i in range(first):
            ids[b, i] = prefix[i]
        for i in range(count):
            token = np.int64(source[begin + i])
            unknown += token == 0
            ids[b, first + i] = token
        ids[b, first + count] = _SEP
        for i in range(first + count + 1):
            attention[b, i] = 1
        for i in range(first + count + 1, ids.shape[1]):
            ids[b, i] = _PAD
            attention[b, i] = 0
    return unknown


@compiled
def other_strands(keys, seed, epoch, turned):
    """Mark about half of the sequences, by (seed, epoch, key)."""
    for b in range(len(keys)):
        turned[b] = draw(stream(seed, epoch, keys[b], _STRAND), 0) & np.uint64(1)


class SequenceBuilder:
    """Builds batches of sequences as BatchBuilder does of cells: same arguments of `build`, same batch, one field.

    `store` offers `sequences` (tokens and token_starts; other_strand and other_starts where `reverse_complement` is True), `obs_names`
    and `cell_keys`. In training a sequence is read on the other strand in half of the epochs with `reverse_complement`. Raises
    ConfigError for settings that cannot make a batch, DataError for arrays that do not fit.
    """

    mask_weights = np.zeros(0, np.float32)
    pairs = None

    def __init__(
        self,
        store,
        fields: list[FieldSpec],
        config: BatchingConfig,
        labels: dict[str, np.ndarray] | None = None,
        reverse_complement: bool = False,
    ):
        check_lengths(config)
        if len(fields) != 1:
            raise ConfigError(f"fields: sequences have one field, found {', '.join(entry.name for entry in fields)}")
        self.store, self.config, self.fields, self.field = store, config, tuple(fields), fields[0]
        self.labels = {name: np.asarray(values) for name, values in (labels or {}).items()}
        self.reverse_complement = reverse_complement
        self.n_cells = len(store.obs_names)
        if store.sequences is None or len(store.sequences) != self.n_cells:
            raise DataError(
                f"{store.name}: holds no sequences for its {self.n_cells} rows; make it with `bmfm preprocess`"
            )
        if reverse_complement and store.sequences.other_strand is None:
            raise DataError(
                f"{store.name}: was made without tokens of the other strand; preprocess with data_module.sequences.reverse_complement=true"
            )
        for name, values in self.labels.items():
            if len(values) != self.n_cells:
                raise DataError(f"labels of '{name}' are {len(values)}, the store has {self.n_cells} sequences")
        self._prefix = np.array(config.prefix_ids, dtype=np.int64)
        masked = [(0, self.field)] if config.masks and self.field.is_masked else []
        self._masked, (self._plan, self._barred) = masked, masking_plan(masked)
        self.report = BatchReport()

    def set_mask_weights(self, weights: np.ndarray | None, from_epoch: int = 0) -> None:
        """Sequences are masked uniformly: only None is taken."""
        _refuse(weights, "mask")

    def set_dropout_weights(self, weights: np.ndarray | None) -> None:
        """No piece of a sequence is dropped: only None is taken."""
        _refuse(weights, "dropout")

    def build(self, rows: np.ndarray, epoch: int = 0, training: bool = True) -> dict[str, Any]:
        """The batch of store rows `rows` (B,): input_ids (B, 1, L) int64, attention_mask (B, L), cell_name, cell_index, labels."""
        rows = np.array(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.n_cells):
            raise DataError(f"rows {rows.min()}..{rows.max()} asked for, the store has rows 0..{self.n_cells - 1}")
        config, arrays, batch, first = self.config, self.store.sequences, len(rows), len(self._prefix)
        keys = np.asarray(self.store.cell_keys)[rows]
        seed, counter = np.uint64(config.seed & 0xFFFFFFFFFFFFFFFF), np.uint64(epoch)
        turned = np.zeros(batch, dtype=bool)
        other = arrays.tokens, arrays.token_starts
        if self.reverse_complement and training:
            other_strands(keys, seed, counter, turned)
            other = arrays.other_strand, arrays.other_starts
        sizes = np.where(
            turned, other[1][rows + 1] - other[1][rows], arrays.token_starts[rows + 1] - arrays.token_starts[rows]
        )
        most = config.max_length - first - 1 if config.truncation else max(int(sizes.max(initial=0)), 1)
        length = self._length(int(np.minimum(sizes, most).max(initial=0)) + first + 1)
        ids, attention = np.empty((batch, length), np.int64), np.empty((batch, length), np.int64)
        counts = np.empty(batch, np.int64)
        unknown = write_tokens(
            rows, arrays.tokens, arrays.token_starts, *other, turned, self._prefix, most, ids, attention, counts
        )
        ids, labels = ids[:, None, :], {}
        if self._masked:
            hidden, marks = np.empty((1, batch, length), np.int64), np.empty((batch, length), np.uint8)
            nothing = np.zeros((batch, 1), np.int32)
            kernels.mask_fields(
                keys, counts, nothing, first, 0, seed, counter, config.change_ratio, config.mask_ratio, config.switch_ratio, False,
                self.mask_weights, self._plan, self._barred, ids, marks, hidden,
            )  # fmt: skip
            labels[self.field.name] = label_tensor(hidden[0], self.field)
        if config.with_label_columns:
            labels.update({name: torch.from_numpy(values[rows]) for name, values in self.labels.items()})
        self.report.add(int(unknown), int(np.count_nonzero(counts == 0)), batch)
        result = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(attention),
            "cell_name": self.store.obs_names[rows].tolist(),
            "cell_index": torch.from_numpy(rows),
        }
        return {**result, "labels": labels} if labels else result

    def _length(self, needed: int) -> int:
        config = self.config
        length = max(needed, config.max_length) if config.padding == "max_length" else needed
        multiple = config.pad_to_multiple_of
        return -(-length // multiple) * multiple if multiple and config.padding is not False else length


def _refuse(weights: np.ndarray | None, what: str) -> None:
    if weights is not None:
        raise ConfigError(f"{what} weights are given by gene, and sequences have none")
