"""A published model as a folder to share: what loading and predicting need, and a card with its numbers. No place, no secret."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import CheckpointError, ConfigError, DataError, StorageError
from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    check_allowed,
    disk_errors,
    is_remote,
    list_artefacts,
    load_artefact,
    read_json,
    strip_userinfo,
    without_places,
    write_json_atomic,
)

FILES = (
    "config.json", "bmfm.json", "label_dict.json", "transforms.json", "calibration.json", "training.json", "preprocessing.json",
)  # fmt: skip
FOLDERS = ("tokenizers", "gene_tables", "adapter")
# What a licence is called on Hugging Face, such as apache-2.0 or cc-by-4.0.
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def export_folder(
    model: str,
    output: str | Path,
    *,
    evaluation: str | None = None,
    license: str | None = None,
    name: str | None = None,
    workspace: str | None = None,
) -> dict[str, Any]:
    """Write a model artefact as a folder that `AutoModel.from_pretrained`, `bmfm predict` and `HfApi.upload_folder` take.

    `evaluation` is the artefact of a test of this model; without it the newest one in the workspace is taken, where there is one.
    `license` and `name` go into the card. The folder must not be there, or be empty; it appears when it is complete.
    Returns {output, model, evaluation, files, bytes}. Raises CheckpointError, ConfigError, DataError or StorageError.
    """
    if license is not None and not _LICENCE.fullmatch(license):
        raise ConfigError(
            f"--license {license}: a licence is named by its short name in small letters, such as apache-2.0, mit or cc-by-4.0"
        )
    check_allowed(output, "--output")
    if is_remote(output):
        raise ConfigError(
            f"--output {strip_userinfo(str(output))}: the folder is written on this machine; name a local one, and copy it from there"
        )
    artefact = _model(model)
    tested = _evaluation(evaluation, artefact, Workspace(workspace))
    output = Path(output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StorageError(f"{output}: is there already and not empty; name a new folder, or remove it")
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            _write(staging, artefact, tested, license, name)
            staging.chmod(0o755)
            if output.exists():
                output.rmdir()
            os.replace(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    written = sorted(path for path in output.rglob("*") if path.is_file())
    return {
        "output": str(output),
        "model": strip_userinfo(artefact.uri),
        "evaluation": tested and strip_userinfo(tested.uri),
        "files": [str(path.relative_to(output)) for path in written],
        "bytes": sum(path.stat().st_size for path in written),
    }


def _model(uri: str) -> Artefact:
    artefact = load_artefact(uri)
    if "config.json" not in artefact.files or "bmfm.json" not in artefact.files:
        raise CheckpointError(
            f"{strip_userinfo(artefact.uri)}: is a {artefact.stage} artefact, not a model; name what `bmfm finetune` or `bmfm pretrain` published"
        )
    return artefact


def _evaluation(uri: str | None, model: Artefact, workspace: Workspace) -> Artefact | None:
    if uri is None:
        found = (
            one
            for one in list_artefacts(workspace, "evaluate")
            # On its own test cells: other data are named, with --evaluation.
            if one.inputs.get("model", {}).get("id") == model.key and "training_data" not in one.inputs
        )
        return next(found, None)
    artefact = load_artefact(uri)
    if "evaluation.json" not in artefact.files:
        raise DataError(f"{strip_userinfo(artefact.uri)}: is a {artefact.stage} artefact, not an evaluation")
    tested = artefact.inputs.get("model", {}).get("id")
    if tested != model.key:
        raise DataError(
            f"{strip_userinfo(artefact.uri)}: tests another model (key {str(tested)[:12]}) than the one to export (key {model.key[:12]}), so its "
            "numbers are not those of this model"
        )
    return artefact


def _write(folder: Path, model: Artefact, tested: Artefact | None, license: str | None, name: str | None) -> None:
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    import bmfm_pipeline.models  # noqa: F401 - makes the types known
    from bmfm_pipeline.evaluation.card import numbers_of_test
    from bmfm_pipeline.training.model_card import write_card

    source = model.local()
    for file in FILES:
        if (source / file).exists():
            shutil.copyfile(source / file, folder / file)
    for file in source.glob("model*.safetensors*"):
        shutil.copyfile(file, folder / file.name)
    for inner in FOLDERS:
        if (source / inner).is_dir():
            shutil.copytree(source / inner, folder / inner, copy_function=shutil.copyfile)
    if tested is not None:
        shutil.copyfile(tested.local() / "metrics.json", folder / "metrics.json")
    _clean(folder)
    write_card(
        folder, folder, tests=None if tested is None else numbers_of_test(tested.local()), license=license, name=name
    )
    disable_progress_bar()
    AutoModel.from_pretrained(folder)  # strict: what was written can be read


def _clean(folder: Path) -> None:
    """Take places out of files that older versions wrote with them."""
    settings = read_json(folder / "bmfm.json")
    for section in ("fields", "data_module", "tokenizer"):
        settings[section] = without_places(settings[section])
    write_json_atomic(folder / "bmfm.json", settings)
    config = read_json(folder / "config.json")
    config["fields"] = without_places(config["fields"])
    config.pop("_name_or_path", None)
    config["checkpoint"] = None
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
