"""Vocabularies made rather than read: from the genes of the data or of a gene table, completed by what training cells hold."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.vocabulary import SPECIAL_TOKENS, MultiFieldVocabulary, Vocabulary

DEFAULT_VALUES = 50
# Ordinary tokens of the genes vocabulary: how deep a cell was read, and how deep it is to be imagined.
READ_DEPTH_TOKENS = ("[S]", "[T]")
# More tokens than any binning gives, and as many outputs of a head as anyone would wait for.
MOST_VALUES = 20_000


def build_vocabularies(
    genes: Sequence[str], n_values: int | None = None, prepend_tokens: Sequence[str] = ()
) -> MultiFieldVocabulary:
    """Vocabularies of `genes` (in this order) and of expression values 0 to `n_values` - 1 (50 when unset).

    Tokens of `prepend_tokens` that are not special yet become special ones of every vocabulary. The genes end with [S] and [T].
    """
    special = [*SPECIAL_TOKENS, *(token for token in prepend_tokens if token not in SPECIAL_TOKENS)]
    values = [str(value) for value in range(n_values or DEFAULT_VALUES)]
    words: dict[str, Iterable[str]] = {
        "genes": [*genes, *READ_DEPTH_TOKENS],
        "expressions": values,
        "label_expressions": values,
        "perturbations": ["0", "1"],
    }
    return MultiFieldVocabulary({name: Vocabulary([*special, *tokens], len(special)) for name, tokens in words.items()})


def hgnc_genes(table: str | Path, protein_coding: bool = False) -> list[str]:
    """Approved symbols of an HGNC complete set, sorted, so that their ids do not depend on the order of the file. Raises DataError."""
    from bmfm_pipeline.vocabulary.gene_table import read_hgnc

    known = read_hgnc(table)
    return sorted(known.protein_coding if protein_coding else {gene.symbol for gene in known.genes})


def with_tokens(vocabulary: Vocabulary, tokens: Iterable[str]) -> Vocabulary:
    """The vocabulary with the tokens it lacks appended; ids that exist stay what they are."""
    new = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    return Vocabulary([*vocabulary.tokens, *new], vocabulary.n_special) if new else vocabulary


def with_values(vocabulary: Vocabulary, largest: float, where: str) -> Vocabulary:
    """The vocabulary with a token for every whole value from 0 to `largest`. Raises DataError when these would be too many."""
    top = int(np.rint(largest))
    if top >= MOST_VALUES:
        raise DataError(
            f"{where}: values reach {top}, which would make a vocabulary of {top + 1} tokens (at most {MOST_VALUES}); bin them with a "
            "BinTransform, or give the field tokenization_strategy=continuous_value_encoder"
        )
    return with_tokens(vocabulary, (str(value) for value in range(top + 1)))
