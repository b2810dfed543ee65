"""From a checkpoint to a model folder: weights as safetensors, and all that prediction needs beside them."""

import shutil
from pathlib import Path
from typing import Any

from bmfm_pipeline.storage import write_json_atomic
from bmfm_pipeline.training.gene_tables import keep_tables
from bmfm_pipeline.training.spec import TrainSpec


def export_model(run, spec: TrainSpec, module, data, keeping) -> dict[str, Any]:
    """Write run_dir/model from the best weights (the last ones when there was no validation) and read it back; returns the summary."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from bmfm_pipeline.models import load_model

    disable_progress_bar()

    best = keeping.best_path or keeping.last
    state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}
    module.model.to("cpu").load_state_dict(weights, strict=True)
    folder = Path(spec.run_dir) / "model"
    shutil.rmtree(folder, ignore_errors=True)
    module.model.save_pretrained(folder)
    source = Path(spec.data)
    shutil.copytree(source / "tokenizers", folder / "tokenizers")
    for name in ("label_dict.json", "transforms.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    plain = run.model_dump(mode="json")
    keep_tables(run, folder)
    batching = data.builder.config
    plain["data_module"]["rda_transform"] = (
        batching.rda_transform
    )  # the number of reads, where it was taken from the training cells
    plain["values_from"] = batching.values_from
    names = ("fields", "label_columns", "data_module", "tokenizer", "seed", "dataset", "preset_used", "values_from")
    write_json_atomic(folder / "bmfm.json", {name: plain[name] for name in names})
    load_model(folder)  # strict: what was written is what was trained
    score = keeping.best_score if keeping.best_path is not None else None
    return {
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "best_validation_loss": score,
        "best_checkpoint": best.name,
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
