"""`bmfm datasets`, `bmfm data inspect`, `bmfm doctor`: what there is, before anything is run."""

import argparse
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import find_accelerator, list_entries
from bmfm_pipeline.storage import Workspace, strip_userinfo

LIBRARIES = ("torch", "pytorch-lightning", "transformers", "anndata", "scanpy", "prefect", "mlflow")


def datasets(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The catalogue, and whether each dataset's files are where its variable says."""
    rows = []
    for entry in list_entries():
        source = entry.source
        folder = os.environ.get(source.env or "")
        if source.builder:
            state = "ready"
        elif not folder:
            state = f"set {source.env} to the folder that holds {source.file}"
        else:
            state = "ready" if (Path(folder) / source.file).exists() else f"{folder}/{source.file} is missing"
        labels = [column.label_column_name for column in entry.label_columns]
        rows.append({"name": entry.name, "title": entry.title, "labels": labels, "state": state})
    if not arguments.json:
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            print(f"{row['name']:<{width}}  {row['title']}\n{'':<{width}}  {row['state']}")
    return rows


def data(arguments: argparse.Namespace) -> dict[str, Any]:
    """`bmfm data inspect FILE`: shape, values and obs columns of an h5ad, and the command that would use it."""
    from bmfm_pipeline.data.sources import open_source
    from bmfm_pipeline.data.sources.description import describe_file

    found = describe_file(open_source(arguments.file, arguments.layer))
    if not arguments.json:
        _show(found)
    return found


def _show(found: dict[str, Any]) -> None:
    print(
        f"{found['file']}: {found['cells']:,} cells x {found['genes']:,} genes, {found['matrix']} ({found['stored']})"
    )
    print(f"values     {found['values']}")
    print(f"genes      {', '.join(found['gene_examples'])}, ...")
    if found["layers"]:
        print(f"layers     {', '.join(found['layers'])}")
    print("obs columns")
    for column in found["obs"]:
        print(f"  {column['name']:<28} {column['what']}")
    for text in found["advice"]:
        print(text)


def doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a run would meet here: versions, processor, accelerator, memory, disk, workspace, MLflow."""
    from bmfm_pipeline.errors import StorageError
    from bmfm_pipeline.tracking import tracking_uri

    workspace = Workspace()
    try:
        workspace.check_writable()
        writable = "writable"
    except StorageError as error:
        writable = str(error)
    near = workspace.state_dir
    while not near.exists():
        near = near.parent
    found = {
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": find_accelerator() or "none: the laptop preset is used where no sizes are written",
        "free disk": f"{shutil.disk_usage(near).free / 2**30:.0f} GiB at {near}",
        "workspace": f"{strip_userinfo(workspace.uri)}: {writable}",
        "MLflow": strip_userinfo(tracking_uri(workspace.state_dir)),
        "Prefect": os.environ.get("PREFECT_API_URL") or "no server: started for the length of a run",
    }
    if not arguments.json:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {value}", file=sys.stdout)
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "NOT INSTALLED; run `make venv`"
