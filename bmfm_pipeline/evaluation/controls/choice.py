"""Which controls there are, what each is, and which of them a label column gets."""

from collections.abc import Sequence

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.evaluation.controls.values import LOG_OF_COUNTS, WITHOUT_COUNTS

DEFAULT = ("majority", "logistic_l2")
FULL = (*DEFAULT, "logistic_l1", "pca50_logistic", "linear_probe", "knn")
VALUES_DEFAULT = ("train_mean", "ridge")
VALUES_FULL = (*VALUES_DEFAULT, "linear_probe", "knn")
# Of nucleotide sequences, which have no genes.
SEQUENCE_DEFAULT = ("majority", "kmer6_logistic")
SEQUENCE_FULL = (*SEQUENCE_DEFAULT, "gc_logistic", "cnn", "linear_probe", "knn")
SEQUENCE_VALUES_DEFAULT = ("train_mean", "kmer6_ridge")
SEQUENCE_VALUES_FULL = (*SEQUENCE_VALUES_DEFAULT, "cnn", "linear_probe", "knn")
# Only when they are named.
NAMED_ONLY = ("celltypist", "no_pretrain")
ALL = tuple(dict.fromkeys([*FULL, *VALUES_FULL, *SEQUENCE_FULL, *SEQUENCE_VALUES_FULL, *NAMED_ONLY]))
# What each reads: labels alone, raw counts, the model's embeddings, or another model's predictions.
READS = {
    "majority": "labels",
    "train_mean": "labels",
    "logistic_l2": "counts",
    "logistic_l1": "counts",
    "pca50_logistic": "counts",
    "ridge": "counts",
    "celltypist": "counts",
    "kmer6_logistic": "counts",
    "kmer6_ridge": "counts",
    "gc_logistic": "composition",
    "cnn": "letters",
    "linear_probe": "embeddings",
    "knn": "embeddings",
    "no_pretrain": "model",
}
SMALL = 10_000
MOST_CLASSES_IN_FULL = 10
SETS = {
    "default": (*DEFAULT, *VALUES_DEFAULT, *SEQUENCE_DEFAULT, *SEQUENCE_VALUES_DEFAULT),
    "full": (*FULL, *VALUES_FULL, *SEQUENCE_FULL, *SEQUENCE_VALUES_FULL),
}

DESCRIPTIONS = {
    "majority": "always the commonest class of the training cells",
    "logistic_l2": "L2 logistic regression (C 1) on log1p of counts per 10,000, all genes, fitted on the training cells",
    "logistic_l1": "L1 logistic regression (C 0.1, liblinear, one-vs-rest) on the same values and cells",
    "pca50_logistic": "L2 logistic regression on the first 50 principal components of the same values, fitted on the same cells",
    "linear_probe": "L2 logistic regression (C 1; ridge regression for numbers) on the model's frozen embeddings of the training cells, standardised",
    "knn": "the 15 nearest training cells by cosine distance of the model's frozen embeddings, each with one vote (their mean for numbers)",
    "train_mean": "always the mean of the training cells",
    "ridge": "ridge regression on log1p of counts per 10,000, all genes; its penalty is chosen by five folds of the training cells",
    "kmer6_logistic": "L2 logistic regression (C 0.1) on log1p of counts of words of 1 to 6 letters, each scaled to 1 at most, fitted on the training sequences",
    "kmer6_ridge": "ridge regression on the same counts of words; its penalty is chosen by five folds of the training sequences",
    "gc_logistic": "L2 logistic regression on the share of G and C and the length, fitted on the training sequences",
    "cnn": "a convolutional network of 64 filters of 11 letters trained on the training sequences alone; a tenth of them chooses the epoch",
    "celltypist": "CellTypist trained on the training cells: stochastic gradient descent in two passes, the second on its 300 top genes a class",
    "no_pretrain": "the same architecture and settings, fine-tuned on the same cells without pretraining",
}


def described(control: str, kind: str = "counts") -> str:
    """What a control is, where it reads values of `kind` (see values_for_controls)."""
    return DESCRIPTIONS[control].replace(LOG_OF_COUNTS, WITHOUT_COUNTS.get(kind, LOG_OF_COUNTS))


def expand_controls(asked: str | Sequence[str], n_cells: int) -> tuple[str, ...]:
    """The names behind 'auto', 'default', 'full', or a list of these and of controls; the default ones are always among them.

    'auto' is full for fewer than 10,000 cells (`n_cells`, of all splits) and default above. Raises ConfigError for a name that is
    no control.
    """
    words = [asked] if isinstance(asked, str) else list(asked)
    sets = {**SETS, "auto": SETS["full" if n_cells < SMALL else "default"]}
    names = dict.fromkeys(SETS["default"])
    for word in words:
        names |= dict.fromkeys(sets.get(word, (word,)))
    if unknown := sorted(set(names) - set(ALL)):
        raise ConfigError(
            f"evaluation.controls: unknown control {', '.join(unknown)}; known: {', '.join([*sets, *ALL])}"
        )
    return tuple(name for name in ALL if name in names)


def which_controls(
    asked: str | Sequence[str], n_cells: int = SMALL, *, numbers: bool = False, sequences: bool = False
) -> tuple[str, ...]:
    """The controls of a column of classes, or of `numbers`, of cells or of `sequences`, among those that `asked` stands for."""
    if sequences:
        own = (*(SEQUENCE_VALUES_FULL if numbers else SEQUENCE_FULL), "no_pretrain")
    else:
        own = (*VALUES_FULL, "no_pretrain") if numbers else (*FULL, *NAMED_ONLY)
    return tuple(name for name in own if name in expand_controls(asked, n_cells))


def chosen_for(
    column: str,
    asked: str | Sequence[str],
    n_cells: int,
    *,
    numbers: bool = False,
    several: int = 0,
    sequences: bool = False,
) -> tuple[tuple[str, ...], list[str]]:
    """(controls of one label column, notes on what is left out).

    `several`: how many classes are scored one by one, where a cell may have several. Above 10 such classes every control that was not
    named costs as many fits and intervals, so only the default ones and the linear probe are kept. CellTypist gives a cell one class.
    """
    chosen, notes = which_controls(asked, n_cells, numbers=numbers, sequences=sequences), []
    if several and "celltypist" in chosen:
        chosen = tuple(name for name in chosen if name != "celltypist")
        notes.append(f"{column}: celltypist is left out: it gives a cell one class, and these may have several")
    if several > MOST_CLASSES_IN_FULL:
        named = set() if isinstance(asked, str) else set(asked)
        kept = tuple(
            name
            for name in chosen
            if name in (*DEFAULT, *SEQUENCE_DEFAULT, "linear_probe", "no_pretrain") or name in named
        )
        if left := [name for name in chosen if name not in kept]:
            notes.append(
                f"{column}: {', '.join(left)} are left out: {several} classes are scored one by one, and a set of controls is full for up "
                f"to {MOST_CLASSES_IN_FULL}; name them in evaluation.controls to have them"
            )
        chosen = kept
    return chosen, notes
