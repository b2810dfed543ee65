"""Datasets of many files, one a study: their own keys under dataset_kwargs, as PanglaoDB's data module has them, in today's words."""

from typing import Any

from bmfm_pipeline.config.catalogue import DatasetEntry
from bmfm_pipeline.config.environment import expand
from bmfm_pipeline.errors import ConfigError

PLACE = "data_module.dataset_kwargs"
# Folders and flags of a layout that converted and processed files no longer have: they lie in the workspace.
NOT_FOLLOWED = ("processed_dir_name", "convert_rdata_to_h5ad", "transform_datasets")


def settle_studies(values: dict[str, Any], entry: DatasetEntry, wrote) -> None:
    """Move the keys of a dataset of studies to where they are read, in place; `wrote(key)` tells what a person wrote."""
    module = values["data_module"]
    transform, dataset = module["transform_kwargs"], module["dataset_kwargs"]
    notes = values.setdefault("notes", [])
    _move(dataset, "data_dir", module, "data_dir", "data_module.data_dir", wrote)
    _move(dataset, "num_workers", transform, "num_workers", "data_module.transform_kwargs.num_workers", wrote)
    _move(dataset, "pre_transforms", transform, "transforms", "data_module.transform_kwargs.transforms", wrote)
    files = dict(transform.get("files") or {})
    _move(dataset, "data_info_path", files, "table", "data_module.transform_kwargs.files.table", wrote)
    asked = wrote(f"{PLACE}.filter_query") or wrote("data_module.transform_kwargs.files.query")
    _move(dataset, "filter_query", files, "query", "data_module.transform_kwargs.files.query", wrote)
    if not asked:
        files["query"] = entry.files.query
    files.setdefault("name", entry.files.name)
    if not files.get("table"):
        files["table"] = expand(entry.files.table)
    transform["files"] = files
    for name in NOT_FOLLOWED:
        if dataset.pop(name, None) not in (None, False, "processed"):
            notes.append(f"{PLACE}.{name} changes nothing: files are converted and prepared in the workspace, once")
    if not wrote("data_module.transform_kwargs.cell_names"):
        transform["cell_names"] = "prefix"  # barcodes of different studies are often the same
    given = transform.get("processed_data_source") or dataset.get("processed_data_source")
    if module.get("transform_datasets") is False and not given:
        module["transform_datasets"] = True
        notes.append(
            f"data_module.transform_datasets is false, and no processed file is named: the files of {entry.name} are prepared in the workspace"
        )


def add_post_transforms(values: dict[str, Any]) -> None:
    """Steps that follow once all files are one: they end the chain, which sees all files as one from its start."""
    module = values["data_module"]
    after = module["dataset_kwargs"].pop("post_transforms", None)
    if after:
        module["transform_kwargs"]["transforms"] = [*module["transform_kwargs"]["transforms"], *after]


def _move(source: dict[str, Any], name: str, target: dict[str, Any], to: str, place: str, wrote) -> None:
    value = source.pop(name, None)
    if value is None:
        return
    if wrote(place) and target.get(to) not in (None, value):
        raise ConfigError(f"{PLACE}.{name} and {place} are both set, to different values; keep one of them")
    target[to] = value
