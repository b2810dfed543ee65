"""The numbers of an evaluation as the card of a model shows them."""

from pathlib import Path

from bmfm_pipeline.evaluation.controls import DESCRIPTIONS
from bmfm_pipeline.evaluation.tables import LABELS
from bmfm_pipeline.storage import read_json, without_places
from bmfm_pipeline.training.model_card import TestNumbers


def numbers_of_test(folder: Path) -> TestNumbers:
    """What the folder of an evaluation (metrics.json, evaluation.json) found."""
    found = read_json(folder / "evaluation.json")
    return TestNumbers(
        rows=read_json(folder / "metrics.json"),
        verdicts=found["verdicts"],
        notes=without_places(found["notes"]),
        level=found["level"],
        names=LABELS,
        descriptions=DESCRIPTIONS,
    )
