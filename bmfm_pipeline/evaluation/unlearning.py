"""Label columns that the encoder is trained to forget, by gradient reversal: what is left of them, and not who scores higher."""

from collections.abc import Mapping

from bmfm_pipeline.evaluation.rows import Evaluation

# (metric, control that reads the frozen embeddings, one that reads the cells, one that reads nothing)
CLASSES = ("accuracy", "linear_probe", "logistic_l2", "majority")
NUMBERS = ("pcc", "linear_probe", "ridge", None)


def say_what_is_left(evaluation: Evaluation, coefficients: Mapping[str, float]) -> None:
    """Replace, in place, the verdicts on label columns that are unlearned, {label column: coefficient}, by what their embeddings tell.

    A head that scores badly is no fault there, for the encoder hides from it what it looks for; a probe fitted afterwards is the test.
    """
    for target, coefficient in coefficients.items():
        before = len(evaluation.verdicts)
        evaluation.verdicts[:] = [text for text in evaluation.verdicts if not text.startswith(f"{target}: ")]
        if len(evaluation.verdicts) < before:
            evaluation.verdicts.append(_sentence(evaluation, target, coefficient))


def _sentence(evaluation: Evaluation, target: str, coefficient: float) -> str:
    scores = {
        (row["metric"], row["model"]): row
        for row in evaluation.rows
        if row["target"] == target and row["value"] is not None
    }
    metric, probe, cells, nothing = CLASSES if ("accuracy", "model") in scores else NUMBERS
    begin = f"{target}: the encoder was trained to forget it (gradient reversal, coefficient {coefficient:g})"
    if (metric, probe) not in scores:
        return (
            f"{begin}; how much of it is left in the embeddings is told by the control linear_probe: add controls=full"
        )
    name = {"accuracy": "accuracy", "pcc": "correlation"}[metric]
    words = f"{begin}; a linear probe of its frozen embeddings reaches {name} {_number(scores[metric, probe])}"
    if (metric, cells) in scores:
        words += f", the same method on the values of the cells {_number(scores[metric, cells])}"
    if nothing and (metric, nothing) in scores:
        words += f", the commonest class {_number(scores[metric, nothing])}"
    return words


def _number(row: dict) -> str:
    if row["ci_low"] is None or row["ci_high"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})"
