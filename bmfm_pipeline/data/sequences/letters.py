"""Letters of nucleotide sequences as arrays of bytes: cleaned and reversed many sequences at a time."""

from dataclasses import dataclass, field

import numpy as np

from bmfm_pipeline.vocabulary.alleles import ALLELES, FIRST, LAST, LETTERS, as_text

BASES = LETTERS.encode()
# Codes of the International Union of Pure and Applied Chemistry, and what each pairs with.
_PAIRS = dict(zip(b"ACGTNRYSWKMBVDH", b"TGCANYRSWMKVBHD", strict=True))
_SPACE, _OTHER = 0, 1


def _cleaning() -> np.ndarray:
    """What each byte becomes: 0 goes, other letters are kept as they are, in capitals; U is T."""
    table = np.arange(256, dtype=np.uint8)
    for letter in range(ord("a"), ord("z") + 1):
        table[letter] = letter - 32
    table[ord("u")] = table[ord("U")] = ord("T")
    for blank in b" \t\r\n\f\v":
        table[blank] = _SPACE
    return table


# What each byte is kept as.
CLEANED = _cleaning()
_COMPLEMENT = np.arange(256, dtype=np.uint8)
for _one, _other in _PAIRS.items():
    _COMPLEMENT[_one] = _other
# A pair of alleles pairs with that of the letters opposite; where an insertion begins on the other strand is not kept.
_OPPOSITE = [ALLELES.index(allele.translate(str.maketrans("ACGT", "TGCA"))) for allele in ALLELES]
for _reference in range(len(ALLELES)):
    for _allele in range(len(ALLELES)):
        _pair = FIRST + len(ALLELES) * _reference + _allele
        _COMPLEMENT[_pair] = FIRST + len(ALLELES) * _OPPOSITE[_reference] + _OPPOSITE[_allele]
_KNOWN = np.zeros(256, dtype=bool)
_KNOWN[list(BASES)] = True


@dataclass
class Cleaned:
    """Sequences one after the other: `letters` uint8, sequence i from `starts[i]` to `starts[i + 1]` (int64), and what was changed.

    `changed` counts letters by what was done to them: lower_case (capitals now), rna (U is T now), spaces (left out), ambiguous
    (kept: codes such as R or Y, and whatever else is not A, C, G, T or N), variants (kept: pairs of alleles, where those were written).
    """

    letters: np.ndarray
    starts: np.ndarray
    changed: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def texts(self) -> list[str]:
        whole = as_text(self.letters)
        return [whole[a:b] for a, b in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)]


def clean(letters: np.ndarray, starts: np.ndarray, upper_case: bool = True, variants: bool = False) -> Cleaned:
    """Sequences as the pipeline keeps them: capitals (unless `upper_case` is False), T for U, no blanks. Nothing else is changed.

    `variants`: bytes of pairs of alleles were written into them.
    """
    table = CLEANED
    if not upper_case:
        table = table.copy()
        for letter in range(ord("a"), ord("z") + 1):
            table[letter] = letter
        table[ord("u")] = ord("t")
    counts = np.bincount(letters, minlength=256)
    found = table[letters]
    keep = found != _SPACE
    if not keep.all():
        kept_before = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
        starts, found = kept_before[starts], found[keep]
    lower = counts[ord("a") : ord("z") + 1].sum() if upper_case else 0
    capitals = np.bincount(found, minlength=256)
    changed = {
        "lower_case": int(lower),
        "rna": int(counts[ord("U")] + counts[ord("u")]),
        "spaces": int(np.count_nonzero(~keep)),
        "ambiguous": int(capitals[~_KNOWN].sum()) if upper_case else 0,
    }
    if variants:
        changed["variants"] = int(capitals[FIRST : LAST + 1].sum())
        changed["ambiguous"] -= changed["variants"] if upper_case else 0
    return Cleaned(found, np.asarray(starts, dtype=np.int64), changed)


def reverse_complement(letters: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The letters of every sequence read on the other strand, uint8, in the places of the sequences; unknown letters stay what they are."""
    turned = _COMPLEMENT[letters[::-1]]
    lengths = np.diff(starts)
    # In the reversed whole, sequence i begins where the sequences after it end.
    first = np.repeat(len(letters) - starts[1:], lengths)
    within = np.arange(len(letters), dtype=np.int64) - np.repeat(starts[:-1], lengths)
    return turned[first + within]
