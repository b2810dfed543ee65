"""The last thing a fine-tuning does: how far the published weights' probabilities can be trusted, measured on dev cells."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmfm_pipeline.batching import choose_rows
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.models.heads import LabelHeads
from bmfm_pipeline.storage import write_json_atomic
from bmfm_pipeline.training.path_shares import blended, labels_with_shares, pick_share, store_shares
from bmfm_pipeline.training.temperature import (
    CALIBRATION,
    confidence_of,
    coverage_points,
    fit_temperature,
    pick_threshold,
    scaled_probabilities,
)

# One number per label is known well from far fewer; more would only take time.
MOST_CELLS = 20_000


def calibrate(
    run: RunConfig, data, folder: Path, go_on: Callable[[], bool], note: Callable[[str], None]
) -> dict[str, Any] | None:
    """Fit a temperature per label of classes to dev cells and write calibration.json into the model folder `folder`.

    {label: {temperature, n, nll_before, nll_after, unknown: {target_accuracy, threshold, share, accuracy}, coverage: [points]}}, the
    last two at that temperature. `data` is the data module, whose dev cells are read as in validation; `go_on` is asked before every
    batch, and None is returned, with nothing written, when it says no. Run by one process, on the weights as they are published.
    """
    heads = {} if not run.predicts_labels else {
        column.label_column_name: column.is_multilabel for column in run.label_columns if not column.is_regression_label
    }  # fmt: skip
    weighed = labels_with_shares(run)
    if not heads and not weighed:
        return {}
    rows = choose_rows(data.rows["dev"], MOST_CELLS, run.seed.seed_value)
    logits = dict.fromkeys(heads, np.zeros((0, 0)))
    if len(rows):
        found = _logits(run, data.evaluation_loader(rows), folder, [*heads, *map(LabelHeads.paths_key, weighed)], go_on)
        if found is None:
            return None
        logits, rows = found
    truth = data.prepared.labels(run)
    shares = {}
    for name in weighed if len(rows) else ():
        paths = np.swapaxes(logits[LabelHeads.paths_key(name)], 0, 1)
        picked = pick_share(paths, truth[name][rows], heads.get(name, False), name not in heads)
        shares[name], logits[name] = picked["encoder_share"], blended(paths, picked["encoder_share"])
        note(
            f"{name}: the encoder counts {picked['encoder_share']:.2f} and the linear path {1 - picked['encoder_share']:.2f} ("
            + (
                picked.get("note")
                or f"{picked['n']} dev {run.observed}: loss {picked['loss_equal']:.3f} -> {picked['loss']:.3f}"
            )
            + ")"
        )
    if shares:
        store_shares(folder, shares)
    if not heads:
        return {}
    result = {name: _of_label(logits[name], truth[name][rows], several) for name, several in heads.items()}
    for name in shares.keys() & result.keys():
        result[name]["encoder_share"] = shares[name]
    for name, entry in result.items():
        said = entry.get("note") or f"negative log-likelihood {entry['nll_before']:.3f} -> {entry['nll_after']:.3f}"
        note(f"{name}: temperature {entry['temperature']:.3f} from {entry['n']} dev {run.observed} ({said})")
    write_json_atomic(folder / CALIBRATION, result)
    return result


def _of_label(logits: np.ndarray, truth: np.ndarray, several: bool) -> dict[str, Any]:
    entry = fit_temperature(logits, truth, several)
    known = (truth >= 0).all(axis=1) if several else truth >= 0
    points: list[dict[str, Any]] = []
    if known.any() and np.isfinite(logits).all():
        probabilities = scaled_probabilities(logits[known], entry["temperature"], several)
        right = (
            ((probabilities > 0.5) == (truth[known] > 0)).all(axis=1)
            if several
            else probabilities.argmax(axis=1) == truth[known]
        )
        points = coverage_points(confidence_of(probabilities, several), right)
    return {**entry, "unknown": pick_threshold(points), "coverage": points}


@torch.inference_mode()
def _logits(run: RunConfig, loader, folder: Path, names: list[str], go_on: Callable[[], bool]):
    """({label: logits (n, C)}, of paths (n, 2, C), rows (n,) of the store); None when asked to stop."""
    from bmfm_pipeline.models import load_model

    device = "cuda" if run.task.accelerator == "gpu" else "cpu"
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(run.task.precision)
    model = load_model(folder).to(device).eval()
    for heads in (module for module in model.modules() if isinstance(module, LabelHeads)):
        heads.keep_paths = True
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    rows = []
    for batch in loader:
        if not go_on():
            return None
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            output = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        for name in names:
            found = output.logits[name].float().cpu().numpy()
            parts[name].append(found if found.ndim == 2 else np.swapaxes(found, 0, 1))
        rows.append(batch["cell_index"].numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}, np.concatenate(rows)
