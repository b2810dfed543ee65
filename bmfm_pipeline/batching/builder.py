"""BatchBuilder: the batch of chosen cells, written by compiled kernels straight into the arrays that the model gets."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bmfm_pipeline.batching import arranging, kernels, ordering, targets
from bmfm_pipeline.batching.matrices import CellMatrix
from bmfm_pipeline.batching.pairs import LAYERS, Pair, Pairs, PairTable
from bmfm_pipeline.batching.plans import Writing, allowing, label_tensor, labels_at, masking_plan, writing
from bmfm_pipeline.batching.recipes import make_recipe, usable_columns
from bmfm_pipeline.batching.report import first_report
from bmfm_pipeline.batching.settings import LABEL_SETS, BatchingConfig, FieldSpec, check_settings
from bmfm_pipeline.batching.tables import GeneTables, check_weights
from bmfm_pipeline.errors import DataError

FLAGS = "perturbations"
_NO_ROWS = (np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


@dataclass
class _Cells:
    """The chosen genes of a batch: columns (B, room), values (1, B, room) or by source, counts (B,), sums (B,) of their values."""

    columns: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    sums: np.ndarray


class BatchBuilder:
    """Builds batches from a store that offers `indptr`, `indices`, `data` (CSR of cells by genes) and `obs_names`.

    A store that is not one CSR matrix says `contiguous = False` and offers `gather(rows) -> (indptr, indices, data)`, the CSR of those
    rows alone, in order. A store may also offer `cell_keys`, int64 (cells,): what makes a cell's random draws its own, whatever
    file it lies in; without them the row number does.
    labels: label column -> values of all cells of the store, int64 class ids (cells,) or float32 (cells,) or (cells, C).
    mask_weights: relative masking rate by gene column, float32 (genes,), see `gene_mask_weights`; None masks uniformly.
    tables: what else is known of each gene. allowed_columns: numbers of the gene columns that may enter a batch; None allows all.
    A field `perturbations` with a layer marks genes that stand first. pairs: rows are perturbed cells, and the model sees a control cell
    beside each, see PairTable; the names in its LAYERS are then layers that fields may have. Genes that cannot enter a batch are left out and counted in
    `report`. Raises ConfigError for settings that cannot make a batch, DataError for arrays that do not fit the store. Pickles without
    the store's arrays when the store does.
    """

    def __init__(
        self,
        store,
        fields: Sequence[FieldSpec],
        config: BatchingConfig,
        labels: dict[str, np.ndarray] | None = None,
        mask_weights: np.ndarray | None = None,
        tables: GeneTables | None = None,
        allowed_columns: Collection[int] | None = None,
        pairs: PairTable | None = None,
    ):
        check_settings(config, fields)
        self._lead = config.lead
        self.store, self.config, self.fields = store, config, tuple(fields)
        self.labels = {name: np.asarray(values) for name, values in (labels or {}).items()}
        inputs = tuple(entry for entry in self.fields if entry.is_input)
        genes = next(entry for entry in inputs if entry.role == "genes")
        ids = np.ascontiguousarray(genes.column_ids, dtype=np.int32)
        self._n_genes, self._vocab_size = len(ids), max(genes.vocab_size, int(ids.max(initial=0)) + 1)
        self.tables = allowing(tables or GeneTables(), allowed_columns, len(ids))
        self._usable = usable_columns(ids, config, self.tables)
        self.pairs = None if pairs is None else Pairs(pairs, len(ids))
        if self.pairs is not None:  # a target that was not measured is shown even without a token, as [UNK]
            self._usable[pairs.measured :] = 1
        # Two columns beyond the genes stand for the read depths of a cell.
        self._column_ids = np.append(ids, np.array(config.depth_ids, np.int32)) if config.lead else ids
        flags = [entry for entry in inputs if entry.name == FLAGS and entry.role == "values" and entry.layer]
        self._flags = flags[0].layer if flags else None
        self._layers = sorted({entry.layer for entry in self.fields if entry.layer is not None})
        self._open_store()
        self._check_arrays()
        self._mask_weights: tuple[tuple[int, np.ndarray], ...] = ((0, np.zeros(0, np.float32)),)
        self.set_mask_weights(mask_weights)
        self.set_dropout_weights(self.tables.dropout_weights)
        self._inputs = writing(inputs, self._layers)
        named = {f"label_{entry.name}" for entry in inputs if entry.is_masked}
        self._labelling = config.collation_strategy == "sequence_labeling"
        label_fields = (entry for entry in self.fields if not entry.is_input)
        self._targets = writing(
            tuple(entry for entry in label_fields if self._labelling or entry.name in named), self._layers
        )
        masked = [(number, entry) for number, entry in enumerate(inputs) if entry.is_masked]
        self._masked = masked if config.masks else []
        self._plan, self._barred = masking_plan(self._masked)
        self._plan_whole_cells(inputs)
        self._prefix = np.array(config.prefix_ids, dtype=np.int64)
        self.report = first_report(
            ids, getattr(store, "var_names", None), self.tables, self._usable, config.sequence_order
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of the store's arrays: a worker that is not forked opens the store anew instead of copying it."""
        left_out = ("_matrices", "_names", "_cell_keys")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_store()

    def _open_store(self) -> None:
        self._names = np.asarray(self.store.obs_names, dtype=object)
        self._matrices: dict[str | None, CellMatrix] = {}
        base = self.config.values_from
        in_store = [layer for layer in self._layers if self.pairs is None or layer not in LAYERS]
        for layer in dict.fromkeys([base, *in_store]):
            matrix = self.store if layer is None else getattr(self.store, layer, None)
            if matrix is None:
                users = [f"fields.{entry.name}" for entry in self.fields if entry.layer == layer] or ["values_from"]
                raise DataError(f"{users[0]}: the store has no matrix '{layer}'")
            self._matrices[layer] = CellMatrix(matrix, len(self._names))
        keys = getattr(self.store, "cell_keys", None)
        self._cell_keys = None if keys is None else np.asarray(keys, dtype=np.int64)
        self.n_cells = self._matrices[base].n_cells

    def _check_arrays(self) -> None:
        """Kernels do not check bounds: everything they index is checked here, once."""
        for layer, matrix in self._matrices.items():
            if matrix.n_cells != self.n_cells:
                raise DataError(f"matrix '{layer}' of the store has {matrix.n_cells} cells, X has {self.n_cells}")
            if matrix.n_genes > self._n_genes:
                raise DataError(
                    f"the store has {matrix.n_genes} gene columns, but column_ids names the tokens of {self._n_genes}; "
                    "build it from the store's var_names"
                )
        if len(self._names) != self.n_cells:
            raise DataError(f"the store has {self.n_cells} cells, but {len(self._names)} obs_names")
        for name, values in self.labels.items():
            if len(values) != self.n_cells:
                raise DataError(f"labels of '{name}' are {len(values)}, the store has {self.n_cells} cells")

    @property
    def mask_weights(self) -> np.ndarray:
        """The relative masking rates that hold now, float32 (genes,); empty where masking is uniform."""
        return self._mask_weights[-1][1]

    def set_mask_weights(self, weights: np.ndarray | None, from_epoch: int = 0) -> None:
        """Mask genes at these relative rates, float32 (genes,), from an epoch on; None masks uniformly.

        Every thread that builds batches sees them at once, so give the epoch that has not begun where threads build ahead: then batches
        do not depend on how far ahead they are. Raises DataError for weights that do not fit the genes.
        """
        weights = np.zeros(0, np.float32) if weights is None else np.array(weights, dtype=np.float32)
        if len(weights) not in (0, self._n_genes):
            raise DataError(f"mask_weights are {len(weights)}, gene columns {self._n_genes}")
        check_weights(weights, "mask_weights")
        earlier = tuple(entry for entry in self._mask_weights if entry[0] < from_epoch)
        self._mask_weights = (*earlier, (from_epoch, weights))

    def set_dropout_weights(self, weights: np.ndarray | None) -> None:
        """Drop genes at these relative rates, float32 (genes,), wherever selective_dropout is above 0; None drops all alike."""
        self.tables = replace(self.tables, dropout_weights=weights)
        self.tables.check(self._n_genes)
        always = self._flags is not None
        self._recipes = tuple(
            make_recipe(self.config, self.tables, self._usable, training, always) for training in (False, True)
        )
        if self.pairs is not None:  # what was not measured is nobody's zero
            self._recipes = tuple(
                recipe._replace(pool=recipe.pool[recipe.pool < self.pairs.measured]) for recipe in self._recipes
            )

    def _weights(self, epoch: int, training: bool) -> np.ndarray:
        if not training:
            return self.mask_weights if self.config.weigh_evaluation else np.zeros(0, np.float32)
        for first, table in reversed(self._mask_weights):
            if first <= epoch:
                return table
        return np.zeros(0, np.float32)

    def _plan_whole_cells(self, inputs: tuple[FieldSpec, ...]) -> None:
        config = self.config
        values = [entry.name for entry in inputs if entry.role == "values"]
        self._whole_field = values[0] if values else "expressions"
        asked = [name for name in LABEL_SETS if name in config.wced_targets]
        self._whole_sets = asked
        self._whole_places = np.array([asked.index(name) if name in asked else -1 for name in LABEL_SETS])
        self._whole_scale = targets.RAW
        if config.wced_normalize and config.rda_transform is not None:
            poisson = config.rda_transform == "poisson_downsample"
            self._whole_scale = targets.LOG_COUNT if poisson else targets.LOG_SHARE
        elif config.wced_normalize and config.log_normalize_transform:
            self._whole_scale = targets.LOG_SUM
        elif config.wced_normalize and config.sqrt_normalize_transform:
            self._whole_scale = targets.SQRT_SHARE
        medians = self.tables.medians if config.wced_normalize else None
        self._whole_medians = np.zeros(0, np.float32) if medians is None else np.asarray(medians, np.float32)

    def _room(self, longest: int, recipe: arranging.Recipe | None) -> int:
        """The most entries a cell can bring into a batch."""
        config = self.config
        most = longest
        if recipe is not None:
            most = max(longest, recipe.sampled) + (len(recipe.pool) if recipe.zeros else 0) + config.lead
        caps = [most, config.max_mfi_data_len or most]
        if config.truncation:
            caps.append(config.max_length - len(self._prefix) - 1)
        return max(min(caps), 1 + config.lead)

    def _length(self, counts: np.ndarray) -> int:
        config = self.config
        length = int(counts.max(initial=0)) + len(self._prefix) + 1
        if config.padding == "max_length":
            length = max(length, config.max_length)
        multiple = config.pad_to_multiple_of
        return -(-length // multiple) * multiple if multiple and config.padding is not False else length

    def build(self, rows: np.ndarray, epoch: int = 0, training: bool = True) -> dict[str, Any]:
        """The batch of store rows `rows` (B,) in `epoch` (0 or more).

        input_ids (B, F, L): int64, or float32 when an input field is continuous; attention_mask (B, L) int64, or (B, L, L) with
        prevent_attention_to_masked; cell_name, a list of B; cell_index (B,) int64; labels, where there are any: masked or label
        field -> (B, L), label column -> (B,) or (B, C), and with whole-cell targets the name of the value field -> {label set: float32
        (B, V), -100 where there is no target}. `training=False` leaves out dropout. Safe to call from several threads.
        """
        rows = np.array(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.n_cells):
            raise DataError(f"rows {rows.min()}..{rows.max()} asked for, the store has rows 0..{self.n_cells - 1}")
        config, batch, first = self.config, len(rows), len(self._prefix)
        seed, counter = np.uint64(config.seed & 0xFFFFFFFFFFFFFFFF), np.uint64(epoch)
        keys = rows if self._cell_keys is None else self._cell_keys[rows]
        recipe = self._recipes[training]
        pair = None
        if self.pairs is not None:
            pair = self.pairs.together(
                self._matrices[config.values_from], rows, keys, seed, counter, self._refuse_column
            )
            own = self.pairs.seen(pair, config.expose_zeros)
        else:
            own = self._own_rows(config.values_from, rows) if recipe is not None or self._whole_sets else None
        if recipe is None:
            cells = self._pick(rows, keys, seed, counter)
        else:
            flags = None if pair is None else pair.flags
            cells = self._arrange(rows, own, recipe, keys, seed, counter, flags)
        length = self._length(cells.counts)
        sources = self._sources(rows, cells, recipe, pair)
        attention = np.empty((batch, length), np.int64)
        ids, outside = self._write(self._inputs, rows, cells, sources, length, attention)
        if pair is not None:
            self.pairs.hide_values(ids, self._inputs.fields, first, cells.columns, cells.counts)
        labels: dict[str, Any] = {}
        marks = np.empty((batch, length), np.uint8)
        if self._masked:
            hidden = np.empty((len(self._masked), batch, length), dtype=ids.dtype)
            kernels.mask_fields(
                keys, cells.counts, cells.columns, first, self._lead, seed, counter, config.change_ratio, config.mask_ratio,
                config.switch_ratio, config.comask_across_fields, self._weights(epoch, training), self._plan, self._barred, ids,
                marks, hidden,
            )  # fmt: skip
            labels.update(self._field_labels(rows, cells, sources, hidden))
        elif self._labelling:
            labels.update(self._position_labels(rows, cells, sources, length))
        if self._whole_sets:
            labels[self._whole_field] = self._whole_cells(own, cells)
        if config.with_label_columns:
            labels.update({name: torch.from_numpy(values[rows]) for name, values in self.labels.items()})
        if config.prevent_attention_to_masked and self._masked:
            attention = np.zeros((batch, length, length), dtype=np.int64)
            kernels.attention_without_masked(cells.counts - self._lead, first + self._lead, marks, attention)
        self.report.add(outside, int(np.count_nonzero(cells.counts <= self._lead)), batch)
        result = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(attention),
            "cell_name": self._names[rows].tolist(),
            "cell_index": torch.from_numpy(rows),
        }
        if pair is not None:
            result |= self.pairs.names(rows, pair, self._names)
        if labels:
            result["labels"] = labels
        return result

    def _pick(self, rows, keys, seed, epoch) -> _Cells:
        """Genes as stored, shuffled or sorted, with nothing done to their values."""
        config, batch, source = self.config, len(rows), self._matrices[self.config.values_from]
        matrix = source.select(rows)
        longest = int(np.diff(matrix[1]).max(initial=0)) if source.longest is None else source.longest
        room = self._room(longest, None)
        columns, counts = np.empty((batch, room), np.int32), np.empty(batch, np.int64)
        values, sums = np.empty((1, batch, room), np.float32), np.empty(batch, np.float64)
        ranking, broken = np.zeros(0, np.int32), -1
        if config.sequence_order == "sorted":
            local, indptr = matrix[:2]
            ranking = np.empty(int(np.sum(indptr[local + 1] - indptr[local])), np.int32)
            broken = kernels.rank_genes(*matrix, self._usable, ranking)
        if broken < 0:
            broken = kernels.pick_genes(
                *matrix, self._usable, config.sequence_order == "random", ranking, config.max_mfi_data_len or longest, keys, seed,
                epoch, config.log_normalize_transform or config.sqrt_normalize_transform, columns, values[0], counts, sums,
            )  # fmt: skip
        self._refuse_column(rows, broken)
        return _Cells(columns, values, counts, sums)

    def _own_rows(self, layer: str | None, rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """indptr, indices and data of just these rows of a matrix of the store, their columns checked."""
        local, indptr, indices, data = self._matrices[layer].select(rows)
        entries = int(np.sum(indptr[local + 1] - indptr[local]))
        own = np.empty(len(rows) + 1, np.int64), np.empty(entries, np.int32), np.empty(entries, np.float32)
        self._refuse_column(rows, arranging.take_rows(local, indptr, indices, data, self._n_genes, *own))
        return own

    def _arrange(self, rows, own: tuple, recipe: arranging.Recipe, keys, seed, epoch, flags: tuple | None) -> _Cells:
        """Genes as the recipe says; `flags` are rows that mark those that stand first, where they are known already."""
        batch, room = len(rows), self._room(int(np.diff(own[0]).max(initial=0)), recipe)
        columns, counts = np.empty((batch, room), np.int32), np.empty(batch, np.int64)
        values, sums = np.zeros((2, batch, room), np.float32), np.empty(batch, np.float64)
        pool = np.zeros(0, np.int32)
        if recipe.zeros == arranging.ZEROS_OF_BATCH:
            # Outside training a cell must come out the same whatever cells are beside it: any gene may be its zero.
            in_training = recipe is self._recipes[True]
            pool = ordering.expressed_columns(*own, self._usable) if in_training else recipe.pool
        if flags is None:
            flags = _NO_ROWS if self._flags is None else self._own_rows(self._flags, rows)
        broken = arranging.arrange_cells(*own, recipe, pool, *flags, keys, seed, epoch, columns, values, counts, sums)
        if broken >= 0:
            raise DataError(
                f"cell '{self._names[rows[broken]]}' holds values that are no whole numbers, and rda_transform "
                f"{self.config.rda_transform} reduces counts; preprocess from raw counts, so that the processed file keeps them as "
                "layers['counts'], or use rda_transform=equal"
            )
        return _Cells(columns, values, counts, sums)

    def _refuse_column(self, rows, broken: int) -> None:
        if broken >= 0:
            raise DataError(
                f"cell '{self._names[rows[broken]]}' names a gene column outside 0..{self._n_genes - 1}: the processed file "
                "is damaged or not the one the vocabulary was built for; run `bmfm preprocess` again"
            )

    def _sources(self, rows, cells: _Cells, recipe: arranging.Recipe | None, pair: Pair | None = None) -> np.ndarray:
        """Values by source (S, B, room): for inputs, for label fields, further layers. Only what the fields need."""
        config, counts, columns = self.config, cells.counts, cells.columns
        square_root = config.sqrt_normalize_transform
        normalise = (config.log_normalize_transform and recipe is None) or square_root
        if not normalise and not self._layers and (recipe is not None or not self._targets.fields):
            return cells.values
        sources = np.zeros((2 + len(self._layers), *columns.shape), dtype=np.float32)
        within = np.arange(columns.shape[1]) < counts[:, None]
        sources[:2] = np.where(within, cells.values, 0)
        if square_root:
            totals = np.maximum(cells.sums, 1e-12)[:, None]
            sources[0] = np.sqrt(sources[0] * (config.log_normalize_sum / totals))
        elif normalise:
            sources[0] = np.log1p(sources[0] * (config.log_normalize_sum / (cells.sums + 1.0))[:, None])
        for number, layer in enumerate(self._layers):
            if layer not in self._matrices:
                self.pairs.fill(layer, pair, counts, columns, sources[2 + number])
                continue
            kernels.look_up_values(*self._matrices[layer].select(rows), counts, columns, sources[2 + number])
        return sources

    def _write(self, how: Writing, rows, cells: _Cells, sources, length: int, attention: np.ndarray):
        counts, columns = cells.counts, cells.columns
        ids, outside = np.empty((len(rows), len(how.fields), length), dtype=how.dtype), np.zeros(1, np.int64)
        bad = kernels.write_fields(
            counts, columns, sources, self._prefix, how.kinds, self._column_ids, how.value_ids, how.value_starts, ids,
            attention, outside,
        )  # fmt: skip
        if bad >= 0:
            cell, place = divmod(bad, columns.shape[1])
            column = int(columns[cell, place])
            names = getattr(self.store, "var_names", None)
            gene = f"gene '{names[column]}'" if names is not None and column < len(names) else f"gene column {column}"
            raise DataError(
                f"cell '{self._names[rows[cell]]}', {gene}: a continuous value is negative or not finite; special tokens are "
                "written as negative numbers, so values must be 0 or more. Change the transforms, or tokenise the field"
            )
        return ids, int(outside[0])

    def _written_targets(self, rows, cells: _Cells, sources, length: int) -> dict[str, tuple[FieldSpec, np.ndarray]]:
        """Label field -> its entry and what it says at every position (B, L), special tokens included."""
        if not self._targets.fields:
            return {}
        ids, outside = self._write(self._targets, rows, cells, sources, length, np.empty((0, 0), np.int64))
        self.report.add(outside, 0, 0)
        return {entry.name: (entry, ids[:, number]) for number, entry in enumerate(self._targets.fields)}

    def _field_labels(self, rows, cells: _Cells, sources, hidden: np.ndarray) -> dict[str, torch.Tensor]:
        """Labels of masked fields, from a field `label_<field>` where there is one."""
        own = self._written_targets(rows, cells, sources, hidden.shape[2])
        labels = {}
        for m, (_, entry) in enumerate(self._masked):
            chosen, source = hidden[m], entry
            if f"label_{entry.name}" in own:
                source, written = own[f"label_{entry.name}"]
                chosen = labels_at(chosen != kernels.IGNORED, source, written)
            labels[entry.name] = label_tensor(chosen, source)
        return labels

    def _position_labels(self, rows, cells: _Cells, sources, length: int) -> dict[str, torch.Tensor]:
        """Labels of fields that are no input at every gene."""
        places, first = np.arange(length), len(self._prefix)
        genes = (places >= first + self._lead) & (places < first + cells.counts[:, None])
        if self.pairs is not None:
            genes &= ~self.pairs.unmeasured(cells.columns, cells.counts, length, first)
        written = self._written_targets(rows, cells, sources, length)
        return {name: label_tensor(labels_at(genes, entry, ids), entry) for name, (entry, ids) in written.items()}

    def _whole_cells(self, own: tuple, cells: _Cells) -> dict[str, torch.Tensor]:
        """Whole-cell targets by label set, each (B, V)."""
        found = targets.empty_targets(len(self._whole_sets), len(cells.counts), self._vocab_size)
        targets.whole_cell_targets(
            *own, self._usable, self._whole_medians, self._column_ids, self._whole_scale, self.config.log_normalize_sum,
            cells.counts, cells.columns, self._lead, self.config.expose_zeros, self._whole_places, found,
        )  # fmt: skip
        return {name: torch.from_numpy(found[number]) for number, name in enumerate(self._whole_sets)}
