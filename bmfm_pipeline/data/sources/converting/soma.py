"""SOMA experiments (TileDB), the layout of CELLxGENE Census: one measurement, read by cells."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from bmfm_pipeline.config.reading import PLACE, Reading
from bmfm_pipeline.data.sources.converting.writing import CellFile, unique_genes
from bmfm_pipeline.errors import ConfigError, DataError

MEASUREMENT = "RNA"
CELLS_PER_BLOCK = 5_000
# Columns that name genes and cells; the first that is there and names each only once.
GENES, CELLS = ("feature_name", "gene_name", "var_id", "feature_id"), ("obs_id", "cell_id", "_index")
IDS = "feature_id"


def write(path: Path, target: Path, reading: Reading) -> dict[str, Any]:
    """Cells, those that `reading.cell_filter` chooses, by the genes of a measurement; see `convert`."""
    try:
        import tiledbsoma
    except ImportError:
        raise ConfigError(
            f"{path}: is a SOMA experiment, which needs the package tiledbsoma; run `pip install 'bmfm-pipeline[census]'`"
        ) from None
    try:
        with tiledbsoma.open(str(path)) as opened:
            if not isinstance(opened, tiledbsoma.Experiment):
                raise DataError(
                    f"{path}: is a SOMA {type(opened).__name__}, not an experiment; it holds {', '.join(opened) if hasattr(opened, 'keys') else 'no experiments'}"
                )
            return _write(path, opened, target, reading)
    except tiledbsoma.SOMAError as error:
        raise DataError(f"{path}: cannot be read as a SOMA experiment ({error})") from None


def _write(path: Path, experiment, target: Path, reading: Reading) -> dict[str, Any]:
    measurement = _entry(path, experiment.ms, reading.modality, MEASUREMENT, "modality", "measurement")
    matrix = _entry(path, measurement.X, reading.soma_layer, None, "soma_layer", "layer of X")
    obs = _obs(path, experiment, reading.cell_filter)
    var = measurement.var.read().concat().to_pandas()
    if not len(obs):
        raise DataError(f"{path}: no cell is left; {PLACE}.reading.cell_filter is {reading.cell_filter!r}")
    cell_ids, gene_ids = obs.pop("soma_joinid").to_numpy(), var.pop("soma_joinid").to_numpy()
    order = np.argsort(cell_ids)
    obs, cell_ids = obs.iloc[order].reset_index(drop=True), cell_ids[order]
    names = [str(name) for name in _named(var, GENES)]
    if len(set(names)) < len(names):
        names = unique_genes(names, var[IDS].astype(str) if IDS in var else [str(number) for number in gene_ids])
    cells = _named(obs, CELLS)
    obs.index = [str(name) for name in (cell_ids if cells is None or len(set(cells)) < len(cells) else cells)]
    var.index = names
    with CellFile(target) as file:
        for start in range(0, len(cell_ids), CELLS_PER_BLOCK):
            file.add(_block(matrix, cell_ids[start : start + CELLS_PER_BLOCK], gene_ids))
        found = file.finish(_plain(obs), _plain(var), path)
    notes = [f"cells: {reading.cell_filter}"] if reading.cell_filter else []
    return {**found, "notes": notes}


def _entry(path: Path, collection, asked: str | None, default: str | None, key: str, what: str):
    name, there = asked or default, list(collection)
    if name not in there and asked is None and len(there) == 1:
        name = there[0]
    if name not in there:
        raise ConfigError(
            f"{PLACE}.reading.{key}: {path} has no {what} '{name}'; it has {', '.join(there) or 'none'}: name one of them"
        )
    return collection[name]


def _obs(path: Path, experiment, cell_filter: str | None):
    import tiledbsoma

    try:
        return experiment.obs.read(value_filter=cell_filter).concat().to_pandas()
    except (tiledbsoma.SOMAError, SyntaxError, ValueError, KeyError) as error:
        if cell_filter is None:
            raise
        # Its further lines say where it was raised.
        raise ConfigError(
            f"{PLACE}.reading.cell_filter: {cell_filter!r} is refused by {path} ({str(error).splitlines()[0]}); its columns are {', '.join(experiment.obs.keys())}"
        ) from None


def _named(table, columns: tuple[str, ...]):
    name = next((name for name in columns if name in table), None)
    return table[name] if name is not None else None


def _block(matrix, cells: np.ndarray, genes: np.ndarray) -> sparse.csr_matrix:
    """CSR of the `cells` (ids, ascending) in the order of `genes` (ids)."""
    read = matrix.read((cells,)).tables().concat()
    rows, columns, values = (read.column(name).to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
    order = np.argsort(genes)
    placed = order[np.searchsorted(genes, columns, sorter=order)]
    shape = len(cells), len(genes)
    return sparse.csr_matrix((values.astype(np.float32), (np.searchsorted(cells, rows), placed)), shape=shape)


def _plain(table):
    """Columns that an h5ad can hold."""
    for name in table.columns:
        if isinstance(table[name].dtype, object.__class__) or table[name].dtype.kind not in "iufbO":
            table[name] = table[name].astype(object)
    return table
