"""The tables of gene names that a run uses: found by name, path or address, fetched, and known by their content. Light to import."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.config.gene_names import DOWNLOADED
from bmfm_pipeline.errors import ConfigError, DataError, StorageError
from bmfm_pipeline.storage import content_hash, copy_atomic, hash_file, localise, strip_userinfo, write_json_atomic
from bmfm_pipeline.storage.cache import cache_dir

HGNC_URL = "https://storage.googleapis.com/public-download-files/hgnc/tsv/tsv/hgnc_complete_set.txt"
KEY = "data_module.transform_kwargs.gene_names"


def downloaded_table() -> Path:
    """Where `bmfm genes download` puts the table of HGNC."""
    return cache_dir() / "genes" / "hgnc_complete_set.txt"


def fetch_gene_table(url: str = HGNC_URL, sha256: str | None = None, on_progress=None) -> dict[str, Any]:
    """Download the table of HGNC as the one that `table: hgnc` names, and note where it came from and its checksum beside it.

    A table that was there stays under a name with its checksum, so that a config can go on naming it. Raises StorageError
    when it cannot be fetched or has another checksum, DataError when what arrives is no such table; the one there is kept.
    """
    from bmfm_pipeline.storage.downloads import fetch
    from bmfm_pipeline.vocabulary.gene_table import read_hgnc

    target = downloaded_table()
    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    try:
        fetch(url, fresh, sha256=sha256, on_progress=on_progress)
        genes = len(read_hgnc(fresh))
        found = hash_file(fresh)
        kept = target.with_name(f"{target.stem}-{found[:12]}{target.suffix}")
        copy_atomic(fresh, kept)
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)
    noted = {"file": str(target), "kept_as": str(kept), "url": strip_userinfo(url), "sha256": found, "genes": genes}
    noted["fetched"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_json_atomic(target.with_suffix(".json"), noted)
    return noted


def gene_table_uri(run: RunConfig) -> str | None:
    """The gene table that the config names: a path or address; ConfigError when the downloaded one is named and is not there."""
    named = run.data_module.transform_kwargs.gene_names.table
    if named is None:
        return None
    if named != DOWNLOADED:
        return require_path(named, f"{KEY}.table")
    path = downloaded_table()
    if not path.exists():
        raise ConfigError(
            f"{KEY}.table is {DOWNLOADED}, but {path} is not there; run `bmfm genes download`, or name a file: {KEY}.table=PATH"
        )
    return str(path)


def orthologs_uri(run: RunConfig) -> str | None:
    named = run.data_module.transform_kwargs.gene_names.orthologs
    return None if named is None else require_path(named, f"{KEY}.orthologs")


def gene_inputs(run: RunConfig, memo) -> dict[str, dict[str, Any]]:
    """The tables of a run by role, each with the hash of its content."""
    inputs = {}
    for role, uri in (("gene_table", gene_table_uri(run)), ("orthologs", orthologs_uri(run))):
        if uri is not None:
            try:
                inputs[role] = {"id": content_hash(uri, memo), "uri": strip_userinfo(uri)}
            except StorageError as error:
                key = f"{KEY}.{'table' if role == 'gene_table' else role}"
                raise DataError(f"{key}: {error}") from None
    return inputs


def local_gene_table(run: RunConfig) -> Path | None:
    """The gene table of a run on this machine."""
    uri = gene_table_uri(run)
    return None if uri is None else localise(uri)
