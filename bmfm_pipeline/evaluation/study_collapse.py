"""Seeds that have collapsed: trainings that learned nothing, or far less than those beside them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bmfm_pipeline.evaluation.wording import SMALLER_IS_BETTER

FLOORS = ("majority", "train_mean")
# A score no further above that of a constant guess is taken for one: points of accuracy, or a share of the squared error.
NEAR_FLOOR = 0.02
# So many median absolute deviations below the others is no luck, if it is also so far below them.
MOST_DEVIATIONS, LEAST_DISTANCE, FEWEST_OTHERS = 5.0, 0.01, 3


def find_collapsed(
    scores: dict[int, float], floors: dict[int, float], smaller_is_better: bool = False
) -> dict[int, str]:
    """{seed: why} of seeds that have learned nothing, or far less than the others.

    `scores` are the model's by seed, `floors` those of a constant guess on the same cells. A seed has collapsed when it is within 2
    points of its floor (of a squared error, within 2 % of it), or more than 5 median absolute deviations, and at least one point (2 %),
    below the median of at least three others.
    """
    found = {}
    for seed, score in scores.items():
        floor = floors.get(seed)
        margin = NEAR_FLOOR * abs(floor) if floor is not None and smaller_is_better else NEAR_FLOOR
        gain = None if floor is None else (floor - score if smaller_is_better else score - floor)
        others = np.array([value for other, value in scores.items() if other != seed])
        if gain is not None and gain <= margin:
            found[seed] = "floor"
        elif len(others) >= FEWEST_OTHERS:
            middle = float(np.median(others))
            deviation = float(np.median(np.abs(others - middle)))
            least = NEAR_FLOOR * abs(middle) if smaller_is_better else LEAST_DISTANCE
            distance = score - middle if smaller_is_better else middle - score
            if distance > max(MOST_DEVIATIONS * deviation, least):
                found[seed] = "others"
    return found


def collapsed_seeds(
    target: str, fraction: float, own: Sequence, metric: str, control: str | None
) -> list[dict[str, Any]]:
    """Entries of study.json on the collapsed seeds among points (PointScores) of one share; `control` is what the model is measured against."""
    scores = {point.seed: value for point in own if (value := point.value(target, metric)) is not None}
    floors = {
        point.seed: value
        for point in own
        for name in FLOORS
        if (value := point.value(target, metric, name)) is not None
    }
    if control not in (None, *FLOORS):  # where the control learned nothing either, nothing can be said of a seed
        others = {point.seed: point.value(target, metric, control) for point in own}
        learned = find_collapsed(
            {seed: value for seed, value in others.items() if value is not None}, floors, metric in SMALLER_IS_BETTER
        )
        floors = {seed: value for seed, value in floors.items() if learned.get(seed) != "floor"}
    entries = []
    for seed, why in find_collapsed(scores, floors, metric in SMALLER_IS_BETTER).items():
        others = [value for other, value in scores.items() if other != seed]
        entries.append(
            {
                "target": target,
                "metric": metric,
                "fraction": fraction,
                "seed": seed,
                "value": scores[seed],
                "why": why,
                "floor": floors.get(seed),
                "median_of_others": float(np.median(others)) if others else None,
                "mean_of_others": float(np.mean(others)) if others else None,
            }
        )
    return entries
