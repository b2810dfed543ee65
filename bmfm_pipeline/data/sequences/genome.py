"""Windows of a genome: FASTA read letter by letter, cut as a BED file or a step says, chromosomes kept for testing by name."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bmfm_pipeline.config.sequences import FASTA, Windows
from bmfm_pipeline.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from bmfm_pipeline.data.sequences.known_variants import KnownVariants

STRETCH = 100  # windows beside each other that a random split keeps together
READ_BYTES = 16 << 20
ROWS_AT_ONCE = 10_000


def is_fasta(path: str | Path) -> bool:
    """Whether a file is FASTA, by its name."""
    return str(path).lower().endswith(FASTA)


def read_fasta(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, letters uint8 as they stand) of each record, one at a time; the name is the first word of its line.

    Raises DataError for text before the first record, a name that is there twice, a file that holds none, is not there or cannot be unpacked.
    """
    try:
        yield from _records(Path(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: cannot be unpacked ({error}); is the file complete, and gzipped as its name says?"
        ) from None


def _records(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    opener = gzip.open if path.suffix == ".gz" else open
    name, parts, seen = None, [], set()
    with opener(path, "rb") as file:
        rest = b""
        while True:
            block = file.read(READ_BYTES)
            lines = (rest + block).split(b"\n")
            rest = lines.pop() if block else b""
            for line in lines:
                if line.startswith(b">"):
                    if name is not None:
                        yield name, _joined(parts)
                    words = line[1:].split()
                    name, parts = words[0].decode("latin-1") if words else "", []
                    if not name or name in seen:
                        raise DataError(
                            f"{path}: a record {'has no name' if not name else f'{name} is there twice'}; names must tell records apart"
                        )
                    seen.add(name)
                elif line.strip() and name is None:
                    raise DataError(
                        f"{path}: begins with {line[:20].decode('latin-1')!r}; a FASTA file begins with a line >NAME"
                    )
                elif line:
                    parts.append(line.rstrip(b"\r"))
            if not block:
                break
    if name is None:
        raise DataError(f"{path}: holds no FASTA record (a line >NAME, and its letters)")
    yield name, _joined(parts)


def _joined(parts: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def read_bed(path: str | Path) -> dict[str, np.ndarray]:
    """{chromosome: int64 (n, 2) of begin and end, from 0, end left out}, ascending. DataError for a line that says something else."""
    found: dict[str, list[tuple[int, int]]] = {}
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if not words or words[0].startswith("#") or words[0] in ("track", "browser"):
                continue
            try:
                begin, end = int(words[1]), int(words[2])
            except (IndexError, ValueError):
                raise DataError(
                    f"{path}, line {number}: {line.strip()[:60]!r}; BED lines are chromosome, begin, end"
                ) from None
            if not 0 <= begin < end:
                raise DataError(f"{path}, line {number}: begin {begin} and end {end} enclose nothing")
            found.setdefault(words[0], []).append((begin, end))
    if not found:
        raise DataError(f"{path}: holds no interval")
    return {name: np.array(sorted(pairs), dtype=np.int64) for name, pairs in found.items()}


@dataclass
class GenomeWindows:
    """Windows of a FASTA file as sequences: the interface of SequenceSource.

    `obs`, indexed by chromosome:begin-end (from 1, both included), has the columns chromosome, begin, end (from 0, end left out), stretch
    (windows beside each other), and split where chromosomes are held out. `skipped` counts windows that were left out, by reason. The
    letters of `blocks` have `variants` written into them.
    """

    files: dict[str, Path]
    obs: Any
    sizes: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict)
    column: str = "the letters of the FASTA file"
    variants: "KnownVariants | None" = None

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, letters, starts) of consecutive windows."""
        chromosomes = self.obs["chromosome"].to_numpy()
        begins, ends = self.obs["begin"].to_numpy(), self.obs["end"].to_numpy()
        row = 0
        for name, letters in read_fasta(self.files[""]):
            if self.variants is not None:
                letters = self.variants.written(name, letters)
            while row < len(begins) and chromosomes[row] == name:
                stop = row
                while stop < min(row + ROWS_AT_ONCE, len(begins)) and chromosomes[stop] == name:
                    stop += 1
                lengths = ends[row:stop] - begins[row:stop]
                starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
                places = np.arange(starts[-1]) + np.repeat(begins[row:stop] - starts[:-1], lengths)
                yield row, letters[places], starts
                row = stop


def open_genome(
    path: str | Path, windows: Windows, bed: str | Path | None = None, variants: "KnownVariants | None" = None
) -> GenomeWindows:
    """The windows of a FASTA file that `windows` asks for. DataError for chromosomes that are not there, or when no window is left, and for
    variants of another genome."""
    import pandas as pd

    wanted = read_bed(bed) if bed is not None else None
    rows, found = [], {}
    skipped = {"mostly_unknown": 0, "too_short": 0}
    for name, letters in read_fasta(path):
        found[name] = len(letters)
        if variants is not None:
            variants.check(name, letters)
        if wanted is not None:
            pairs = wanted.pop(name, np.zeros((0, 2), np.int64))
            if len(pairs) and pairs[:, 1].max() > len(letters):
                raise DataError(f"{bed}: {name} ends at {pairs[:, 1].max()}, in {path} it has {len(letters)} letters")
            pairs = np.concatenate([_cut(begin, end, windows) for begin, end in pairs.tolist()] or [pairs])
        else:
            pairs = _cut(0, len(letters), windows)
        lengths = pairs[:, 1] - pairs[:, 0]
        short = lengths < windows.least
        known = np.concatenate([[0], np.cumsum(np.isin(letters, np.frombuffer(b"ACGTUacgtu", np.uint8)))])
        unknown = 1 - (known[pairs[:, 1]] - known[pairs[:, 0]]) / np.maximum(lengths, 1)
        bad = ~short & (unknown > windows.most_unknown)
        skipped["too_short"] += int(short.sum())
        skipped["mostly_unknown"] += int(bad.sum())
        pairs = pairs[~short & ~bad]
        rows.append(pd.DataFrame({"chromosome": name, "begin": pairs[:, 0], "end": pairs[:, 1]}))
    if variants is not None:
        variants.finish(path)
    if wanted:
        raise DataError(
            f"{bed}: names {', '.join(list(wanted)[:5])}, which {path} does not have; it has {', '.join(list(found)[:8])}"
        )
    obs = pd.concat(rows, ignore_index=True)
    if not len(obs):
        raise DataError(
            f"{path}: no window is left ({skipped['too_short']} shorter than {windows.least} letters, {skipped['mostly_unknown']} with more "
            f"than {windows.most_unknown:.0%} unknown letters); lower data_module.sequences.windows.size or raise most_unknown"
        )
    obs.index = pd.Index(
        [
            f"{name}:{begin + 1}-{end}"
            for name, begin, end in zip(obs["chromosome"], obs["begin"], obs["end"], strict=True)
        ],
        dtype=object,
    )
    twice = obs.index.duplicated()
    if twice.any():
        raise DataError(f"{bed}: {obs.index[twice][0]} is there twice")
    order = obs.groupby("chromosome", sort=False).cumcount().to_numpy()
    obs["stretch"] = [f"{name}/{number // STRETCH}" for name, number in zip(obs["chromosome"], order, strict=True)]
    if windows.dev or windows.test:
        for part in ("dev", "test"):
            for name in getattr(windows, part):
                if name not in found:
                    hint = did_you_mean(name, list(found), before="; ")
                    raise DataError(
                        f"data_module.sequences.windows.{part}: {path} has no record {name}; it has {', '.join(list(found)[:8])}{hint}"
                    )
        split = {**dict.fromkeys(windows.dev, "dev"), **dict.fromkeys(windows.test, "test")}
        obs["split"] = [split.get(name, "train") for name in obs["chromosome"]]
    return GenomeWindows({"": Path(path)}, obs, {Path(path).name: len(obs)}, skipped, variants=variants)


def _cut(begin: int, end: int, windows: Windows) -> np.ndarray:
    """int64 (n, 2): windows from begin to end; the last one ends there and may be shorter."""
    first = np.arange(begin, end, windows.step or windows.size, dtype=np.int64)
    pairs = np.stack([first, np.minimum(first + windows.size, end)], axis=1)
    # Overlapping windows would end in several that say the same.
    return pairs[: int(np.searchsorted(pairs[:, 1], end)) + 1] if len(pairs) else pairs.reshape(0, 2)
