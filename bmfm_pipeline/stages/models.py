"""Which weights a stage starts from: an artefact, a model folder, a .ckpt file, a repository of the hub, `latest`, or none."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.config.sections import TokenizerConfig
from bmfm_pipeline.errors import CheckpointError, StorageError
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    content_hash,
    exists,
    hash_json,
    is_remote,
    join_uri,
    list_artefacts,
    load_artefact,
    strip_userinfo,
)
from bmfm_pipeline.storage.checkpoint_files import checkpoint_hash, fetch_checkpoint, is_checkpoint_file, neighbours
from bmfm_pipeline.storage.hub import fetch_tokenizers, read_hub_name, resolve_commit

logger = logging.getLogger(__name__)
# Words for an artefact of this workspace: the newest one, with its best weights or with those that training ended with.
NEWEST = ("latest", "best", "last")


@dataclass(frozen=True)
class CheckpointSource:
    """Weights by address and content.

    `stage` is that of the artefact that they are. `artefact`, `origin` and `data` are address, stage and key of the data of the artefact
    that they are or lie in, such as a checkpoint of its training. All are empty for weights from elsewhere.
    """

    uri: str
    id: str
    stage: str = ""
    artefact: str = ""
    origin: str = ""
    data: str = ""

    def as_input(self) -> dict[str, Any]:
        return {"id": self.id, "uri": strip_userinfo(self.uri), "stage": self.stage}

    def tokenizers(self) -> str | None:
        """Where the vocabularies that belong to the weights lie; None where there are none. Fetches a repository of the hub."""
        if is_checkpoint_file(self.uri):
            folder = neighbours(fetch_checkpoint(self.uri))[1]
            return None if folder is None else str(folder)
        if (name := read_hub_name(self.uri)) is not None:
            folder = fetch_tokenizers(name)
            return None if folder is None else str(folder)
        place = join_uri(self.uri, "tokenizers")
        return place if exists(place) else None


def find_checkpoint(
    named: str | None, workspace: Workspace, dataset: str | None, stage: str = "pretrain"
) -> CheckpointSource | None:
    """The checkpoint a config names: None for from scratch, `latest` (or `best`) for the newest `stage` artefact of this dataset,
    `last` for its weights at the end of training; None as `dataset` stands for any.

    A repository of the hub is resolved to a commit. Raises CheckpointError when there is no such thing or it is no model.
    """
    if named is None:
        return None
    if named in NEWEST:
        return _newest(named, workspace, dataset, stage)
    path = require_path(named, "checkpoint")
    if (name := read_hub_name(path)) is not None:
        exact = resolve_commit(name)
        return CheckpointSource(uri=str(exact), id=exact.revision)
    if is_checkpoint_file(path):
        return _file_of(path, checkpoint_hash(fetch_checkpoint(path), workspace.memo.hash_file))
    try:
        return _of(load_artefact(path))
    except StorageError:
        pass
    folder = Path(path)
    if not is_remote(path) and folder.is_file():
        raise CheckpointError(
            f"{path}: is a single file; name a model folder (config.json, model.safetensors, tokenizers/), as a training stage publishes "
            "it, or a .ckpt file"
        )
    if not is_remote(path) and not (folder / "config.json").exists():
        what = "does not exist" if not folder.exists() else "holds no config.json"
        raise CheckpointError(
            f"{path}: {what}; name a published model artefact, a folder written by save_pretrained, a .ckpt file, a repository of the hub "
            "(org/name), or 'latest'"
        )
    return CheckpointSource(uri=path, id=content_hash(path, workspace.memo))


def _newest(word: str, workspace: Workspace, dataset: str | None, stage: str) -> CheckpointSource:
    found = (a for a in list_artefacts(workspace, stage) if dataset is None or a.summary.get("name") == dataset)
    artefact = next(
        (a for a in found if not a.summary.get("variant")), None
    )  # one made as a control is nobody's newest model
    if artefact is None:
        raise CheckpointError(
            f"checkpoint '{word}': no {stage} artefact {f'of {dataset} ' if dataset else ''}in {workspace.uri}; run "
            f"`bmfm {stage} {dataset or 'DATASET'}` first"
        )
    if word != "last":
        return _of(artefact)
    name = "checkpoints/last.ckpt"
    if name not in artefact.files:
        raise CheckpointError(f"checkpoint 'last': {artefact.uri} holds no {name}; 'best' names its best weights")
    key = hash_json([artefact.key, artefact.files[name]["sha256"]])
    return CheckpointSource(artefact.file(name), key, "", artefact.uri, artefact.stage, _data_of(artefact))


def _file_of(path: str, key: str) -> CheckpointSource:
    """A .ckpt file, which may be one of those that a training of ours has published with its model."""
    place = path.rpartition("/")[0].removesuffix("/checkpoints")
    try:
        artefact = load_artefact(place)
    except StorageError:
        return CheckpointSource(path, key)
    return CheckpointSource(path, key, "", artefact.uri, artefact.stage, _data_of(artefact))


def _data_of(artefact: Artefact) -> str:
    return artefact.inputs.get("data", {}).get("id", "")


def _of(artefact: Artefact) -> CheckpointSource:
    if "config.json" not in artefact.files:
        raise CheckpointError(f"{artefact.uri}: is a {artefact.stage} artefact, not a model")
    stage = artefact.stage
    return CheckpointSource(artefact.uri, artefact.key, stage, artefact.uri, stage, _data_of(artefact))


def with_tokenizer_of(run: RunConfig, source: CheckpointSource | None) -> RunConfig:
    """The run with the vocabularies stored with the weights it starts from, where its own is left to the data."""
    if source is None or run.tokenizer.identifier != TokenizerConfig().identifier:
        return run
    place = source.tokenizers()
    if place is None:
        return run
    run = run.model_copy(update={"tokenizer": run.tokenizer.model_copy(update={"identifier": place})})
    run.note(
        f"tokenizer: the vocabularies stored with {strip_userinfo(source.uri)} are used, for the model knows no other tokens"
    )
    return run


def with_policy(run: RunConfig, stage: str, source: CheckpointSource | Job | None) -> RunConfig:
    """The run with `model.load` settled: between pretraining and fine-tuning of this pipeline heads change, elsewhere they must not."""
    if source is None:
        policy = None
        if run.model.load is not None:
            run.note(f"model.load {run.model.load} has no effect: no checkpoint is named")
    elif run.model.load is not None:
        return run
    elif stage == "finetune" and "pretrain" in (source.stage, getattr(source, "origin", "")):
        policy = "backbone"
        run.note("model.load: backbone, for the checkpoint is a pretrained model: heads that it lacks start fresh")
    else:
        policy = "strict"
    return run.model_copy(update={"model": run.model.model_copy(update={"load": policy})})
