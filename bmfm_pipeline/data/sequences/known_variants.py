"""Variants that a population is known to have, written into a genome: the letter at each place becomes a pair of alleles."""

import csv
import gzip
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bmfm_pipeline.data.sequences.letters import CLEANED
from bmfm_pipeline.data.sequences.variants import ENDINGS, Variant, other_name, read_variants
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.alleles import DELETION, LETTERS, code

_COLUMNS = {
    "chromosome": ("chrom", "#chrom", "chromosome", "chr"),
    "position": ("pos", "position"),
    "reference": ("ref", "reference"),
    "alternatives": ("alt", "alternative", "alternatives"),
    "frequency": ("af", "frequency", "allele_frequency"),
}
_BASES = frozenset(LETTERS)
# Above this share the variants were called on another genome.
MOST_MISMATCHES = 0.2
REASONS = {
    "no_alternative": "have no alternative that is spelled out",
    "complex": "replace several letters by another number of letters",
    "no_frequency": "have no frequency (AF)",
    "rare": "are rarer than asked for",
    "second": "lie where a commoner one, or an earlier one, does",
    "mismatch": "have a reference that the genome does not have there",
    "no_chromosome": "lie on chromosomes that the genome does not have, or outside of them",
}


@dataclass
class _Places:
    """Of one chromosome: places from 0, the letter that must stand there, the byte of the pair, the frequency of the alternative."""

    places: array = field(default_factory=lambda: array("q"))
    letters: array = field(default_factory=lambda: array("B"))
    codes: array = field(default_factory=lambda: array("B"))
    shares: array = field(default_factory=lambda: array("f"))

    def add(self, place: int, letter: str, other: str, share: float) -> None:
        self.places.append(place)
        self.letters.append(ord(letter))
        self.codes.append(code(letter, other))
        self.shares.append(share)


class KnownVariants:
    """The variants of a file, at most one a place: the commonest, and of equally common ones the first.

    A substitution is the pair of both letters; of a deletion each letter that goes is a pair with the deletion; an insertion is a pair of the
    letter before it and the insertion's first letter. `counts` says how many places were written, and what was left out and why (REASONS).
    Memory: 14 bytes a place.
    """

    def __init__(self, path: str | Path, least_frequency: float | None = None):
        self.path, self.counts = Path(path), Counter()
        self._found: dict[str, _Places] = {}
        for variant, shares in _listed(self.path):
            self._take(variant, shares, least_frequency)
        self._ready = {name: self._one_a_place(places) for name, places in self._found.items()}
        self._found.clear()
        self._pending = {name: len(places) for name, (places, _, _) in self._ready.items()}
        self._names: dict[str, str] = {}  # what the file calls each chromosome of the genome

    @property
    def codes(self) -> list[int]:
        """The bytes of all pairs that are left, ascending."""
        return sorted({int(value) for _, _, codes in self._ready.values() for value in np.unique(codes)})

    def check(self, chromosome: str, letters: np.ndarray) -> None:
        """Keep what fits to a chromosome's letters (uint8, as they stand in the file), and count the rest. Once for each chromosome."""
        # A genome may have chrM and chrMT, and both could be the MT of the file: the first is.
        name = next((name for name in (chromosome, other_name(chromosome)) if name in self._pending), None)
        if name is None:
            return
        self._names[chromosome] = name
        self._pending.pop(name)
        places, wanted, codes = self._ready[name]
        inside = (places >= 0) & (places < len(letters))
        self.counts["no_chromosome"] += int(np.count_nonzero(~inside))
        fits = inside.copy()
        fits[inside] = CLEANED[letters[places[inside]]] == wanted[inside]
        self.counts["mismatch"] += int(np.count_nonzero(inside & ~fits))
        self.counts["places"] += int(np.count_nonzero(fits))
        self._ready[name] = places[fits], wanted[fits], codes[fits]

    def finish(self, genome: str | Path) -> None:
        """After the last chromosome. Raises DataError where the variants are not those of this genome."""
        self.counts["no_chromosome"] += sum(self._pending.values())
        for name in self._pending:
            self._ready.pop(name)
        if not self.counts["places"]:
            raise DataError(
                f"{self.path}: no variant can be written into {genome} ({self.in_words() or 'there is none'}); were they called on this assembly?"
            )
        if self.counts["mismatch"] > MOST_MISMATCHES * (self.counts["mismatch"] + self.counts["places"]):
            raise DataError(
                f"{self.path}: {self.counts['mismatch']:,} of {self.counts['mismatch'] + self.counts['places']:,} variants have a reference "
                f"that {genome} does not have there; they were called on another assembly"
            )

    def written(self, chromosome: str, letters: np.ndarray) -> np.ndarray:
        """The letters of a chromosome with the variants that `check` kept."""
        if chromosome not in self._names:
            return letters
        places, _, codes = self._ready[self._names[chromosome]]
        letters = letters.copy()
        letters[places] = codes
        return letters

    def in_words(self) -> str:
        """What was left out, by reason; empty where nothing was."""
        return "; ".join(f"{self.counts[name]:,} {text}" for name, text in REASONS.items() if self.counts[name])

    def _take(self, variant: Variant, shares: list[float | None], least: float | None) -> None:
        into = self._found.setdefault(variant.chromosome, _Places())
        reference = variant.reference
        for alternative, share in zip(variant.alternatives, shares, strict=True):
            other = alternative.upper()
            if not other or not set(other) <= _BASES or not set(reference) <= _BASES or other == reference:
                self.counts["no_alternative"] += 1
            elif least is not None and share is None:
                self.counts["no_frequency"] += 1
            elif least is not None and share < least:
                self.counts["rare"] += 1
            elif not _changes(into, variant.position - 1, reference, other, 0.0 if share is None else share):
                self.counts["complex"] += 1

    def _one_a_place(self, found: _Places) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        places, shares = np.array(found.places, np.int64), np.array(found.shares, np.float32)
        order = np.lexsort((-shares, places))  # stable: of equally common ones the first
        places = places[order]
        first = np.concatenate([[True], np.diff(places) > 0])[: len(places)]
        self.counts["second"] += int(np.count_nonzero(~first))
        order = order[first]
        return places[first], np.array(found.letters, np.uint8)[order], np.array(found.codes, np.uint8)[order]


