"""What names genes have had: the complete set of HGNC (approved and previous symbols, aliases, Ensembl ids), read and looked up."""

import csv
import gzip
import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from bmfm_pipeline.errors import DataError

COLUMNS = ("hgnc_id", "symbol", "locus_group", "status", "alias_symbol", "prev_symbol", "ensembl_gene_id")
# Stands for a bar within a name where bars separate names.
_BAR = "\x1f"
PROTEIN_CODING = "protein-coding gene"
ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{6,})(\.\d+)?$")
_COMPOUND = (
    re.compile(r"^(?P<symbol>.+?)[_|](?P<id>ENS[A-Z]*G\d{6,})(\.\d+)?$"),
    re.compile(r"^(?P<id>ENS[A-Z]*G\d{6,})(\.\d+)?[_|](?P<symbol>.+)$"),
)


@dataclass(frozen=True)
class Gene:
    """One approved gene of the table."""

    symbol: str
    hgnc_id: str = ""
    ensembl_id: str = ""
    locus_group: str = ""
    previous: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Match:
    """What a name resolves to: one gene, or several (`ambiguous`), or none (`unknown`).

    `how` is symbol, previous, alias, ensembl, hgnc_id, compound, case, spreadsheet, ambiguous or unknown; `why` says it in words.
    """

    how: str
    gene: Gene | None = None
    candidates: tuple[Gene, ...] = ()
    why: str = ""


_FOREIGN = Match("unknown", why="an Ensembl id of another species")
UNKNOWN = Match("unknown", why="no approved symbol, previous symbol, alias or id")


class GeneTable:
    """Genes and all their names. A name is looked up as approved symbol first, then as previous symbol, then as alias.

    A name that is the previous symbol (or the alias) of several genes, and the approved symbol of none, is ambiguous.
    """

    def __init__(self, genes: Iterable[Gene]):
        self.genes = list(genes)

    def __len__(self) -> int:
        return len(self.genes)

    @cached_property
    def _levels(self) -> tuple[tuple[str, dict[str, list[Gene]]], ...]:
        """(how, {name: genes}) in order of precedence."""
        symbols: dict[str, list[Gene]] = {}
        previous: dict[str, list[Gene]] = {}
        aliases: dict[str, list[Gene]] = {}
        for gene in self.genes:
            symbols.setdefault(gene.symbol, []).append(gene)
            for name in gene.previous:
                previous.setdefault(name, []).append(gene)
            for name in gene.aliases:
                aliases.setdefault(name, []).append(gene)
        return (("symbol", symbols), ("previous", previous), ("alias", aliases))

    @cached_property
    def _folded(self) -> tuple[tuple[str, dict[str, list[Gene]]], ...]:
        folded = []
        for how, level in self._levels:
            names: dict[str, list[Gene]] = {}
            for name, genes in level.items():
                names.setdefault(name.casefold(), []).extend(genes)
            folded.append((how, names))
        return tuple(folded)

    @cached_property
    def _ids(self) -> dict[str, list[Gene]]:
        ids: dict[str, list[Gene]] = {}
        for gene in self.genes:
            for name in (gene.ensembl_id, gene.hgnc_id):
                if name:
                    ids.setdefault(name, []).append(gene)
        return ids

    @cached_property
    def _species(self) -> str:
        """What the Ensembl ids of the table begin with: ENSG, ENSMUSG, ...; empty where it has none."""
        return next((_species(gene.ensembl_id) for gene in self.genes if gene.ensembl_id), "")

    def match(self, name: str) -> Match:
        """The gene that `name` is spelled for exactly, or by an id (Ensembl with or without version, HGNC)."""
        for how, level in self._levels:
            if name in level:
                return _one(level[name], how, _WORDS[how])
        if found := ENSEMBL.match(name):
            return _one(self._ids.get(found[1], []), "ensembl", "Ensembl id")
        if name in self._ids:
            return _one(self._ids[name], "hgnc_id", "HGNC id")
        return UNKNOWN

    def match_compound(self, name: str) -> Match:
        """A symbol and an Ensembl id in one name: the id decides where the table has it, else the symbol."""
        parts = split_compound(name)
        if parts is None:
            return UNKNOWN
        symbol, ensembl_id = parts
        by_id = self._ids.get(ensembl_id, [])
        if len(by_id) == 1:
            return Match("compound", by_id[0], why=f"Ensembl id {ensembl_id} in the name")
        if self._species and _species(ensembl_id) != self._species:
            return _FOREIGN
        by_symbol = self.match(symbol)
        if by_symbol.gene is not None and by_symbol.how in ("symbol", "previous"):
            return Match("compound", by_symbol.gene, why=f"{by_symbol.why} {symbol} in the name")
        return by_symbol if by_symbol.how == "ambiguous" else UNKNOWN

    def match_case(self, name: str) -> Match:
        """The gene that `name` spells in other letters' case."""
        key = name.casefold()
        for how, level in self._folded:
            if key in level:
                return _one(level[key], "case", f"{_WORDS[how]}, but for upper and lower case")
        found = ENSEMBL.match(name.upper())
        return _one(self._ids.get(found[1], []), "case", "Ensembl id, but for case") if found else UNKNOWN

    @cached_property
    def protein_coding(self) -> frozenset[str]:
        """Approved symbols of the protein-coding genes."""
        return frozenset(gene.symbol for gene in self.genes if gene.locus_group == PROTEIN_CODING)

    def to_text(self) -> str:
        """The table as tab-separated lines, one a gene; `from_text` reads it back."""
        rows = (
            (g.symbol, g.hgnc_id, g.ensembl_id, g.locus_group, _joined(g.previous), _joined(g.aliases))
            for g in self.genes
        )
        return "\n".join("\t".join(row) for row in rows)

    @classmethod
    def from_text(cls, text: str) -> "GeneTable":
        genes = []
        for line in text.split("\n") if text else []:
            symbol, hgnc_id, ensembl_id, group, previous, aliases = line.split("\t")
            genes.append(Gene(symbol, hgnc_id, ensembl_id, group, _separated(previous), _separated(aliases)))
        return cls(genes)

    @classmethod
    def from_symbols(cls, symbols: Iterable[str]) -> "GeneTable":
        """A table of names alone, for letters' case and spreadsheet damage where there is no table of HGNC."""
        return cls(Gene(name, ensembl_id=name if ENSEMBL.match(name) else "") for name in dict.fromkeys(symbols))

    @classmethod
    def from_map(cls, mapping: Mapping[str, str]) -> "GeneTable":
        """A table from {other name: symbol}."""
        aliases: dict[str, list[str]] = {}
        for name, symbol in mapping.items():
            aliases.setdefault(symbol, [])
            if name != symbol:
                aliases[symbol].append(name)
        return cls(
            Gene(
                symbol,
                ensembl_id=next((name for name in names if ENSEMBL.match(name)), ""),
                aliases=tuple(names),
            )
            for symbol, names in aliases.items()
        )


