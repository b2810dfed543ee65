"""The numbers of an evaluation as the card of a model shows them."""

from pathlib import Path

from bmfm_pipeline.evaluation.controls import DESCRIPTIONS
from bmfm_pipeline.evaluation.controls.choice import described
from bmfm_pipeline.evaluation.controls.values import values_read
from bmfm_pipeline.evaluation.pages.numbers import counted
from bmfm_pipeline.evaluation.tables import LABELS
from bmfm_pipeline.storage import read_json, without_places
from bmfm_pipeline.training.model_card import TestNumbers


def numbers_of_test(folder: Path) -> TestNumbers:
    """What the folder of an evaluation (metrics.json, evaluation.json) found."""
    found, rows = read_json(folder / "evaluation.json"), read_json(folder / "metrics.json")
    targets = dict.fromkeys(row["target"] for row in rows)
    calibration = read_json(folder / "calibration.json") if (folder / "calibration.json").exists() else {}
    sure = [f"{target}: {entry['sentence']}" for target, entry in calibration.items()]
    return TestNumbers(
        rows=rows,
        verdicts=found["verdicts"],
        notes=[*without_places(found["notes"]), *sure],
        level=found["level"],
        names=LABELS,
        descriptions={name: described(name, values_read(found["notes"])) for name in DESCRIPTIONS},
        per_class=found.get("per_class", {}),
        dataset=_other_data(folder),
        counted={target: counted([row for row in rows if row["target"] == target]) for target in targets},
    )


def _other_data(folder: Path) -> str:
    """The name of the file that was tested, where it is not the model's own data."""
    file = folder / "held_out.json"
    return Path(read_json(file)["source"]).stem if file.exists() else ""
