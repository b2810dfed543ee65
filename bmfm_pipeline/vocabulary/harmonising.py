"""Any naming of genes in, one naming out: what each name of the data is called in the vocabulary, and how that is known."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bmfm_pipeline.vocabulary.gene_table import ENSEMBL, UNKNOWN, GeneTable, Match, split_compound
from bmfm_pipeline.vocabulary.orthologs import Orthologs
from bmfm_pipeline.vocabulary.spreadsheet import made_unique, match_date, readings

# How well a name of the data tells its gene, best first: of several columns of one gene the best named is the one kept.
_RANK = ("symbol", "previous", "alias", "ensembl", "hgnc_id")
# From this share on, names that fit in another case only, and look like mouse symbols, are of a mouse.
_MOUSE_SHARE, _MOUSE_LEAST = 0.5, 5
_MOUSE = re.compile(r"^([A-Z][a-z][a-z0-9]*|[A-Z]\d+(?!orf)[a-z]\w*|mt-[A-Z][a-z0-9]+)([-.][A-Za-z0-9]+)*$")
_LOOKED_AT = 2000
_SPECIES = {
    "ENSG": "human", "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSMMUG": "macaque", "ENSSSCG": "pig",
    "ENSGALG": "chicken", "ENSBTAG": "cow", "ENSCAFG": "dog",
}  # fmt: skip


@dataclass(frozen=True)
class Resolution:
    """What became of one name. `target` is its new name, None where its column is dropped.

    `how` is symbol, previous, alias, ensembl, hgnc_id, compound, case, spreadsheet, suffix, ortholog, ambiguous, unknown,
    not_in_vocabulary or dropped; `known`: the target is a gene of the vocabulary (without one: of the table); `why` says it in words.
    """

    name: str
    target: str | None
    how: str
    known: bool
    why: str = ""


@dataclass
class GeneNameMapper:
    """Maps names to `vocabulary` (its own spelling, whatever its age) or, where that is None, to approved symbols.

    `table` knows other names of genes; `orthologs` turns genes of another species into those of the vocabulary first, and
    `direction` says which species the table describes: the targets ("mouse_to_human") or the sources ("human_to_mouse").
    `unmapped`: names that stay unknown or ambiguous keep their columns under their own names, or are dropped.
    """

    table: GeneTable | None = None
    vocabulary: Sequence[str] | None = None
    orthologs: Orthologs | None = None
    direction: Literal["mouse_to_human", "human_to_mouse"] = "mouse_to_human"
    one_to_many: Literal["drop", "first"] = "drop"
    unmapped: Literal["keep", "drop"] = "keep"
    _tables: list[GeneTable] = field(init=False, repr=False)
    _tokens: frozenset[str] | None = field(init=False, repr=False)
    _spelling: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokens = None if self.vocabulary is None else frozenset(self.vocabulary)
        backwards = self.orthologs is not None and self.direction == "human_to_mouse"
        table = None if backwards else self.table
        self._tables = [] if table is None else [table]
        self._spelling = {}
        if self.vocabulary is not None:
            self._tables.append(GeneTable.from_symbols(self.vocabulary))
            if table is not None:
                self._learn_spelling(table)

    def _learn_spelling(self, table: GeneTable) -> None:
        best: dict[str, int] = {}
        for token in self.vocabulary:
            match = table.match(token)
            if match.gene is None:
                continue
            rank = _RANK.index(match.how)
            if rank < best.get(match.gene.symbol, len(_RANK)):
                best[match.gene.symbol], self._spelling[match.gene.symbol] = rank, token

    def resolve(self, names: Sequence[str]) -> list[Resolution]:
        """One resolution per name, in order."""
        plain = [self._plain(name) for name in names]
        present = {match.gene.symbol for match, _ in plain if match.gene is not None}
        there, counts = set(names), Counter(names)
        for name in names:
            if (base := made_unique(name, there)) is not None:
                counts[base] += 1
        found = [
            entry
            if entry[0] is not UNKNOWN or self.orthologs is not None
            else self._rescue(name, present, there, counts)
            for name, entry in zip(names, plain, strict=True)
        ]
        if self.orthologs is None:
            found = _without_mouse_symbols(names, found)
            return [self._settled(name, match, table) for name, (match, table) in zip(names, found, strict=True)]
        return [self._across_species(name, match, table) for name, (match, table) in zip(names, found, strict=True)]

    def _plain(self, name: str) -> tuple[Match, GeneTable | None]:
        for table in self._tables:
            match = table.match(name)
            if match is UNKNOWN:
                match = table.match_compound(name)
            if match is not UNKNOWN:
                return match, table
        return UNKNOWN, None

    def _rescue(self, name: str, present: set[str], there: set[str], counts: Counter) -> tuple[Match, GeneTable | None]:
        """What only damage explains: a suffix that made a name unique, a date, letters' case."""
        base = made_unique(name, there)
        for table in self._tables:
            if base is not None and (match := table.match(base)).gene is not None:
                return Match("suffix", match.gene, why=f"a second {base}, made unique by a suffix"), table
            date = name if readings(name) else base
            if date is not None and readings(date):
                match = match_date(date, table, present, counts[date] > 1)
                if match is not UNKNOWN:
                    return match, table
        for table in self._tables:
            if (match := table.match_case(name)) is not UNKNOWN:
                return match, table
        return UNKNOWN, None

    def _settled(self, name: str, match: Match, table: GeneTable | None) -> Resolution:
        """The name of the vocabulary, or the approved symbol."""
        if self._tokens is not None and name in self._tokens:
            return Resolution(name, name, "symbol", True, "is in the vocabulary")
        if match.gene is None:
            if match.how == "ambiguous":
                several = ", ".join(gene.symbol for gene in match.candidates[:5])
                return Resolution(name, self._kept(name), "ambiguous", False, f"{match.why}: {several}")
            why = match.why if match is not UNKNOWN or self.table is not None else "not in the vocabulary"
            return Resolution(name, self._kept(name), "unknown", False, why)
        symbol = match.gene.symbol
        if self._tokens is None or table is not self._tables[0] or len(self._tables) == 1:
            return Resolution(name, symbol, match.how, True, match.why)
        token = self._spelling.get(symbol)
        if token is None:
            kept = symbol if self._kept(name) else None
            return Resolution(
                name, kept, "not_in_vocabulary", False, f"is {symbol} ({match.why}), which the vocabulary lacks"
            )
        return Resolution(name, token, match.how, True, match.why)

    def _kept(self, name: str) -> str | None:
        return name if self.unmapped == "keep" else None

    def _across_species(self, name: str, match: Match, table: GeneTable | None) -> Resolution:
        source = self.table if self.direction == "human_to_mouse" else None
        targets = self.orthologs.targets(name, source)
        settled = list(dict.fromkeys(self._settled(target, *self._plain(target)) for target in targets))
        distinct = list({entry.target or entry.name: entry for entry in settled}.values())
        if not distinct:
            return Resolution(name, None, "dropped", False, "no ortholog in the table")
        if len(distinct) > 1 and self.one_to_many == "drop":
            several = ", ".join(entry.name for entry in distinct[:5])
            return Resolution(name, None, "dropped", False, f"{len(distinct)} orthologs: {several}")
        first = distinct[0]
        # Without table and vocabulary the user's orthologs are all there is to know.
        known = first.known or not self._tables
        return Resolution(name, first.target, "ortholog" if known else first.how, known, f"ortholog {first.name}")

    @property
    def protein_coding(self) -> list[str] | None:
        """Protein-coding genes as they are called after mapping; None without a table that knows them."""
        table = None if self.direction == "human_to_mouse" and self.orthologs is not None else self.table
        if table is None or not table.protein_coding:
            return None
        coding = sorted(table.protein_coding)
        if self._tokens is None:
            return coding
        return [self._spelling[symbol] for symbol in coding if symbol in self._spelling]

    def to_plain(self) -> dict[str, Any]:
        """Plain values from which `from_plain` makes a mapper that needs no file."""
        return {
            "table": None if self.table is None else self.table.to_text(),
            "vocabulary": None if self.vocabulary is None else list(self.vocabulary),
            "orthologs": None if self.orthologs is None else [list(pair) for pair in self.orthologs.pairs],
            "direction": self.direction,
            "one_to_many": self.one_to_many,
            "unmapped": self.unmapped,
        }

    @classmethod
    def from_plain(cls, stored: dict[str, Any]) -> "GeneNameMapper":
        return cls(
            **{
                **stored,
                "table": None if stored["table"] is None else GeneTable.from_text(stored["table"]),
                "orthologs": None if stored["orthologs"] is None else Orthologs(map(tuple, stored["orthologs"])),
            }
        )