def split_compound(name: str) -> tuple[str, str] | None:
    """(symbol, Ensembl id without version) of a name that holds both, such as A1BG_ENSG00000121410.11; None for other names."""
    for pattern in _COMPOUND:
        if found := pattern.match(name):
            return found["symbol"], found["id"]
    return None


def _species(ensembl_id: str) -> str:
    return ensembl_id.rstrip("0123456789")


_WORDS = {"symbol": "approved symbol", "previous": "previous symbol", "alias": "alias"}


def _one(genes: list[Gene], how: str, why: str) -> Match:
    distinct = tuple(dict.fromkeys(genes))
    if not distinct:
        return UNKNOWN
    if len(distinct) == 1:
        return Match(how, distinct[0], why=why)
    return Match("ambiguous", candidates=distinct, why=f"{why} of {len(distinct)} genes")


def _joined(names: tuple[str, ...]) -> str:
    return "|".join(name.replace("|", _BAR) for name in names)


def _separated(text: str) -> tuple[str, ...]:
    return tuple(name.replace(_BAR, "|") for name in text.split("|")) if text else ()


def _split(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.strip('"').split("|") if name)


def read_hgnc(path: str | Path) -> GeneTable:
    """The table in a complete set as HGNC offers it: tab-separated text, plain, gzipped, or alone in a zip archive.

    Withdrawn entries are left out. Raises DataError when the file is missing, is no such table, or holds no gene.
    """
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(
            f"gene table {path}: cannot be read ({error.strerror}); run `bmfm genes download` and set "
            "data_module.transform_kwargs.gene_names.table=hgnc, or name the file you have"
        ) from None
    return _read(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)
def _read(path: Path, mtime: int, size: int) -> GeneTable:
    try:
        lines = io.StringIO(_text(path), newline="")
    except (OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"gene table {path}: is not readable text ({error}); fetch it again with `bmfm genes download`"
        ) from None
    rows = csv.reader(lines, delimiter="\t")
    head = next(rows, [])
    needed = [name for name in COLUMNS if name != "status"]
    if missing := [name for name in needed if name not in head]:
        raise DataError(
            f"gene table {path}: has no column {', '.join(missing)} (found: {', '.join(head[:8]) or 'nothing'}); the complete set of "
            "HGNC is needed, hgnc_complete_set.txt, which `bmfm genes download` fetches"
        )
    at = {name: head.index(name) for name in COLUMNS if name in head}
    last, genes = max(at.values()), []
    for row in rows:
        if len(row) <= last or ("status" in at and row[at["status"]] != "Approved"):
            continue
        genes.append(
            Gene(
                row[at["symbol"]],
                row[at["hgnc_id"]],
                row[at["ensembl_gene_id"]],
                row[at["locus_group"]],
                _split(row[at["prev_symbol"]]),
                _split(row[at["alias_symbol"]]),
            )
        )
    if not genes:
        raise DataError(f"gene table {path}: lists no approved gene; fetch it again with `bmfm genes download`")
    return GeneTable(genes)


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith((".txt", ".tsv")) and "/._" not in f"/{name}"]
            if len(names) != 1:
                raise zipfile.BadZipFile(f"{len(names)} text files in it, one is needed")
            data = archive.read(names[0])
    elif data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return data.decode("utf-8-sig")
