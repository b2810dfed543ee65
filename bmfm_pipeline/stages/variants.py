"""Effects of variants: what a model of sequences says of a genome around each variant, with the reference and with the alternative."""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.sequences.genome import is_fasta, read_fasta
from bmfm_pipeline.data.sequences.variants import REASONS, Outcome, allele_windows, other_name, read_variants
from bmfm_pipeline.errors import ConfigError, DataError, did_you_mean
from bmfm_pipeline.stages.predicting.pace import Pace
from bmfm_pipeline.stages.predicting.scoring import SequenceScorer
from bmfm_pipeline.stages.predicting.tables import TableWriter, blocks
from bmfm_pipeline.stages.remote_output import written_to
from bmfm_pipeline.storage import Workspace, check_allowed, disk_errors, localise, strip_userinfo, write_json_atomic

logger = logging.getLogger(__name__)
TABLE, SUMMARY = "variant_effects", "variant_effects.json"
LEAST_WINDOW = 8
FOUND_LETTERS = 24  # of the genome where it has another reference
MANY_MISMATCHES = 0.2
Progress = Callable[[dict[str, Any]], None]


def variant_effects(
    model: str,
    file: str,
    variants: str,
    output: str | Path,
    *,
    window: int | None = None,
    both_strands: bool = True,
    batch_size: int | None = None,
    kind: str = "csv",
    workspace: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write variant_effects (a row for each alternative of `variants`, a VCF file) and variant_effects.json into `output`.

    `file` is the genome as FASTA, read one chromosome after the other. Around each variant `window` letters are shown to the model (None:
    as many as its training sequences have), once with the reference and once with the alternative. Columns: chrom, pos, id, ref, alt, reason
    (why there is no score, or what to mind), and of each class its log odds with both and the difference, and probabilities; of a number
    the number. Every alternative has a row, in the order of the file. Returns the summary. Raises ConfigError and DataError.
    """
    place = Workspace(workspace)
    for name, option in ((file, "--input"), (variants, "--variants")):
        check_allowed(name, option)
    if not is_fasta(strip_userinfo(str(file))):
        raise ConfigError(
            f"--variants: needs a genome as --input, a FASTA file (.fa, .fasta, .fna, also .gz); found {file}"
        )
    if window is not None and window < LEAST_WINDOW:
        raise ConfigError(f"--window: is {window}; at least {LEAST_WINDOW} letters are needed around a variant")
    scorer = SequenceScorer.open(model, place, batch_size, both_strands, "--variants")
    size = window or scorer.window
    if size > scorer.most_letters:
        raise ConfigError(
            f"--window: is {size:,}, and the model reads {scorer.most_letters:,} letters at most, so that variants in the middle would not be "
            "seen; name a smaller window"
        )
    genome, listed, tell = localise(file), localise(variants), on_progress or (lambda event: None)

    def write(folder: Path) -> dict[str, Any]:
        check_allowed(folder, "--output", also=(place.state_dir,))
        with disk_errors(folder, "--output"):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".variants-", dir=folder) as scratch:
                rows = _Rows.of(listed, Path(scratch), scorer.widths)
                tell({"kind": "note", "message": _cost(rows, size, scorer)})
                matched = _score(rows, genome, scorer, size, Pace(rows.count, tell, observed="alternatives"))
                summary = {
                    "model": str(model),
                    "genome": strip_userinfo(str(file)),
                    "variants_of": strip_userinfo(str(variants)),
                    **rows.summary(),
                    "window": size,
                    **scorer.described(),
                    "chromosomes_matched": matched,
                }
                name = f"{TABLE}.{kind}"
                _write_table(Path(scratch) / name, rows, scorer)
                os.replace(Path(scratch) / name, folder / name)
            _warn(summary, rows, genome)
            write_json_atomic(folder / SUMMARY, summary)
        return {"output": str(folder), **summary, "files": [str(folder / name), str(folder / SUMMARY)]}

    return written_to(output, place, write)


def _cost(rows: "_Rows", size: int, scorer: SequenceScorer) -> str:
    passes = 4 if scorer.both_strands else 2
    return (
        f"{rows.count:,} alternatives of {rows.lines:,} variants: at most {passes * rows.count:,} windows of {size:,} letters go through the "
        "model"
    )


@dataclass
class _Rows:
    """The alternatives of a VCF file, one after the other, on disk: what the file says of them, and what is found.

    `groups` {chromosome: [(first row, place in the file of rows, how many)]} of variants that lie together in the file. Memory grows with
    the number of groups, not of rows.
    """

    folder: Path
    widths: dict[str, int]
    count: int = 0
    lines: int = 0
    groups: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, folder: Path, widths: dict[str, int]) -> "_Rows":
        rows = cls(folder, widths)
        chromosome, first, begin = None, 0, 0
        with open(folder / "rows", "wb") as file:
            for variant in read_variants(path):
                if variant.chromosome != chromosome:
                    rows._end_group(chromosome, first, begin)
                    chromosome, first, begin = variant.chromosome, rows.count, file.tell()
                for alternative in variant.alternatives:
                    words = (chromosome, str(variant.position), variant.name, variant.reference, alternative)
                    file.write(("\t".join(words) + "\n").encode())
                rows.count += len(variant.alternatives)
                rows.lines += 1
            rows._end_group(chromosome, first, begin)
        rows.outputs = {}
        for number, (name, width) in enumerate(widths.items()):
            rows.outputs[name] = rows._array(f"outputs-{number}", np.float32, (rows.count, 2, width))
            for where in blocks(rows.count):
                rows.outputs[name][where] = np.nan
        rows.outcomes = rows._array("outcomes", np.uint8, (rows.count,))
        rows.outcomes[:] = Outcome.UNKNOWN_CHROMOSOME
        rows.found = rows._array("found", f"S{FOUND_LETTERS}", (rows.count,))
        return rows

    def _end_group(self, chromosome: str | None, first: int, begin: int) -> None:
        if chromosome is not None:
            self.groups.setdefault(chromosome, []).append((first, begin, self.count - first))

    def _array(self, name: str, dtype, shape: tuple[int, ...]) -> np.ndarray:
        return np.memmap(self.folder / name, dtype=dtype, mode="w+", shape=shape)

    def of_chromosome(self, name: str) -> Iterator[tuple[int, list[str]]]:
        """(row, [chromosome, position, name, reference, alternative]) of the variants of one chromosome."""
        with open(self.folder / "rows", "rb") as file:
            for first, begin, count in self.groups[name]:
                file.seek(begin)
                for row in range(first, first + count):
                    yield row, file.readline().decode().rstrip("\n").split("\t")

    def blocks(self) -> Iterator[tuple[slice, list[list[str]]]]:
        with open(self.folder / "rows", encoding="utf-8", newline="\n") as file:
            for where in blocks(self.count):
                yield where, [file.readline().rstrip("\n").split("\t") for _ in range(where.start, where.stop)]

    def summary(self) -> dict[str, Any]:
        counts = Counter(np.asarray(self.outcomes).tolist())
        named = {REASONS[Outcome(code)]: count for code, count in sorted(counts.items()) if code != Outcome.SCORED}
        lost = {REASONS[Outcome(code)] for code in counts if code > Outcome.NOT_SCORED}
        return {
            "variants": self.lines,
            "alternatives": self.count,
            "scored": sum(count for code, count in counts.items() if code < Outcome.NOT_SCORED),
            "not_scored": {reason: count for reason, count in named.items() if reason in lost},
            "scored_with_a_remark": {reason: count for reason, count in named.items() if reason not in lost},
        }


def _score(rows: _Rows, genome: Path, scorer: SequenceScorer, size: int, pace: Pace) -> dict[str, str]:
    """Fill in the outputs of all rows; returns {chromosome of the variants: what the genome calls it} where these differ."""
    together = max(2, scorer.at_once_of(size))
    most_unknown = scorer.chunks.settings.windows.most_unknown
    exact: set[str] = set()
    matched: dict[str, str] = {}
    done = 0
    for name, letters in read_fasta(genome):
        wanted = name if name in rows.groups else other_name(name)
        if wanted not in rows.groups or wanted in exact:
            continue
        if wanted == name:
            exact.add(name)
            matched.pop(name, None)
        else:
            matched[wanted] = name
        waiting: list[tuple[int, Any]] = []
        for row, (_, position, _, reference, alternative) in rows.of_chromosome(wanted):
            waiting.append((row, allele_windows(letters, int(position), reference, alternative, size, most_unknown)))
            if 2 * len(waiting) >= together:
                done += _fill(rows, waiting, scorer)
                pace(min(done, rows.count))
                waiting = []
        done += _fill(rows, waiting, scorer)
        pace(min(done, rows.count))
    return matched


def _fill(rows: _Rows, waiting: list[tuple[int, Any]], scorer: SequenceScorer) -> int:
    for row, windows in waiting:
        rows.outcomes[row], rows.found[row] = windows.outcome, windows.found[:FOUND_LETTERS].encode()
    usable = [(row, windows) for row, windows in waiting if windows.reference is not None]
    if usable:
        scored = scorer([one for _, windows in usable for one in (windows.reference, windows.alternative)])
        places = np.array([row for row, _ in usable])
        for name, values in scored.outputs.items():
            rows.outputs[name][places] = values.reshape(len(usable), 2, -1)
        cut = scored.cut.reshape(len(usable), 2).any(axis=1)
        rows.outcomes[places[cut]] = Outcome.CUT
    return len(waiting)


def _write_table(path: Path, rows: _Rows, scorer: SequenceScorer) -> None:
    writer = TableWriter(path, header=True)
    try:
        for where, words in rows.blocks():
            names = list(zip(*words, strict=True))
            table: dict[str, Any] = {"chrom": names[0], "pos": np.array(names[1], dtype=np.int64)}
            table |= dict(zip(("id", "ref", "alt"), names[2:], strict=True))
            table["reason"] = [
                REASONS[Outcome(code)] + (f" (it has {found.decode()})" if found else "")
                for code, found in zip(rows.outcomes[where].tolist(), rows.found[where].tolist(), strict=True)
            ]
            for label in rows.widths:
                table |= _of_label(label, np.asarray(rows.outputs[label][where], dtype=np.float64), scorer)
            writer.write(table)
    finally:
        writer.close()


def _of_label(label: str, outputs: np.ndarray, scorer: SequenceScorer) -> dict[str, np.ndarray]:
    """Columns of one label column from outputs (n, 2, C)."""
    table: dict[str, np.ndarray] = {}
    before, after = (scorer.scores(label, outputs[:, side]) for side in (0, 1))
    for place, name in enumerate(scorer.columns(label)):
        for word, values in (("ref", before), ("alt", after), ("difference", after - before)):
            table[f"{name}_{word}"] = values[:, place].astype(np.float32)
    shares = [scorer.probabilities(label, outputs[:, side]) for side in (0, 1)]
    if shares[0] is not None:
        for place, name in enumerate(scorer.columns(label)):
            for word, values in zip(("ref", "alt"), shares, strict=True):
                table[f"{name}_probability_{word}"] = values[:, place].astype(np.float32)
    return table


def _warn(summary: dict[str, Any], rows: _Rows, genome: Path) -> None:
    if matched := summary["chromosomes_matched"]:
        first, theirs = next(iter(matched.items()))
        logger.info("chromosomes are named otherwise: %s of the variants is %s of the genome, and so on", first, theirs)
    lost = summary["not_scored"]
    if unknown := lost.get(REASONS[Outcome.UNKNOWN_CHROMOSOME]):
        if unknown == rows.count:
            names = [name for name, _ in read_fasta(genome)]
            hint = did_you_mean(next(iter(rows.groups)), names, before="; ")
            raise DataError(
                f"{summary['variants_of']}: none of its chromosomes ({', '.join(list(rows.groups)[:5])}) is in the genome, which has "
                f"{', '.join(names[:5])}{hint}"
            )
        logger.warning("%d alternatives are on chromosomes that the genome does not have", unknown)
    mismatched = lost.get(REASONS[Outcome.MISMATCH], 0)
    if mismatched > MANY_MISMATCHES * rows.count:
        logger.warning(
            "%d of %d alternatives have another reference than the genome: were the variants called on another build?", mismatched, rows.count
        )  # fmt: skip
