"""Variants of a genome: VCF files read line by line, and the two windows, with the reference and with the alternative, of each."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError

ENDINGS = (".vcf", ".vcf.gz", ".vcf.bgz")
_COLUMNS = "CHROM, POS, ID, REF, ALT"
_BASES = frozenset("ACGT")
_KNOWN = np.zeros(256, dtype=bool)
_KNOWN[list(b"ACGTUacgtu")] = True


class Outcome(IntEnum):
    """What became of an alternative: a score, a score to mind something about (below NOT_SCORED), or none."""

    SCORED = 0
    NEAR_END = 1
    SHORT_CHROMOSOME = 2
    CUT = 3
    NOT_SCORED = 10
    UNKNOWN_CHROMOSOME = 11
    OUTSIDE = 12
    MISMATCH = 13
    NO_ALTERNATIVE = 14
    SYMBOLIC = 15
    OTHER_LETTERS = 16
    SAME = 17
    TOO_LONG = 18
    UNKNOWN_LETTERS = 19


REASONS = {
    Outcome.SCORED: "",
    Outcome.NEAR_END: "near the end of the chromosome: the variant is not in the middle of its window",
    Outcome.SHORT_CHROMOSOME: "the chromosome is shorter than the window",
    Outcome.CUT: "the window has more pieces than the model reads and was cut",
    Outcome.UNKNOWN_CHROMOSOME: "the genome has no such chromosome",
    Outcome.OUTSIDE: "the position lies outside of the chromosome",
    Outcome.MISMATCH: "the genome has other letters there than the reference",
    Outcome.NO_ALTERNATIVE: "there is no alternative",
    Outcome.SYMBOLIC: "the alternative is not spelled out",
    Outcome.OTHER_LETTERS: "the alleles hold other letters than A, C, G and T",
    Outcome.SAME: "the alternative is the reference",
    Outcome.TOO_LONG: "an allele is longer than half of the window",
    Outcome.UNKNOWN_LETTERS: "the window holds too many unknown letters",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a VCF file. `position` counts from 1; `alternatives` as they are written, at least one ('.' where there is none);
    `information` (INFO) is empty unless it was asked for."""

    chromosome: str
    position: int
    name: str
    reference: str
    alternatives: tuple[str, ...]
    information: str = ""


def read_variants(path: str | Path, information: bool = False) -> Iterator[Variant]:
    """The variants of a VCF file (also gzipped), in its order, one at a time.

    Header lines are passed over; of the columns behind ALT only INFO is read, and only with `information`. Raises DataError with the line for whatever is no VCF, and for a file
    without variants.
    """
    path, number, found = Path(path), 0, 0
    opener = gzip.open if path.suffix in (".gz", ".bgz") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline=None) as file:
            for number, line in enumerate(file, 1):
                if line.startswith("#") or not line.strip():
                    continue
                found += 1
                yield _variant(line.rstrip("\n"), f"{path}, line {number}", information)
    except UnicodeDecodeError:
        raise DataError(
            f"{path}, line {number + 1}: is no text; VCF files are text, also gzipped as .vcf.gz (`bcftools view` makes one of a .bcf)"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}, after line {number}: cannot be unpacked ({error}); is the file complete, and gzipped as its name says?"
        ) from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    if not found:
        raise DataError(f"{path}: holds no variant, {number:,} header lines only")


def _variant(line: str, where: str, information: bool) -> Variant:
    words = line.split("\t", 8 if information else 5)
    if len(words) < 5:
        raise DataError(
            f"{where}: {line[:60]!r} has {len(words)} columns; a VCF line has {_COLUMNS}, separated by tabs"
        )
    chromosome, place, name, reference, alternatives = (word.strip() for word in words[:5])
    if not place.isdigit():
        raise DataError(f"{where}: the position is {place[:20]!r}; it is a whole number, counted from 1")
    if not chromosome or not reference:
        raise DataError(f"{where}: has no {'chromosome' if not chromosome else 'reference'}")
    return Variant(
        chromosome,
        int(place),
        name or ".",
        reference.upper(),
        tuple(one.strip() for one in (alternatives or ".").split(",")),
        words[7] if information and len(words) > 7 else "",
    )


def other_name(chromosome: str) -> str:
    """What others call a chromosome: 1 for chr1 and chr1 for 1, MT for chrM."""
    if chromosome.lower().startswith("chr"):
        bare = chromosome[3:]
        return "MT" if bare.upper() == "M" else bare
    return "chrM" if chromosome.upper() in ("MT", "M") else f"chr{chromosome}"


@dataclass(frozen=True, slots=True)
class AlleleWindows:
    """What of a genome is read for one alternative: letters (uint8) with the reference and with the alternative, None where there is no
    score; `found` is what the genome has in place of another reference."""

    outcome: Outcome
    reference: np.ndarray | None = None
    alternative: np.ndarray | None = None
    found: str = ""


def allele_windows(
    letters: np.ndarray, position: int, reference: str, alternative: str, size: int, most_unknown: float = 0.1
) -> AlleleWindows:
    """The windows of `size` letters with the variant in the middle, of a chromosome's `letters` (uint8, as they stand in the file).

    Both begin at the same place; behind a deletion or insertion the second one goes on further, or less far, so that they are of one length.
    At the ends of the chromosome they are moved inwards. `most_unknown`: the share of other letters than A, C, G and T that is let through.
    """
    if (wrong := _of_alleles(reference, alternative, size)) is not None:
        return AlleleWindows(wrong)
    alternative = alternative.upper()
    first, length, total = position - 1, len(reference), len(letters)
    if first < 0 or first + length > total:
        return AlleleWindows(Outcome.OUTSIDE)
    there = letters[first : first + length].tobytes().decode("latin-1").upper().replace("U", "T")
    if there != reference:
        return AlleleWindows(Outcome.MISMATCH, found=there)
    further = max(0, length - len(alternative))  # what the alternative needs behind the window of the reference
    wanted = first + length // 2 - size // 2
    last = max(total - size - further, min(first + length, total) - size)
    begin = max(0, min(wanted, last))
    window = letters[begin : begin + size]
    behind = first + length
    right = max(0, size - (first - begin) - len(alternative))
    changed = np.concatenate(
        [letters[begin:first], np.frombuffer(alternative.encode(), np.uint8), letters[behind : behind + right]]
    )
    if np.count_nonzero(~_KNOWN[window]) > most_unknown * len(window):
        return AlleleWindows(Outcome.UNKNOWN_LETTERS)
    outcome = Outcome.SCORED
    if total < size + further:
        outcome = Outcome.SHORT_CHROMOSOME
    elif begin != wanted:
        outcome = Outcome.NEAR_END
    return AlleleWindows(outcome, window, changed)


def _of_alleles(reference: str, alternative: str, size: int) -> Outcome | None:
    """What is wrong with a pair of alleles, whatever the genome says."""
    if alternative in (".", ""):
        return Outcome.NO_ALTERNATIVE
    if alternative == "*" or any(sign in alternative for sign in "<>[].*"):
        return Outcome.SYMBOLIC
    if not (set(reference) | set(alternative.upper())) <= _BASES:
        return Outcome.OTHER_LETTERS
    if alternative.upper() == reference:
        return Outcome.SAME
    if 2 * max(len(reference), len(alternative)) > size:
        return Outcome.TOO_LONG
    return None
