"""A table that describes cells, beside a file that holds only a matrix."""

from pathlib import Path

from bmfm_pipeline.data.sources.tables import read_table
from bmfm_pipeline.errors import DataError

PLACE = "data_module.transform_kwargs.reading.cell_table"
SHOWN = 5


def add_cell_table(h5ad: Path, table: Path, source: Path) -> list[str]:
    """Add the columns of a csv or tsv file, whose first column holds cell names, to obs of `h5ad`; returns what to know of it.

    Cells that the table lacks have missing values. Raises DataError when it cannot be read, names a cell twice, or fits no cell.
    """
    import h5py
    import pandas as pd
    from anndata.io import write_elem

    from bmfm_pipeline.data.sources.converting.writing import with_text_columns

    try:
        given = pd.read_csv(table, sep=None, engine="python", index_col=0, keep_default_na=True, na_values=["\\N"])
    except FileNotFoundError:
        raise DataError(
            f"{PLACE}: {table} does not exist; name a csv or tsv file with cell names in its first column"
        ) from None
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{PLACE}: {table} cannot be read as a csv or tsv file ({error})") from None
    given.index = given.index.astype(str)
    if not given.index.is_unique:
        twice = given.index[given.index.duplicated()].unique()
        raise DataError(f"{PLACE}: {table} names {len(twice)} cells more than once, e.g. {', '.join(twice[:SHOWN])}")
    with h5py.File(h5ad, "r+") as file:
        obs = read_table(source, file, "obs")
        known = obs.index.isin(given.index)
        if not known.any():
            raise DataError(
                f"{PLACE}: {table} names none of the {len(obs):,} cells of {source}; it names e.g. {', '.join(given.index[:3])}, the file "
                f"{', '.join(obs.index[:3])}. Cell names must stand in its first column"
            )
        fresh = [name for name in given.columns if name not in obs]
        for name in fresh:
            obs[name] = given[name].reindex(obs.index)
        del file["obs"]
        write_elem(file, "obs", with_text_columns(obs))
    notes = []
    if missing := int((~known).sum()):
        notes.append(f"{table.name} says nothing of {missing:,} of {len(obs):,} cells")
    if beyond := int((~given.index.isin(obs.index)).sum()):
        notes.append(f"{table.name} names {beyond:,} cells that {source.name} does not have")
    if there := [name for name in given.columns if name not in fresh]:
        notes.append(f"columns that the cells had already stay as they were: {', '.join(map(str, there))}")
    return notes
