"""What a person asks of a prediction, checked before anything is read."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.predicting.poolings import named_poolings

ANNOTATED = "predicted.h5ad"
FORMATS = ("csv", "parquet")


@dataclass
class Asked:
    """What a prediction writes. None of it changes what is computed for a cell but `poolings`.

    poolings : ways in which embeddings are taken, as in predicting/poolings.py; none for that of the training.
    tables : those that are written, of predictions, probabilities, logits, embeddings (all of them); None for all.
    format : csv or parquet. annotated : name or path of a copy of the input with the predictions in it.
    unknown_below : cells less sure than this number are called unknown; 'auto' for the threshold that the model carries.
    umap : two coordinates per cell. batch_column : an obs column of the input, for scores of how well embeddings mix its values.
    """

    poolings: Sequence[Any] = ()
    tables: Collection[str] | None = None
    format: str = "csv"
    annotated: str | None = None
    unknown_below: float | str | None = None
    umap: bool = False
    batch_column: str | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format: must be one of {', '.join(FORMATS)}; found {self.format!r}")
        named_poolings(self.poolings)
        if self.unknown_below not in (None, "auto"):
            try:
                self.unknown_below = float(self.unknown_below)
            except ValueError:
                self.unknown_below = math.nan
            if not 0 <= self.unknown_below <= 1:
                raise ConfigError("unknown_below: must be a number between 0 and 1, or 'auto'")
