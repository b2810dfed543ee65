"""What an evaluation does about masked fields: store what is predicted, beside what is known without the model; then score it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.evaluation.field_predictions import FieldWriter, read_field_predictions, write_baselines
from bmfm_pipeline.evaluation.gene_errors import gene_errors, sentence, summary, write_gene_errors
from bmfm_pipeline.evaluation.masked_fields import evaluate_fields
from bmfm_pipeline.evaluation.rows import Evaluation, Settings

if TYPE_CHECKING:
    from bmfm_pipeline.evaluation.recording import FieldRecorder

# Training cells that the mean of each gene is taken over.
CELLS_FOR_MEANS = 20_000


@contextmanager
def recording(
    run: RunConfig, trained: RunConfig, data, folder: Path, training: Path | None = None
) -> Iterator["FieldRecorder | None"]:
    """A recorder that stores what is predicted at masked positions of the test cells of `data` in `folder`; None where none are.

    `trained` is the run that the model comes from: its losses say what is predicted. `training`: the folder of the cells that it was
    trained on, where these are not in `data`.
    """
    from bmfm_pipeline.batching import choose_rows
    from bmfm_pipeline.evaluation.recording import (
        FieldRecorder,
        GenePlaces,
        baselines,
        mean_by_gene,
        shares_to_store,
    )
    from bmfm_pipeline.objectives import build_objectives, fit_constants

    losses = [entry for entry in trained.trainer.losses or [] if "field_name" in entry]
    if not run.predicts_fields or not losses:
        yield None
        return
    prepared, seed = data.prepared, run.seed.seed_value
    values = prepared.token_values(trained)
    objectives = build_objectives(losses, prepared.field_dicts(trained), [], values)
    inputs = [entry.field_name for entry in run.fields if entry.is_input]
    places = GenePlaces(inputs, [entry.field_name for entry in run.fields if not entry.is_input])
    genes = prepared.vocabularies["genes"].tokens if "genes" in prepared.vocabularies else []
    rows, most = data.rows["test"], run.evaluation.masked_positions
    shares = shares_to_store(objectives, data.batches_beforehand(rows), len(rows), most)
    fit_to = data
    if training is not None:
        from bmfm_pipeline.training.data_module import build_data_module

        fit_to = build_data_module(trained, training)
        fit_to.setup("test")
    fitted = fit_to.batches_beforehand(choose_rows(fit_to.rows["train"], CELLS_FOR_MEANS, seed))
    means = mean_by_gene(objectives, fitted, places, genes, values)
    constants = fit_constants(objectives, fit_to.training_labels())
    write_baselines(folder, baselines(objectives, constants, shares, means, values))
    with FieldWriter(folder, genes) as writer:
        keys = getattr(prepared.store, "cell_keys", None)
        yield FieldRecorder(objectives, writer, places, shares, keys, seed)


def score_fields(evaluation: Evaluation, folder: Path, cells: list[str], settings: Settings) -> None:
    """Add what the stored positions of `folder` say, and write gene_errors.csv there. `cells` are in the order of settings.groups."""
    fields = read_field_predictions(folder)
    evaluate_fields(evaluation, fields, cells, settings)
    as_numbers = {rows.name for rows in fields if rows.kind == "number" and rows.baseline.has_number}
    whole = []
    for rows in fields:
        table = [] if rows.kind == "token" and rows.name in as_numbers else gene_errors(rows)
        whole += table
        found = summary(rows, table)
        if table:
            evaluation.gene_errors[rows.name] = found
        if said := sentence(rows.name, found):
            evaluation.notes.append(said)
    if whole:
        write_gene_errors(folder / "gene_errors.csv", whole)
