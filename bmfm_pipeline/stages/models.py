"""Which weights a stage starts from: an artefact, a model folder, `latest`, or none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import require_path
from bmfm_pipeline.errors import CheckpointError, StorageError
from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    content_hash,
    is_remote,
    list_artefacts,
    load_artefact,
    strip_userinfo,
)


@dataclass(frozen=True)
class CheckpointSource:
    """A model folder by address and content."""

    uri: str
    id: str
    stage: str = ""

    def as_input(self) -> dict[str, Any]:
        return {"id": self.id, "uri": strip_userinfo(self.uri), "stage": self.stage}


def find_checkpoint(
    named: str | None, workspace: Workspace, dataset: str, stage: str = "pretrain"
) -> CheckpointSource | None:
    """The checkpoint a config names: None for from scratch, `latest` for the newest `stage` artefact of this dataset.

    Raises CheckpointError when it does not exist or is no model folder.
    """
    if named is None:
        return None
    if named == "latest":
        for artefact in list_artefacts(workspace, stage):
            if artefact.summary.get("name") == dataset:
                return _of(artefact)
        raise CheckpointError(
            f"checkpoint 'latest': no {stage} artefact of {dataset} in {workspace.uri}; run `bmfm {stage} {dataset}` first"
        )
    path = require_path(named, "checkpoint")
    try:
        return _of(load_artefact(path))
    except StorageError:
        pass
    folder = Path(path)
    if not is_remote(path) and folder.is_file():
        raise CheckpointError(
            f"{path}: is a single file; name a model folder (config.json, model.safetensors, tokenizers/), as a training stage publishes it"
        )
    if not is_remote(path) and not (folder / "config.json").exists():
        what = "does not exist" if not folder.exists() else "holds no config.json"
        raise CheckpointError(
            f"{path}: {what}; name a published model artefact, a folder written by save_pretrained, or 'latest'"
        )
    return CheckpointSource(uri=path, id=content_hash(path, workspace.memo))


def _of(artefact: Artefact) -> CheckpointSource:
    if "config.json" not in artefact.files:
        raise CheckpointError(f"{artefact.uri}: is a {artefact.stage} artefact, not a model")
    return CheckpointSource(uri=artefact.uri, id=artefact.key, stage=artefact.stage)
