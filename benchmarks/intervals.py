"""Time of bootstrap intervals from stored predictions. One JSON line.

python benchmarks/intervals.py [--resamples 1000] [--repeats 5]

Four metrics (accuracy, macro-F1, MCC, AUROC) of 4,000 cells with 2 and 11 classes, and of 68,000 cells with 11; the paired difference of
accuracy and macro-F1 of two models; the same by group. CPU seconds of the fastest of the repeats, the kernels compiled before.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import hardware

METRICS = ("accuracy", "f1", "mcc", "auroc")


def simulated(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(truth (n,), probabilities (n, classes)) of a model that is right for most cells, in float16 as evaluation stores them."""
    generator = np.random.default_rng(seed)
    truth = np.random.default_rng(99).integers(0, classes, n)
    scores = generator.random((n, classes))
    scores[np.arange(n), truth] += 1.5 * generator.random(n)
    return truth, (scores / scores.sum(axis=1, keepdims=True)).astype(np.float16).astype(np.float64)


def fastest(work, repeats: int) -> float:
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return round(min(spent), 4)


def measure(n: int, classes: int, resamples: int, repeats: int) -> dict[str, float]:
    from bmfm_pipeline.evaluation import confidence_interval
    from bmfm_pipeline.evaluation.verdicts import paired_differences

    truth, scores = simulated(n, classes)
    guess, other = scores.argmax(axis=1), simulated(n, classes, seed=1)[1].argmax(axis=1)
    shown = scores[:, 1] if classes == 2 else scores
    donors = np.arange(n) % 40

    def one(metric: str, **options):
        said = shown if metric == "auroc" else guess
        confidence_interval(
            metric, y_true=truth, y_pred=said, method="bootstrap_quantiles", resamples=resamples, **options
        )

    confidence_interval("auroc", y_true=truth, y_pred=shown, method="bootstrap_quantiles", resamples=2)  # compiles
    found = {metric: fastest(lambda metric=metric: one(metric), repeats) for metric in METRICS}
    found["all_four"] = round(sum(found.values()), 4)
    found["f1_grouped"] = fastest(lambda: one("f1", groups=donors), repeats)
    found["f1_stratified"] = fastest(lambda: one("f1", strata=truth), repeats)
    found["f1_bca"] = fastest(
        lambda: confidence_interval("f1", y_true=truth, y_pred=guess, method="bca", resamples=resamples), repeats
    )
    found["paired_accuracy_and_f1"] = fastest(
        lambda: paired_differences(("accuracy", "f1"), truth, guess, other, resamples=resamples), repeats
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    cpu = {
        f"{n}_cells_{classes}_classes": measure(n, classes, arguments.resamples, arguments.repeats)
        for n, classes in ((4000, 2), (4000, 11), (68_000, 11))
    }
    print(
        json.dumps({"benchmark": "intervals", "resamples": arguments.resamples, "cpu_s": cpu, "hardware": hardware()})
    )


if __name__ == "__main__":
    main()