def _without_mouse_symbols(names: Sequence[str], found: list[tuple]) -> list[tuple]:
    """Matches by case taken back where most names are mouse symbols: Cd3d is not CD3D written otherwise, but another species' gene."""
    mouse = [
        index
        for index, (match, _) in enumerate(found)
        if match.how == "case" and _MOUSE.match(names[index]) is not None
    ]
    matched = sum(match.gene is not None for match, _ in found)
    if len(mouse) < max(_MOUSE_LEAST, _MOUSE_SHARE * matched):
        return found
    no = Match("unknown", why="a mouse symbol")
    of_mouse = set(mouse)
    return [(no, None) if index in of_mouse else entry for index, entry in enumerate(found)]


@dataclass(frozen=True)
class Naming:
    """What most names of a list are. `kind` in words, `species` where the names tell it, `share` of the names that fit."""

    kind: str
    species: str
    share: float
    examples: tuple[str, ...]

    def __str__(self) -> str:
        species = f"{self.species} " if self.species else ""
        return f"{species}{self.kind} (e.g. {', '.join(self.examples)})"


def describe_names(names: Iterable[str]) -> Naming:
    """The kind of name and the species that most of `names` seem to be."""
    kinds: dict[tuple[str, str], list[str]] = {}
    names = list(names)
    names = names[:: max(1, len(names) // _LOOKED_AT)]
    for name in names:
        kinds.setdefault(_kind(name), []).append(name)
    if not kinds:
        return Naming("names", "", 0.0, ())
    (kind, species), found = max(kinds.items(), key=lambda entry: len(entry[1]))
    return Naming(kind, species, len(found) / len(names), tuple(found[:5]))


def _kind(name: str) -> tuple[str, str]:
    if found := ENSEMBL.match(name.upper()):
        return "Ensembl ids", _SPECIES.get(found[1].rstrip("0123456789"), "")
    if (parts := split_compound(name)) is not None:
        return "compounds of symbol and Ensembl id", _SPECIES.get(parts[1].rstrip("0123456789"), "")
    if readings(name):
        return "dates made by a spreadsheet", ""
    if name.isdigit():
        return "numbers", ""
    if _MOUSE.match(name):
        return "gene symbols", "mouse"
    if name == name.lower() and any(letter.isalpha() for letter in name):
        return "lower-case names", ""
    return "gene symbols", "human" if re.match(r"^[A-Z][A-Z0-9]*(orf\d+)?([-.][A-Z0-9]+)*$", name) else ""