def _changes(into: _Places, place: int, reference: str, other: str, share: float) -> bool:
    """Add what one alternative changes; False where no pair of alleles says it."""
    if len(reference) == len(other):
        for offset, (letter, new) in enumerate(zip(reference, other, strict=True)):
            if letter != new:
                into.add(place + offset, letter, new, share)
        return True
    if len(other) == 1 and reference[0] == other:
        for offset, letter in enumerate(reference[1:], 1):
            into.add(place + offset, letter, DELETION, share)
        return True
    if len(reference) == 1 and other[0] == reference:
        into.add(place, reference, f"+{other[1]}", share)
        return True
    return False


def _listed(path: Path) -> Iterator[tuple[Variant, list[float | None]]]:
    """Each variant with the frequency of each of its alternatives, None where the file says nothing."""
    if path.name.lower().endswith(ENDINGS):
        for variant in read_variants(path, information=True):
            yield variant, _frequencies(variant.information, len(variant.alternatives))
        return
    yield from _of_table(path)


def _frequencies(information: str, alternatives: int) -> list[float | None]:
    """AF of a VCF line, or CAF of dbSNP, which begins with the reference."""
    for entry in information.split(";"):
        name, _, said = entry.partition("=")
        if name in ("AF", "CAF"):
            values = [_share(value) for value in said.split(",")]
            values = values[1:] if name == "CAF" else values
            if len(values) == alternatives:
                return values
    return [None] * alternatives


def _share(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def _of_table(path: Path) -> Iterator[tuple[Variant, list[float | None]]]:
    """Rows of a csv or tsv file with the columns chrom, pos, ref, alt, and af where there is one."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            header = file.readline().rstrip("\r\n")
            separator = "\t" if "\t" in header else ","
            names = [name.strip().lower() for name in header.split(separator)]
            at = {
                key: next((names.index(name) for name in known if name in names), None)
                for key, known in _COLUMNS.items()
            }
            if lacking := [known[0] for key, known in _COLUMNS.items() if at[key] is None and key != "frequency"]:
                raise DataError(
                    f"{path}: has no column {', '.join(lacking)} (found {header[:80]!r}); a table of variants has chrom, pos, ref and alt, and "
                    "af for frequencies; other files must be VCF, called .vcf or .vcf.gz"
                )
            for number, words in enumerate(csv.reader(file, delimiter=separator), 2):
                if words:
                    yield _row(words, at, f"{path}, line {number}")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be read as a table of variants ({error})") from None


def _row(words: list[str], at: dict[str, int | None], where: str) -> tuple[Variant, list[float | None]]:
    try:
        found = {key: words[place].strip() for key, place in at.items() if place is not None}
        position = int(found["position"])
    except (IndexError, ValueError):
        raise DataError(
            f"{where}: {','.join(words)[:60]!r} is no variant; positions are whole numbers, counted from 1"
        ) from None
    others = tuple(found["alternatives"].split(","))
    shares = [_share(text) for text in found.get("frequency", "").split(",")]
    if len(shares) != len(others):
        shares = [None] * len(others)
    return Variant(found["chromosome"], position, ".", found["reference"].upper(), others), shares
