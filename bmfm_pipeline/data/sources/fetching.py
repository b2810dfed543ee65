"""A dataset of the catalogue from the web: its files fetched, verified and made one h5ad, with a record of what came from where."""

import datetime
import gzip
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import DatasetEntry
from bmfm_pipeline.errors import ConfigError, DataError, StorageError
from bmfm_pipeline.storage import hash_file, read_json, strip_userinfo, write_json_atomic
from bmfm_pipeline.storage.downloads import fetch

SHOWN = 5
# (what is worked on, done, in all or None)
Progress = Callable[[str, int, int | None], None]


def download_dataset(
    entry: DatasetEntry,
    folder: Path | None = None,
    *,
    urls: Mapping[str, str] | None = None,
    sums: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the source file of `entry` below `folder` (None: where it is looked for); `urls` and `sums` replace those of the entry.

    What is fetched lies in `downloads` beside the h5ad and is used again. `NAME.provenance.json` beside it records addresses and
    sha256 of all files at their first download; content that differs from it is refused.

    Returns {"file", "made" (False when it was there), and for a file just made its counts}. Raises ConfigError for a dataset or a
    file name without a download, StorageError for what cannot be fetched or has the wrong sum, DataError for files that do not
    fit together.
    """
    tell = on_progress or (lambda what, done, total: None)
    download = entry.source.download
    if download is None:
        raise ConfigError(f"{entry.name}: {_no_download(entry)}")
    for option, given in (("url", urls), ("sha256", sums)):
        for name in given or {}:
            if name not in download.files:
                raise ConfigError(
                    f"--{option} {name}=...: {entry.name} has no such file; it has {', '.join(download.files)}"
                )
    target = _target(entry, folder)
    if target.exists():
        return {"file": str(target), "made": False}
    record = target.with_name(f"{target.stem}.provenance.json")
    paths, sources = _fetch_all(entry, target, record, dict(urls or {}), dict(sums or {}), tell)
    if download.format == "tenx_labels":
        made = build_tenx(
            paths["matrix"], paths["labels"], target, entry, lambda done, total: tell("build", done, total)
        )
    else:
        made = _check_h5ad(target)
    # Recorded only now: a sum that did not make a dataset, such as a login page's, is no sum to hold later downloads against.
    about = {"dataset": entry.name, "file": target.name, "sha256": hash_file(target), "sources": sources}
    write_json_atomic(record, {**about, **made})
    return {"file": str(target), "made": True, "provenance": str(record), **made}


def _target(entry: DatasetEntry, folder: Path | None) -> Path:
    if entry.source.env is None:
        if folder is not None:
            raise ConfigError(f"--to: {entry.name} lies at {entry.source.file}, as its YAML file says; leave --to out")
        return Path(entry.source.file)
    chosen = folder or entry.data_folder
    if chosen is None:
        raise ConfigError(
            f"{entry.source.env} names a remote place, and a download goes to a local folder: add --to FOLDER"
        )
    return Path(chosen).expanduser().absolute() / entry.source.file


def _no_download(entry: DatasetEntry) -> str:
    if entry.source.builder:
        return f"needs no download: `bmfm run {entry.name}` builds it from an installed package"
    where = (
        f"; put the file below the folder that {entry.source.env} names, as {entry.source.file}"
        if entry.source.env
        else ""
    )
    return f"has no download: its file is fetched by hand{f' from {entry.homepage}' if entry.homepage else ''}{where}"


def _fetch_all(
    entry: DatasetEntry, target: Path, record: Path, urls: dict[str, str], sums: dict[str, str], tell: Progress
) -> tuple[dict[str, Path], dict[str, Any]]:
    known = read_json(record)["sources"] if record.exists() else {}
    paths = {}
    for name, file in entry.source.download.files.items():
        url = urls.get(name, file.url)
        stated = sums.get(name) or file.sha256
        recorded = known.get(name, {}).get("sha256")
        place = target if entry.source.download.format == "h5ad" else target.parent / "downloads" / _base(url, name)
        try:
            fetch(
                url,
                place,
                sha256=stated or recorded,
                on_progress=lambda done, total, name=name: tell(name, done, total),
            )
        except StorageError as error:
            if recorded and not stated and recorded in str(error):
                raise StorageError(
                    f"{error}. The expected sum was recorded at the first download, in {record}: `--sha256 {name}=SUM` accepts another"
                ) from None
            raise
        paths[name] = place
        known[name] = {
            "url": strip_userinfo(url),
            "sha256": hash_file(place),
            "bytes": place.stat().st_size,
            "recorded": known.get(name, {}).get("recorded")
            or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    return paths, known


def _base(url: str, name: str) -> str:
    return url.split("?")[0].rstrip("/").rsplit("/", 1)[-1] or name


def _check_h5ad(path: Path) -> dict[str, Any]:
    from bmfm_pipeline.data.sources import open_source

    try:
        cells, genes = open_source(path).shape
    except DataError as error:
        refused = path.with_name(path.name + ".refused")
        path.rename(refused)
        raise DataError(f"what was downloaded is no h5ad file, and is kept as {refused}: {error}") from None
    return {"cells": cells, "genes": genes}


def build_tenx(
    archive: Path,
    labels: Path,
    target: Path,
    entry: DatasetEntry,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `target` from a 10x archive and a file of one label a cell, in the order of the barcodes.

    Both must have as many cells as `entry` says, and only labels that it expects. Returns the counts of `tenx.write_h5ad` and
    "labels", cells by label. Raises DataError.
    """
    from bmfm_pipeline.data.sources.tenx import write_h5ad

    column = entry.source.download.label_column
    given = _read_labels(labels)
    counts = Counter(given)
    expected = entry.expected_labels.get(column)
    if expected and (strangers := [name for name in counts if name not in expected]):
        raise DataError(
            f"{labels}: {len(strangers)} labels are not those of {entry.name}: {', '.join(strangers[:SHOWN])}; "
            f"expected {', '.join(expected)}"
        )

    def columns(barcodes: np.ndarray) -> dict[str, Any]:
        import pandas as pd

        for what, found in ((f"{archive}: holds", len(barcodes)), (f"{labels}: labels", len(given))):
            if entry.cells is not None and found != entry.cells:
                raise DataError(
                    f"{what} {found:,} cells, and {entry.name} has {entry.cells:,}; it is another file, or cut short"
                )
        if len(given) != len(barcodes):
            raise DataError(
                f"{labels}: has {len(given):,} labels for the {len(barcodes):,} cells of {archive}; there must be one label a cell"
            )
        return {column: pd.Categorical(given, categories=sorted(counts))}

    made = write_h5ad(archive, target, columns, on_progress)
    return {**made, "labels": {name: counts[name] for name in sorted(counts)}}


def _read_labels(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
            found = [line.strip() for line in lines]
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is no text of one label a line ({error}); remove it and fetch it again") from None
    while found and not found[-1]:
        found.pop()
    if "" in found:
        raise DataError(f"{path}, line {found.index('') + 1}: has no label; every cell needs one")
    return found
