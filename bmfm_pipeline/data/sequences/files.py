"""Which files of a folder are train, dev and test."""

from pathlib import Path

from bmfm_pipeline.config.sequences import ENDINGS
from bmfm_pipeline.errors import DataError

_SEPARATORS = {".tsv": "\t", ".txt": "\t"}
_WRONG = {"\t": "tabs", ";": "semicolons", "|": "bars"}
SPLITS = {"train": ("train",), "dev": ("dev", "val", "valid", "validation"), "test": ("test",)}


def holds_sequences(folder: str | Path) -> bool:
    """Whether a folder holds train, dev or test as a table."""
    return Path(folder).is_dir() and bool(in_folder(Path(folder)))


def in_folder(folder: Path) -> dict[str, Path]:
    """{split: file} of a folder; DataError when two files are the same split."""
    found: dict[str, Path] = {}
    for split, names in SPLITS.items():
        there = [folder / f"{name}{ending}" for name in names for ending in ENDINGS]
        there = [path for path in there if path.is_file()]
        if len(there) > 1:
            raise DataError(f"{folder}: {', '.join(path.name for path in there)} are all {split}; keep one of them")
        if there:
            found[split] = there[0]
    return found


def files_of(path: Path) -> dict[str, Path]:
    """{split: file} of a folder, {"": file} of a table. DataError where there is none."""
    if path.is_dir():
        if not (files := in_folder(path)):
            there = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            raise DataError(f"{path}: holds no train, dev or test as {', '.join(ENDINGS)}; it holds {there}")
        return files
    if path.is_file():
        return {"": path}
    raise DataError(f"{path}: no such file or folder")


def is_parquet(path: Path) -> bool:
    """Whether a table is parquet, by its name."""
    return path.suffix == ".parquet"


def separator_of(path: Path) -> str:
    """What separates the columns of a text table, by its name."""
    return _SEPARATORS.get(Path(path.name.removesuffix(".gz")).suffix, ",")


def header(path: Path) -> list[str]:
    """Names of the columns; refuses a table that was written with another separator, or none."""
    if is_parquet(path):
        import pyarrow.parquet as pq

        return list(pq.read_schema(path).names)
    import gzip

    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            line = lines.readline().rstrip("\r\n")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    if not line.strip():
        raise DataError(f"{path}: is empty; a header such as sequence,label is needed")
    separator = separator_of(path)
    names = [name.strip().strip('"') for name in line.split(separator)]
    if len(names) == 1:
        other = next((sign for sign in (*_WRONG, ",") if sign != separator and sign in line), None)
        if other:
            found = _WRONG.get(other, "commas")
            ending = "name it .tsv" if other == "\t" else "write it with commas" if separator == "," else "name it .csv"
            raise DataError(f"{path}: its columns are separated by {found}; {ending}")
    if set(line.upper()) <= set("ACGTUN\"', \t0123456789.-") and len(names[0]) > 15:
        raise DataError(
            f"{path}: begins with a sequence; a first line with names of columns is needed, such as sequence,label"
        )
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a column name is there twice in {', '.join(names)}")
    return names
