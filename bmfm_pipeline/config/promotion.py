"""When a model of a dataset is compared with its earlier self, and when another one takes its place."""

from typing import Literal

from pydantic import Field

from bmfm_pipeline.config.strict import Section


class DriftLimits(Section):
    """From where on new data count as other than those a model was tested on.

    `gene_coverage`: the share of counts in genes that the model knows, as part of that of its training data. `library_size`: log2 of
    the ratio of median counts a cell. `label_mix`: half the sum of the absolute differences of the shares of labels (total variation
    distance, 0 to 1). `embedding`: energy distance of the model's embeddings as part of the mean distance between the two sides, 0 to 1,
    of at most `cells` cells of each. The last three must also exceed what `permutations` of which cell is new reach by chance.
    """

    gene_coverage: float = Field(0.9, ge=0, le=1)
    library_size: float = Field(0.5, ge=0)
    label_mix: float = Field(0.15, ge=0, le=1)
    embedding: float = Field(0.05, ge=0, le=1)
    cells: int = Field(1000, ge=20)
    permutations: int = Field(199, ge=19)


class PromotionConfig(Section):
    """The champion of a dataset: how it is tested again, and what a challenger must show.

    `after_finetune`: whether a finished fine-tuning is registered as the challenger. `first`: what the first evaluated model becomes.
    `metric` compares classes; columns of numbers are compared by the mean squared error. `level` and `resamples` are of the intervals;
    fewer than `min_cells` test cells are not judged. A challenger must be better by more than `margin` (in units of the metric), and
    the mean F1 of rare classes, those with less than `rare_share` of the compared cells, may fall by no more than `rare_tolerance`.
    """

    after_finetune: Literal["nothing", "challenger"] = "nothing"
    first: Literal["champion", "challenger"] = "champion"
    metric: Literal["accuracy", "f1", "mcc"] = "accuracy"
    level: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(10_000, ge=100)
    min_cells: int = Field(20, ge=2)
    margin: float = Field(0.0, ge=0)
    rare_share: float = Field(0.05, ge=0, le=1)
    rare_tolerance: float = Field(0.0, ge=0)
    drift: DriftLimits = Field(default_factory=DriftLimits)
