"""What kind of file holds cells: told by its name, and where that does not tell, by what lies in it."""

from pathlib import Path

from bmfm_pipeline.errors import DataError

# Endings in lower case, the longest first: what kind of file they stand for.
ENDINGS: dict[str, str] = {
    ".sparse.rdata": "rdata",
    ".h5ad": "h5ad",
    ".h5mu": "h5mu",
    ".loom": "loom",
    ".rdata": "rdata",
    ".rda": "rdata",
    ".rds": "rdata",
    ".csv.gz": "table",
    ".tsv.gz": "table",
    ".txt.gz": "table",
    ".csv": "table",
    ".tsv": "table",
    ".txt": "table",
    ".tar.gz": "tenx",
    ".tgz": "tenx",
    ".tar": "tenx",
    ".h5": "h5",
    ".soma": "soma",
}
# Kinds of which a folder may hold several as one dataset, in the order in which they are looked for.
OF_FOLDERS = ("h5ad", "rdata", "h5mu", "loom", "h5")
MATRIX = ("matrix.mtx", "matrix.mtx.gz")
SOMA = "__tiledb_group.tdb"
KINDS = "h5ad, 10x (folder, h5 or tar), loom, h5mu, RData, csv and tsv, SOMA"


def ending_of(name: str) -> str | None:
    """The ending by which a file is known, as it is spelt; None for another."""
    lower = str(name).rstrip("/").lower()
    return next((name[-len(end) :] for end in ENDINGS if lower.endswith(end)), None)


def format_of(address: str | Path) -> str | None:
    """The kind of a file or folder of cells, by its name, and of a local folder by what it holds; None for no such thing."""
    text = str(address).rstrip("/")
    path = Path(text)
    if path.is_dir():
        return folder_format(path)
    ending = ending_of(text)
    return None if ending is None else ENDINGS[ending.lower()]


def folder_format(folder: Path) -> str | None:
    """tenx or soma for a folder that is one dataset by itself; None for others."""
    if any((folder / name).is_file() for name in MATRIX):
        return "tenx"
    return "soma" if (folder / SOMA).exists() else None


def name_of_file(address: str) -> str:
    """The name of a file or folder without folders and ending."""
    base = str(address).rstrip("/").rsplit("/", 1)[-1]
    ending = ending_of(base)
    return base[: -len(ending)] if ending else base


def kind_of_hdf5(path: Path) -> str:
    """h5ad, h5 (10x Cell Ranger), loom or h5mu, by what an HDF5 file holds; DataError for something else."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            names = set(file)
            if {"obs", "var"} <= names:
                return "h5ad"
            if {"matrix", "row_attrs", "col_attrs"} <= names:
                return "loom"
            if "mod" in names:
                return "h5mu"
            groups = [file[name] for name in names if isinstance(file[name], h5py.Group)]
            if any({"barcodes", "data", "indices", "indptr"} <= set(group) for group in groups):
                return "h5"
    except OSError as error:
        raise DataError(f"{path}: is no readable HDF5 file, or is cut short ({error}); fetch it again") from None
    raise DataError(
        f"{path}: is an HDF5 file of no kind that is known here; it holds {', '.join(sorted(names)[:8]) or 'nothing'}. "
        f"Known are {KINDS}"
    )
