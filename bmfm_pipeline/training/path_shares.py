"""How much the encoder and the linear path beside it count in the scores of a label, chosen on dev cells where model.path_shares asks for it.

The mean of both is right where both are good. Where there is little to learn from, a network has learned its training cells by heart
before the linear path is done, and where places matter that the linear path does not see, the mean waters the network down.
"""

from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.storage import read_json, write_json_atomic
from bmfm_pipeline.training.temperature import fit_temperature

SHARES = np.linspace(0, 1, 21)
EQUAL = 0.5
# Fewer dev cells would choose by chance.
FEWEST_CELLS = 100


def labels_with_shares(run: RunConfig) -> list[str]:
    """The label columns whose two paths are weighed on dev cells."""
    if not (run.model.linear_path and run.model.path_shares == "dev" and run.predicts_labels):
        return []
    return [column.label_column_name for column in run.label_columns if column.gradient_reversal_coefficient is None]


def pick_share(paths: np.ndarray, truth: np.ndarray, several: bool, numbers: bool) -> dict[str, Any]:
    """{encoder_share, n, loss_equal, loss} from scores (2, n, C) of encoder and linear path.

    `truth` is (n,) class ids, (n,) numbers with `numbers`, or (n, C) for `several` classes a cell. The loss is the negative log-likelihood at
    the temperature that fits best, or the mean squared error. Both paths count alike, with a `note`, where too few cells have a label.
    """
    known = np.isfinite(truth) if numbers else (truth >= 0).any(axis=1) if several else truth >= 0
    n = int(np.count_nonzero(known))
    if n < FEWEST_CELLS or not np.isfinite(paths).all():
        return {
            "encoder_share": EQUAL,
            "n": n,
            "note": f"{n} dev cells are too few (at least {FEWEST_CELLS}) to weigh the paths",
        }
    paths, truth = paths[:, known].astype(np.float64), truth[known]
    losses = np.array([_loss(blended(paths, share), truth, several, numbers) for share in SHARES])
    best = int(losses.argmin())
    equal = float(losses[np.argmin(np.abs(SHARES - EQUAL))])
    return {"encoder_share": round(float(SHARES[best]), 2), "n": n, "loss_equal": equal, "loss": float(losses[best])}


def _loss(scores: np.ndarray, truth: np.ndarray, several: bool, numbers: bool) -> float:
    if numbers:
        return float(np.mean((scores[:, 0] - truth) ** 2))
    return fit_temperature(scores, truth, several)["nll_after"]


def blended(paths: np.ndarray, share: float) -> np.ndarray:
    """(n, C), the scores of both paths (2, n, C) as the model puts them together."""
    return share * paths[0] + (1 - share) * paths[1]


def store_shares(folder: Path, shares: dict[str, float]) -> None:
    """Write into config.json of a model folder how much the encoder counts for each label."""
    config = read_json(folder / "config.json")
    for entry in config["label_columns"]:
        if entry["label_column_name"] in shares:
            entry["encoder_share"] = shares[entry["label_column_name"]]
    write_json_atomic(folder / "config.json", config)
