"""Records beside the weights of a model: what it learned from, and how. No place of this machine and no secret is in them."""

import json
from pathlib import Path
from typing import Any

from bmfm_pipeline import __version__
from bmfm_pipeline.data.splits import split_sentence
from bmfm_pipeline.storage import read_json, without_places, write_json_atomic
from bmfm_pipeline.tracking import redact

TRAINING, PREPROCESSING = "training.json", "preprocessing.json"


def write_records(
    folder: Path, *, name: str, stage: str, config: dict[str, Any], inputs: dict, summary: dict, data: Path
) -> None:
    """Write training.json and preprocessing.json into a model folder: what it learned from, and how.

    `config` is the resolved configuration, `inputs` those of the training job, `summary` the numbers of the training, `data` the folder
    of the preprocessed cells.
    """
    history = folder / "history.jsonl"
    start = inputs.get("checkpoint")
    record = {
        "name": name,
        "stage": stage,
        "started_from": None if start is None else {"stage": start.get("stage") or "model", "id": start["id"]},
        "seed": config["seed"]["seed_value"],
        "losses": config["trainer"]["losses"],
        "trainer": {key: value for key, value in config["trainer"].items() if key != "losses"},
        "batch_size": config["data_module"]["batch_size"],
        "max_length": config["data_module"]["max_length"],
        "freeze_layers": config["task"]["freeze_layers"],
        "summary": summary,
        "validation": _validation(history, summary),
        "notes": config.get("notes", []),
        "versions": _versions(),
    }
    write_json_atomic(folder / TRAINING, redact(without_places(record)))
    report = read_json(data / "report.json") if (data / "report.json").exists() else {}
    split = read_json(data / "split.json")
    kept = ("steps", "dropped_cells", "notes", "share_of_counts", "labels")
    prepared = {key: report[key] for key in kept if key in report}
    prepared["check"] = {key: value for key, value in report.get("check", {}).items() if not key.endswith("_examples")}
    prepared["vocabulary"] = report.get("vocabulary", {})
    prepared["split"] = {"counts": split["counts"], "made": split_sentence(split), "hash": split["hash"]}
    write_json_atomic(folder / PREPROCESSING, redact(without_places(prepared)))


def _validation(history: Path, summary: dict[str, Any]) -> dict[str, float]:
    """The validation numbers of the weights that are published: those of the best checkpoint, else the last ones."""
    if not history.exists():
        return {}
    entries = [json.loads(line) for line in history.read_text().splitlines()]
    entries = [entry for entry in entries if "validation/loss" in entry]
    chosen = next(
        (entry for entry in entries if entry["step"] == summary.get("best_step")), entries[-1] if entries else {}
    )
    return {key.removeprefix("validation/"): value for key, value in chosen.items() if key.startswith("validation/")}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"bmfm_pipeline": __version__, **{name: version(name) for name in ("torch", "transformers")}}
