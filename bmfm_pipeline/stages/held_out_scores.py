"""The predictions of a model for other data: read as its training cells were, scored in the classes that both sides have."""

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.evaluation.common_classes import in_common_classes, score_related
from bmfm_pipeline.evaluation.predictions import LabelPredictions, Predictions
from bmfm_pipeline.evaluation.rows import Evaluation, Settings
from bmfm_pipeline.evaluation.tables import unscored_note
from bmfm_pipeline.stages.held_out import HeldOut


def data_of_held_out(held: HeldOut, run: RunConfig):
    """The data module whose test cells are those of the other data, all of them: limits of the training are about other cells."""
    from bmfm_pipeline.training.data_module import CellDataModule

    own = run.model_copy(deep=True)
    own.data_module.limit_dataset_samples = own.data_module.train_fraction = None
    if own.data_module.sequences is not None:  # only training reads the other strand
        own.data_module.sequences.reverse_complement = False
    data = CellDataModule(own, None)
    data.prepared = held.new
    return data


def predictions_of_held_out(predictions: Predictions, held: HeldOut, rows: np.ndarray) -> None:
    """Put truth and scored classes into `predictions` of the rows `rows`, in place."""
    for name, label in predictions.labels.items():
        truth = held.truth[name][rows]
        if name in held.common:
            predictions.labels[name] = in_common_classes(label, held.common[name], truth)
        else:
            label.truth = truth


def score_held_out(
    evaluation: Evaluation,
    held: HeldOut,
    model: Predictions,
    others: dict[str, dict[str, LabelPredictions]],
    settings: Settings,
) -> None:
    """Add what an ontology allows, and all that was done with cells and labels as notes, before those that are there."""
    for name, common in held.common.items():
        label = model.labels[name]
        contenders = {"model": label, **{control: found[name] for control, found in others.items() if name in found}}
        values = held.new.store.column(held.obs_column(name))[held.rows]
        score_related(evaluation, common, values, contenders, settings)
        if not label.known.all():  # said by the notes on labels, in better words
            evaluation.notes.remove(unscored_note(name, label))
    evaluation.notes[:0] = held.said["notes"]
