"""One pass of a model over cells: labels with probabilities, embeddings, what is predicted at masked positions."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bmfm_pipeline.errors import ConfigError, ResourceError, is_out_of_memory
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions

if TYPE_CHECKING:
    from bmfm_pipeline.evaluation.recording import FieldRecorder

logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict_loader(
    model: torch.nn.Module,
    loader,
    class_names: dict[str, list[str]],
    *,
    truth: dict[str, np.ndarray] | None = None,
    fields: "FieldRecorder | None" = None,
    pooling: str | int | list | None = None,
    keep_logits: bool = False,
    on_batch: Callable[[int], None] | None = None,
    precision: str = "32-true",
    device: str = "cpu",
) -> Predictions:
    """Predictions for every cell of `loader`, in its order.

    `class_names` maps label columns to class names in id order ([] for regression); `truth` holds values of all cells of the
    store, looked up by the batch's cell_index. `fields` stores what is predicted at masked positions. `pooling` asks for embeddings, `keep_logits` for the numbers that probabilities come from. Raises ConfigError when the
    model has other classes than `class_names`, or returns nan.
    Batches that do not fit into memory are halved until they do, which changes no prediction; ResourceError when not even one cell fits.
    """
    from bmfm_pipeline.models import pool

    _check_heads(model, class_names)
    heads = getattr(getattr(model, "config", None), "model_labels", ())
    several = {label.name for label in heads if label.is_multilabel}
    model = model.to(device).eval()
    cells: list[str] = []
    rows: list[np.ndarray] = []
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in class_names}
    logits: dict[str, list[np.ndarray]] = {name: [] for name in class_names if keep_logits and class_names[name]}
    embeddings: list[np.ndarray] = []
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    extra = {"first_only": True} if fields is None and _reads_first(pooling) and hasattr(model, "backbone") else {}
    done = 0
    objectives = None if fields is None else fields.objectives
    for batch, positions, output in outputs_of(model, loader, objectives, device, dtype, extra):
        if fields is not None:
            fields.add(batch, positions, output.logits)
        for name in logits:
            logits[name].append(output.logits[name].float().cpu().numpy())
        for name in class_names:
            outputs[name].append(_label_output(output.logits[name].float(), bool(class_names[name]), name in several))
        if pooling is not None:
            embeddings.append(pool(output, batch["attention_mask"].to(device), pooling).float().cpu().numpy())
        cells += batch["cell_name"]
        rows.append(batch["cell_index"].numpy())
        done += len(batch["cell_name"])
        if on_batch:
            on_batch(done)
    index = np.concatenate(rows) if rows else np.array([], dtype=np.int64)
    found = {}
    for name, names in class_names.items():
        values = np.concatenate(outputs[name]) if outputs[name] else np.zeros((0, max(1, len(names))))
        _refuse_nan(name, values, cells, precision)
        shape = values.shape if name in several else (len(index),)
        true = truth[name][index] if truth else np.full(shape, -100 if names else np.nan)
        if name in several:
            found[name] = LabelPredictions(true, (values > 0.5).astype(np.int64), values, names)
        elif names:
            found[name] = LabelPredictions(true, values.argmax(axis=1), values, names)
        else:
            found[name] = LabelPredictions(true, values.ravel())
    kept = {name: np.concatenate(parts) for name, parts in logits.items() if parts}
    return Predictions(cells, found, np.concatenate(embeddings) if embeddings else None, kept)


def outputs_of(
    model, loader, objectives, device: str, dtype: torch.dtype | None, extra: dict[str, Any]
) -> Iterator[tuple[dict, dict, Any]]:
    """(batch, positions that its fields are predicted at, what the model makes of it) in order; in halves where memory runs out."""
    most = None
    for whole in loader:
        waiting = deque([whole])
        while waiting:
            batch = waiting.popleft()
            count = len(batch["cell_name"])
            if most is not None and count > most:
                waiting.extendleft([_part(batch, slice(count // 2, None)), _part(batch, slice(0, count // 2))])
                continue
            positions = objectives.positions(batch.get("labels", {})) if objectives is not None else {}
            output = None
            try:
                with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    output = model(
                        batch["input_ids"].to(device),
                        batch["attention_mask"].to(device),
                        positions=_to(positions, device),
                        **extra,
                    )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if count == 1:
                    raise ResourceError(
                        f"out of memory for a single cell ({batch['cell_name'][0]}, {batch['input_ids'].shape[-1]} tokens); use a "
                        "machine or GPU with more memory, or a model trained with a smaller data_module.max_length"
                    ) from error
            if output is not None:
                yield batch, positions, output
                continue
            most = count // 2
            logger.warning("a batch of %d cells does not fit into memory: going on with at most %d", count, most)
            if device == "cuda":  # here and not in the handler, where what was computed so far is still held
                torch.cuda.empty_cache()
            waiting.appendleft(batch)


def _reads_first(pooling: str | int | list | None) -> bool:
    """Whether an embedding is made of the first position alone, so that the model may leave out the others of its last layer."""
    methods = pooling if isinstance(pooling, list) else [pooling]
    return all(method is None or method in ("first_token", "pooling_layer") for method in methods)


def _part(values: Any, where: slice) -> Any:
    """Some cells of a batch."""
    if isinstance(values, dict):
        return {name: _part(value, where) for name, value in values.items()}
    return values[where]


def _check_heads(model: torch.nn.Module, class_names: dict[str, list[str]]) -> None:
    """A head whose classes mean something else would be scored against the wrong names without a word."""
    config = getattr(model, "config", None)
    if config is None:
        return
    heads = {label.name: label for label in config.model_labels}
    for name, names in class_names.items():
        if name not in heads:
            raise ConfigError(f"the model has no head for '{name}'; it has {', '.join(heads) or 'none'}")
        head = heads[name]
        classes = list(head.class_names or ())
        if head.output_size != max(1, len(names)) or (names and classes and classes != list(names)):
            raise ConfigError(
                f"{name}: the model was trained with {_listed(classes, head.output_size)}, the data have "
                f"{_listed(names, len(names))}. Preprocess the data with the model's own dictionary: "
                "data_module.dataset_kwargs.label_dict_path=MODEL/label_dict.json"
            )


def _listed(names: list[str], count: int) -> str:
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{count} outputs" + (f" ({shown})" if shown else "")


def _refuse_nan(name: str, values: np.ndarray, cells: list[str], precision: str) -> None:
    """The class of the largest of several nan would be the first class, for no reason."""
    broken = np.flatnonzero(np.isnan(values).any(axis=1))
    if len(broken):
        raise ConfigError(
            f"{name}: the model returns nan for {len(broken)} of {len(cells)} cells, the first being {cells[broken[0]]}. In "
            f"precision {precision}, numbers overflowed or the weights themselves hold nan; try task.precision=32-true"
        )


def _label_output(logits: torch.Tensor, classes: bool, several: bool) -> np.ndarray:
    """(batch, C) probabilities, of each class by itself where a cell may have several, or (batch, 1) values."""
    if several:
        return torch.sigmoid(logits).cpu().numpy().astype(np.float64)
    return (torch.softmax(logits, dim=-1) if classes else logits.reshape(-1, 1)).cpu().numpy().astype(np.float64)


def _to(values: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) for name, value in values.items()}
