"""Pairs of cells: a perturbed cell, whose values are the labels, beside a control cell, which is what the model sees."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np

from bmfm_pipeline.batching import kernels
from bmfm_pipeline.batching.draws import below, compiled, draw, stream
from bmfm_pipeline.batching.matrices import CellMatrix
from bmfm_pipeline.errors import DataError

PAIRING = 2101  # keeps the draw of a partner apart from the other draws of a cell
# Matrices of a pair, as fields name them.
FLAGS, LABEL, DELTA, DELTA_BASELINE = (
    "perturbations",
    "label_expressions",
    "delta_expressions",
    "delta_baseline_expressions",
)
LAYERS = (FLAGS, LABEL, DELTA, DELTA_BASELINE)
SIGNED = (DELTA, DELTA_BASELINE)
_Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


@compiled
def draw_partners(rows, keys, seed, epoch, groups, starts, controls, own, partners):
    """For each row a control cell of its group, drawn by (seed, epoch, key): controls[starts[g]:starts[g + 1]]; groups (cells,).

    A group without control cells, or whose only one is the cell itself, draws from all; own (cells,) is a cell's place among the
    controls, -1 for none, and no control is paired with itself where there is another.
    """
    for b in range(len(rows)):
        group = groups[rows[b]]
        low, high = np.int64(0), np.int64(len(controls))
        if group >= 0 and starts[group + 1] > starts[group]:
            low, high = starts[group], starts[group + 1]
        itself = own[rows[b]]
        if itself >= 0 and high - low < 2:
            low, high = np.int64(0), np.int64(len(controls))
        within = low <= itself < high and high - low > 1
        place = low + below(draw(stream(seed, epoch, keys[b], PAIRING), 0), high - low - (1 if within else 0))
        if within and place >= itself:
            place += 1
        partners[b] = controls[place]


@numba.njit
def _next(indices, at, end):
    return np.int64(indices[at]) if at < end else np.int64(1) << 40


@compiled
def join_rows(a_indptr, a_indices, a_data, b_indptr, b_indices, c_indptr, c_indices, indptr, indices, data):
    """Rows with the columns of three CSR matrices of as many rows (columns ascending), and the values of the first: 0 where it has none."""
    n = 0
    indptr[0] = 0
    for row in range(len(a_indptr) - 1):
        i, j, k = a_indptr[row], b_indptr[row], c_indptr[row]
        while i < a_indptr[row + 1] or j < b_indptr[row + 1] or k < c_indptr[row + 1]:
            x, y, z = (
                _next(a_indices, i, a_indptr[row + 1]),
                _next(b_indices, j, b_indptr[row + 1]),
                _next(c_indices, k, c_indptr[row + 1]),
            )
            least = min(x, y, z)
            indices[n], data[n] = least, 0.0
            if x == least:
                data[n] = a_data[i]
                i += 1
            if y == least:
                j += 1
            if z == least:
                k += 1
            n += 1
        indptr[row + 1] = n
    return n


@dataclass(frozen=True)
class Pair:
    """CSR rows of a batch of pairs: the control cells, the perturbed ones, the target genes; and the rows of the control cells."""

    cells: np.ndarray
    partners: np.ndarray
    control: _Rows
    perturbed: _Rows
    flags: _Rows


@dataclass(frozen=True)
class PairTable:
    """Who is paired with whom, and what was done to whom.

    `perturbations` (cells,): the number of a cell's perturbation among `names`, -1 for none. `targets`: for each perturbation the columns
    of its target genes, ascending; the columns from `measured` on are genes that are targeted and not measured. `controls`: rows of
    control cells. `groups` (cells,): cells are paired within one, -1 for any; None pairs anybody. `train_mean` (measured,): the mean over the
    perturbations of training, which delta_baseline_expressions are differences from. `show`: the genes of a pair that the model sees
    where zeros are hidden: those of the control cell and the targets (no_zeros), or also those of the perturbed cell (label_nonzeros).
    `profiles` (N, measured) and `profile_of` (cells,), a row of it or -1: with these, labels are mean profiles in place of a cell's own values.
    """

    names: Sequence[str]
    perturbations: np.ndarray
    targets: Sequence[np.ndarray]
    measured: int
    controls: np.ndarray
    groups: np.ndarray | None = None
    train_mean: np.ndarray | None = None
    show: str = "no_zeros"
    profiles: np.ndarray | None = None
    profile_of: np.ndarray | None = None
    with_itself: bool = False  # every cell is its own control: for cells that are perturbed in silico

    def __post_init__(self):
        if not len(self.controls):
            raise DataError("there is no control cell to pair perturbed cells with")
        if len(self.perturbations) and int(self.perturbations.max()) >= len(self.targets):
            raise DataError(f"perturbation {int(self.perturbations.max())} is named, there are {len(self.targets)}")


class Pairs:
    """Draws partners and looks their values up, for a BatchBuilder over `matrix`, the values of all cells."""

    def __init__(self, table: PairTable, n_genes: int):
        self.table, self.measured = table, table.measured
        self.most_targets = max((len(own) for own in table.targets), default=0)
        cells = len(table.perturbations)
        controls = np.sort(np.asarray(table.controls, dtype=np.int64))
        groups = np.full(cells, -1, np.int64) if table.groups is None else np.asarray(table.groups, dtype=np.int64)
        order = np.argsort(groups[controls], kind="stable")
        self._controls = controls[order]
        sorted_groups = groups[self._controls]
        self._starts = np.searchsorted(sorted_groups, np.arange(int(groups.max(initial=-1)) + 2)).astype(np.int64)
        self._groups = groups
        self._own = np.full(cells, -1, np.int64)
        self._own[self._controls] = np.arange(len(self._controls))
        sizes = [len(own) for own in table.targets]
        self._target_starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._target_columns = np.concatenate([np.zeros(0, np.int32), *table.targets]).astype(np.int32)
        if len(self._target_columns) and int(self._target_columns.max()) >= n_genes:
            raise DataError(
                f"a perturbation targets gene column {int(self._target_columns.max())}, there are {n_genes}"
            )

    def without_partner_in_group(self) -> int:
        """How many perturbed cells have no control cell in their group, and so draw from all."""
        groups = self._groups[self.table.perturbations >= 0]
        has = np.diff(self._starts) > 0
        return int(np.sum((groups >= 0) & ~has[np.maximum(groups, 0)])) if len(has) else 0

    def partners(self, rows: np.ndarray, keys: np.ndarray, seed, epoch) -> np.ndarray:
        """The control cell of each row, int64 (B,)."""
        if self.table.with_itself:
            return rows
        found = np.empty(len(rows), np.int64)
        draw_partners(rows, keys, seed, epoch, self._groups, self._starts, self._controls, self._own, found)
        return found

    def flags(self, rows: np.ndarray) -> _Rows:
        """CSR rows with a 1 at the target genes of each cell."""
        numbers = self.table.perturbations[rows]
        starts = self._target_starts
        sizes = (
            np.where(numbers >= 0, starts[np.maximum(numbers, 0) + 1] - starts[np.maximum(numbers, 0)], 0)
            if len(starts) > 1
            else np.zeros(len(rows), np.int64)
        )
        indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        parts = [self._target_columns[starts[number] : starts[number + 1]] for number in numbers if number >= 0]
        indices = np.concatenate([np.zeros(0, np.int32), *parts])
        return indptr, indices, np.ones(len(indices), np.float32)

    def seen(self, pair: Pair, expose_zeros: bool) -> _Rows:
        """CSR rows of what the model sees: values of the control cell, at its genes, the targets, and what `show` adds."""
        wide = self.table.show == "label_nonzeros" and not expose_zeros
        control, flags = pair.control, pair.flags
        label = pair.perturbed if wide else (np.zeros(len(control[0]), np.int64), np.zeros(0, np.int32), None)
        most = len(control[1]) + len(flags[1]) + len(label[1])
        indptr, indices = np.empty(len(control[0]), np.int64), np.empty(most, np.int32)
        data = np.empty(most, np.float32)
        n = join_rows(*control, flags[0], flags[1], label[0], label[1], indptr, indices, data)
        return indptr, indices[:n], data[:n]

    def fill(self, layer: str, pair: Pair, counts, columns, values) -> None:
        """Write the values (B, room) of a layer at the chosen columns (B, room)."""
        places = np.arange(len(counts))
        if layer == FLAGS:
            kernels.look_up_values(places, *pair.flags, counts, columns, values)
            return
        kernels.look_up_values(places, *pair.perturbed, counts, columns, values)
        inside = (np.arange(columns.shape[1]) < counts[:, None]) & (columns < self.measured)
        where = np.where(inside, columns, 0)
        if self.table.profiles is not None:
            number = self.table.profile_of[pair.cells]
            means = self.table.profiles[np.maximum(number, 0)[:, None], where]
            values[:] = np.where(inside & (number >= 0)[:, None], means, values)
        if layer == DELTA:
            other = np.zeros_like(values)
            kernels.look_up_values(places, *pair.control, counts, columns, other)
            values -= other
        elif layer == DELTA_BASELINE:
            mean = self.table.train_mean
            if mean is None:
                raise DataError("delta_baseline_expressions: the mean of the training perturbations is not known")
            values -= np.where(inside, np.asarray(mean, np.float32)[where], 0)

    def together(self, matrix: CellMatrix, rows, keys, seed, epoch, refuse: Callable[[np.ndarray, int], None]) -> Pair:
        """The control cells beside the perturbed cells `rows`, and what is looked up in both; `refuse` hears of damaged rows."""
        partners, width = self.partners(rows, keys, seed, epoch), matrix.n_genes
        control, broken = as_rows(matrix, partners, width)
        refuse(partners, broken)
        perturbed, broken = as_rows(matrix, rows, width)
        refuse(rows, broken)
        return Pair(rows, partners, control, perturbed, self.flags(rows))

    def names(self, rows: np.ndarray, pair: Pair, cells: np.ndarray) -> dict[str, list[str]]:
        """What a batch says of its pairs."""
        named = self.table.perturbations[rows]
        return {
            "perturbed_genes": [self.table.names[number] if number >= 0 else "" for number in named],
            "control_cell_name": cells[pair.partners].tolist(),
        }

    def unmeasured(self, columns: np.ndarray, counts: np.ndarray, length: int, first: int) -> np.ndarray:
        """bool (B, L): positions of targets without a measured value; the genes of a cell begin at position `first`."""
        found = np.zeros((len(columns), length), dtype=bool)
        width = min(columns.shape[1], length - first)
        inside = np.arange(width) < counts[:, None]
        found[:, first : first + width] = (columns[:, :width] >= self.measured) & inside
        return found

    def hide_values(self, ids: np.ndarray, fields, first: int, columns: np.ndarray, counts: np.ndarray) -> None:
        """Write [UNK] for the values of targets that were not measured, in place: nothing is known of their expression."""
        missing = self.unmeasured(columns, counts, ids.shape[2], first)
        if not missing.any():
            return
        for number, entry in enumerate(fields):
            if entry.role == "values" and entry.name != FLAGS:
                ids[:, number][missing] = kernels.UNK if entry.tokenized else -(kernels.UNK + 1)


def as_rows(matrix: CellMatrix, rows: np.ndarray, width: int) -> tuple[_Rows, int]:
    """(CSR rows of their own, the first row with a column outside 0..width - 1 or -1)."""
    from bmfm_pipeline.batching.arranging import take_rows

    local, indptr, indices, data = matrix.select(rows)
    entries = int(np.sum(indptr[local + 1] - indptr[local]))
    own = np.empty(len(rows) + 1, np.int64), np.empty(entries, np.int32), np.empty(entries, np.float32)
    return own, int(take_rows(local, indptr, indices, data, width, *own))
