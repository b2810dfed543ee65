"""The alphabet of variants: a letter of a genome together with what else stands there in a population, as one sign.

Eleven alleles (five letters, a deletion, an insertion that begins with one of five letters) give 121 ordered pairs. In arrays of letters a
pair is a byte from 128 on; in text and in tokenizers it is one character, so that byte-pair encoding learns pieces that hold variants.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError

LETTERS = "ACGTN"
DELETION = "-"
ALLELES = (*LETTERS, DELETION, *(f"+{letter}" for letter in LETTERS))
FIRST = 128  # the byte of the first pair
PAIRS = tuple(f"{reference}>{other}" for reference in ALLELES for other in ALLELES)
LAST = FIRST + len(PAIRS) - 1
# Characters without case, which are letters to tokenizers that cut at what is none, and which no published alphabet of variants uses.
_FIRST_CHARACTER = 0xAC00
# In a tokenizer folder whose pieces have other characters for pairs: {"A>G": its character}.
FILE = "alleles.json"


def code(reference: str, other: str) -> int:
    """The byte of a pair of alleles, 128 to 248; KeyError for what is no allele."""
    return FIRST + len(ALLELES) * _NUMBER[reference] + _NUMBER[other]


_NUMBER = {allele: number for number, allele in enumerate(ALLELES)}


def characters(folder: str | Path | None = None) -> np.ndarray:
    """uint32 (256,): the character of each byte, as a tokenizer folder has them; those of this program where it says nothing.

    Raises DataError for a file alleles.json that names no pair, or one character twice.
    """
    table = np.arange(256, dtype=np.uint32)
    table[FIRST : LAST + 1] = _FIRST_CHARACTER + np.arange(len(PAIRS))
    file = None if folder is None else Path(folder) / FILE
    if file is None or not file.exists():
        return table
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        found = {FIRST + PAIRS.index(pair): ord(character) for pair, character in said.items()}
    except (ValueError, TypeError, AttributeError):
        raise DataError(
            f'{file}: must be {{"A>G": one character, ...}}; alleles are {", ".join(ALLELES)} ({DELETION} a deletion, +A an insertion that '
            "begins with A)"
        ) from None
    if len(set(found.values())) < len(found) or min(found.values(), default=128) < 128:
        raise DataError(f"{file}: a character stands for two things; each pair needs one of its own, outside of ASCII")
    table[list(found)] = list(found.values())
    return table


def as_text(letters: np.ndarray, table: np.ndarray | None = None) -> str:
    """Letters (uint8) as text, pairs of alleles as their characters by `table` (see `characters`)."""
    if not len(letters) or letters.max() < FIRST:
        return letters.tobytes().decode("latin-1")
    return (_OWN if table is None else table)[letters].astype("<u4").tobytes().decode("utf-32-le")


def signs(codes: Iterable[int]) -> str:
    """The characters of bytes of pairs, one after the other."""
    return "".join(chr(_OWN[code]) for code in codes)


_OWN = characters()
