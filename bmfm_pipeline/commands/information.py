"""`bmfm doctor`: what a run would meet on this machine."""

import argparse
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bmfm_pipeline.config import find_accelerator
from bmfm_pipeline.storage import Workspace, strip_userinfo

LIBRARIES = ("torch", "pytorch-lightning", "transformers", "anndata", "scanpy", "prefect", "mlflow")


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
