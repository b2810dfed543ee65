"""What is known of each gene column beside its token: whether it may be used, its median, its place in the genome, its weights."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import ConfigError, DataError


@dataclass(frozen=True)
class GeneTables:
    """Tables by gene column, each (genes,) or None where it is not asked for.

    allowed: bool. medians: float32, nan where unknown. places: int32 rank along the genome and chromosomes: int32 number of the
    chromosome, both -1 where unknown (see `genome_places`). dropout_weights: float32 relative rates of selective dropout.
    """

    allowed: np.ndarray | None = None
    medians: np.ndarray | None = None
    places: np.ndarray | None = None
    chromosomes: np.ndarray | None = None
    dropout_weights: np.ndarray | None = None

    def check(self, genes: int) -> None:
        """Raise DataError for a table that does not have one entry per gene column, or holds impossible values."""
        for name, table in vars(self).items():
            if table is not None and np.shape(table) != (genes,):
                raise DataError(f"{name} has {len(table)} entries, there are {genes} gene columns")
        if (self.places is None) != (self.chromosomes is None):
            raise DataError("places and chromosomes belong together; make both with genome_places")
        if self.medians is not None and np.any(self.medians <= 0):
            raise DataError("medians of genes must be above 0, or nan where unknown")
        check_weights(self.dropout_weights, "dropout_weights")


def check_weights(weights: np.ndarray | None, name: str) -> None:
    """Raise DataError for weights that are negative or not finite."""
    if weights is not None and not (np.isfinite(weights).all() and (np.asarray(weights) >= 0).all()):
        raise DataError(f"{name} must be finite and not negative")


def gene_mask_weights(names: Sequence[str], patterns: Sequence[tuple[str, float]]) -> np.ndarray:
    """Relative masking rate of each gene, float32 (genes,): the product of the weights of all patterns that match its start.

    A rate of 0 keeps a gene from ever being masked, e.g. ("^RP", 0.0).
    """
    weights = np.ones(len(names), dtype=np.float32)
    for pattern, weight in patterns:
        if weight < 0:
            raise ConfigError(f"masking weight of pattern {pattern!r} must not be negative, found {weight}")
        expression = re.compile(pattern)
        weights[[expression.match(name) is not None for name in names]] *= weight
    return weights


def genome_places(chromosomes: Sequence[str | None], starts: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(places, chromosomes) of `GeneTables` from each gene's chromosome (None where unknown) and start coordinate."""
    known = [i for i, name in enumerate(chromosomes) if name is not None]
    numbers = {name: number for number, name in enumerate(sorted({chromosomes[i] for i in known}))}
    places, found = np.full(len(chromosomes), -1, np.int32), np.full(len(chromosomes), -1, np.int32)
    for rank, i in enumerate(sorted(known, key=lambda i: (numbers[chromosomes[i]], starts[i], i))):
        places[i], found[i] = rank, numbers[chromosomes[i]]
    return places, found


def _rows(path: str | Path, key: str) -> tuple[list[list[str]], list[str]]:
    """The lines of a csv or tsv file split into cells, and the lower-case names of its first line."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{key}: {path} is no text file") from None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise DataError(f"{key}: {path} is empty")
    delimiter = "\t" if "\t" in lines[0] else ","
    table = list(csv.reader(lines, delimiter=delimiter))
    return table, [name.strip().lower() for name in table[0]]


def _column(header: list[str], names: Sequence[str], key: str, path: str | Path) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise DataError(f"{key}: {path} has no column '{names[0]}'; its columns are {', '.join(header)}")


def _number(text: str, key: str, path: str | Path, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{key}: {path}, line {line}: {text!r} is no number") from None


_GENE = ("gene", "gene_name", "gene_symbol", "symbol")


def read_gene_numbers(path: str | Path, columns: Sequence[str], key: str) -> dict[str, float]:
    """{gene: number} of a csv or tsv file with a column `gene` and one of `columns`. Raises DataError naming `key` and the line."""
    table, header = _rows(path, key)
    gene, value = _column(header, _GENE, key, path), _column(header, columns, key, path)
    numbers: dict[str, float] = {}
    for line, row in enumerate(table[1:], 2):
        if len(row) <= max(gene, value):
            raise DataError(f"{key}: {path}, line {line}: {len(row)} columns, the first line has {len(header)}")
        numbers[row[gene].strip()] = _number(row[value], key, path, line)
    return numbers


def read_gene_positions(path: str | Path, key: str = "gene_positions") -> dict[str, tuple[str, float]]:
    """{gene: (chromosome, start)} of a csv or tsv file with the columns gene, chromosome and start. Raises DataError."""
    table, header = _rows(path, key)
    places = [_column(header, names, key, path) for names in (_GENE, ("chromosome", "chrom", "chr"), ("start",))]
    positions: dict[str, tuple[str, float]] = {}
    for line, row in enumerate(table[1:], 2):
        if len(row) <= max(places):
            raise DataError(f"{key}: {path}, line {line}: {len(row)} columns, the first line has {len(header)}")
        gene, chromosome, start = (row[place].strip() for place in places)
        if chromosome and start:
            positions[gene] = (chromosome, _number(start, key, path, line))
    return positions


def read_gene_list(path: str | Path, key: str = "limit_genes") -> list[str]:
    """The genes of a text file: one a line, or the column `gene` of a csv or tsv file. Raises DataError."""
    table, header = _rows(path, key)
    named = next((header.index(name) for name in _GENE if name in header), None)
    rows = table if named is None else table[1:]
    return [row[named or 0].strip() for row in rows if len(row) > (named or 0)]
