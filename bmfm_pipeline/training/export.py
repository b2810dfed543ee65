"""From a checkpoint to a model folder: weights as safetensors, and all that prediction needs beside them."""

import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.data.perturbations import MODEL_RECORD
from bmfm_pipeline.storage import without_places, write_json_atomic
from bmfm_pipeline.training.adapters import Adapted, merge_adapters, save_adapter
from bmfm_pipeline.training.averaging import averaged_weights
from bmfm_pipeline.training.gene_tables import keep_tables
from bmfm_pipeline.training.spec import TrainSpec


def export_model(run, spec: TrainSpec, module, data, keeping, adapted: Adapted | None = None) -> dict[str, Any]:
    """Write run_dir/model from the best weights (the last ones when there was no validation) and read it back; returns the summary.

    Adapters are written apart, in `adapter/`, and merged into the weights.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from bmfm_pipeline.models import load_model

    disable_progress_bar()

    best = keeping.best_path or keeping.last
    kept = torch.load(best, map_location="cpu", weights_only=True)
    state, best_step = averaged_weights(kept), int(kept["bmfm"]["step"])
    weights = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    module.model.to("cpu").load_state_dict(weights, strict=True)
    folder = Path(spec.run_dir) / "model"
    shutil.rmtree(folder, ignore_errors=True)
    if adapted is not None:
        save_adapter(module.model, folder / "adapter", adapted)
        merge_adapters(module.model)
    for entry in module.model.config.fields:
        if entry.get("pretrained_embedding"):  # the vectors are in the weights; the file is known by its name alone
            entry["pretrained_embedding"]["filename"] = without_places(entry["pretrained_embedding"]["filename"])
    module.model.save_pretrained(folder)
    source = Path(spec.data)
    shutil.copytree(source / "tokenizers", folder / "tokenizers")
    for name in ("label_dict.json", "transforms.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    plain = run.model_dump(mode="json")
    keep_tables(run, folder)
    if run.predicts_pairs:
        write_json_atomic(folder / MODEL_RECORD, data.prepared.perturbed.for_model())
    batching = data.builder.config
    plain["data_module"]["rda_transform"] = (
        batching.rda_transform
    )  # the number of reads, where it was taken from the training cells
    plain["values_from"] = batching.values_from
    names = ("fields", "label_columns", "data_module", "tokenizer", "seed", "dataset", "preset_used", "values_from")
    plain["pooling_method"] = plain["trainer"]["pooling_method"]
    stored = {name: plain[name] for name in (*names, "pooling_method")}
    for name in ("fields", "data_module", "tokenizer"):  # prediction reads none of the files that they name
        stored[name] = without_places(stored[name])
    write_json_atomic(folder / "bmfm.json", stored)
    load_model(folder)  # strict: what was written is what was trained
    score = keeping.best_score if keeping.best_path is not None else None
    return {
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "best_validation_loss": score,
        "best_checkpoint": best.name,
        "best_step": best_step,
        "train_cells": len(data.rows["train"]),
        "dev_cells": len(data.rows["dev"]),
        "unknown_genes": data.builder.report.unknown_genes,
        **_left_out(data.builder.report),
        "values_outside_vocabulary": int(data.builder.report.values_outside_vocabulary),
    }


def _left_out(report) -> dict[str, int]:
    """Genes that the run's own tables keep out of batches, where there are any."""
    names = ("genes_not_allowed", "genes_without_median", "genes_without_position")
    return {name: count for name in names if (count := getattr(report, name))}
