"""h5mu files: one modality of them, which is laid out as an h5ad is."""

from pathlib import Path
from typing import Any

from bmfm_pipeline.config.reading import PLACE, Reading
from bmfm_pipeline.data.sources.tables import read_table
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import check_room

PARTS = ("X", "layers", "raw", "obs", "var")
DEFAULT = "rna"


def write(path: Path, target: Path, reading: Reading) -> dict[str, Any]:
    """The modality `reading.modality`, with the columns of obs that the whole file has beside its own; see `convert`."""
    import h5py
    from anndata.io import write_elem

    from bmfm_pipeline.data.sources.converting.writing import with_text_columns

    try:
        with h5py.File(path, "r") as stored, h5py.File(target, "w") as file:
            group = _modality(path, stored, reading.modality)
            check_room(target.parent, path.stat().st_size)
            for name in PARTS:
                if name in group:
                    group.copy(group[name], file, name)
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            for name in ("uns", "obsm", "varm", "obsp", "varp", *(["layers"] if "layers" not in file else [])):
                write_elem(file, name, {})
            obs = read_table(path, file, "obs")
            shared = read_table(path, stored, "obs") if "obs" in stored else obs[[]]
            # Columns of modalities are repeated as MODALITY:COLUMN.
            fresh = [name for name in shared.columns if name not in obs and ":" not in str(name)]
            if fresh and shared.index.is_unique:
                for name in fresh:
                    obs[name] = shared[name].reindex(obs.index)
                del file["obs"]
                write_elem(file, "obs", with_text_columns(obs))
            genes = len(read_table(path, file, "var"))
            left = [name for name in stored["mod"] if stored["mod"][name] != group]
            notes = [f"other modalities are left out: {', '.join(left)}"] if left else []
            return {"cells": len(obs), "genes": genes, "values": _stored(file), "notes": notes}
    except OSError as error:
        raise DataError(f"{path}: could not be read to its end ({error}); fetch it again") from None


def _modality(path: Path, stored, asked: str | None):
    there = list(stored["mod"])
    name = asked or DEFAULT
    if name not in there:
        same = [entry for entry in there if entry.lower() == name.lower()]
        if asked or len(same) != 1:
            raise ConfigError(
                f"{PLACE}.reading.modality: {path} has no modality '{name}'; it has {', '.join(there) or 'none'}: name one of them"
            )
        name = same[0]
    group = stored["mod"][name]
    if absent := [part for part in ("X", "obs", "var") if part not in group]:
        raise DataError(f"{path}: its modality {name} has no {', '.join(absent)}; it is damaged")
    return group


def _stored(file) -> int:
    node = file["X"]
    return int(node["data"].shape[0]) if "data" in getattr(node, "keys", tuple)() else int(node.size)
