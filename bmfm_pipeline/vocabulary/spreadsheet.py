"""Gene names that a spreadsheet turned into dates: 1-Mar, Sep-02, 2006-03-02, and what they were."""

import re

from bmfm_pipeline.vocabulary.gene_table import UNKNOWN, Gene, GeneTable, Match

_MONTHS = {
    1: "jan janv", 2: "feb fev fév", 3: "mar mrz mär mars", 4: "apr avr", 5: "may mai", 6: "jun juin", 7: "jul juil",
    8: "aug aoû", 9: "sep sept", 10: "oct okt", 11: "nov", 12: "dec dez déc",
}  # fmt: skip
_MONTH_OF = {word: number for number, words in _MONTHS.items() for word in words.split()}
_STARTS = frozenset(word[:3] for word in _MONTH_OF)
_WORD = "|".join(sorted(_MONTH_OF, key=len, reverse=True))
_DAY_MONTH = re.compile(rf"^(\d{{1,2}})[-. ]{{1,2}}({_WORD})\.?([-. /]\d{{2,4}})?$", re.I)
_MONTH_NUMBER = re.compile(rf"^({_WORD})[-. ](\d{{1,2}})$", re.I)
_ISO = re.compile(r"^(\d{4})-(\d\d)-(\d\d)( 00:00:00)?$")
_SLASHES = re.compile(r"^(\d{1,2})[/.](\d{1,2})[/.](\d{2}|\d{4})$")
_UNIQUE_SUFFIX = re.compile(r"^(.+)[-.](\d{1,2})$")
# Families of genes that look like a day of the month, newest name first; the families of a month in order of size.
_FAMILIES = {3: (("MARCHF", "MARCH"), ("MTARC", "MARC")), 9: (("SEPTIN", "SEPT"), ("SEP",)), 12: (("DELEC", "DEC"),)}
_ONE_WORD = {1: "JAN", 2: "FEB", 4: "APR", 5: "MAY", 6: "JUN", 7: "JUL", 8: "AUG", 10: "OCT", 11: "NOV"}
# Beyond every number in these families, so that a year cannot be one.
_LARGEST_NUMBER = 20


def readings(name: str) -> list[tuple[int, int]]:
    """(month, number) that a date may stand for, both readings where the date does not tell; empty when `name` is no date."""
    if not (name[:1].isdigit() or name[:3].lower() in _STARTS):
        return []
    if found := _DAY_MONTH.match(name):
        return [(_MONTH_OF[found[2].lower()], int(found[1]))]
    if (found := _MONTH_NUMBER.match(name)) and not name.islower():  # sep-1 is a gene of a worm
        return [(_MONTH_OF[found[1].lower()], int(found[2]))]
    if found := _ISO.match(name):
        year, month, day = int(found[1]) % 100, int(found[2]), int(found[3])
        numbers = [day] if day != 1 or year > _LARGEST_NUMBER or year == 0 else [1, year]
        return [(month, number) for number in dict.fromkeys(numbers)]
    if found := _SLASHES.match(name):
        first, second = int(found[1]), int(found[2])
        return list(dict.fromkeys([(first, second), (second, first)]))
    return []


def made_unique(name: str, names: set[str]) -> str | None:
    """The name that `name` repeats, when a suffix -1 (or .1) was added to make it unique beside that name; else None."""
    found = _UNIQUE_SUFFIX.match(name)
    return found[1] if found and found[1] in names else None


def match_date(name: str, table: GeneTable, present: set[str], repeated: bool) -> Match:
    """The gene that a date was made of.

    `present`: symbols of the genes that the same data has under an undamaged name; `repeated`: the date stands there more than
    once. 1-Mar and 2-Mar are what MARCHF and MTARC genes both become: the one that is not present otherwise, and MARCHF when
    neither is; ambiguous when the date is repeated.
    """
    by_reading: list[list[Gene]] = []
    for month, number in readings(name):
        families = _FAMILIES.get(month) or ((_ONE_WORD[month],),) if 1 <= month <= 12 else ()
        if genes := _genes(table, families, number, several=month == 3):
            by_reading.append(genes)
    if not by_reading:
        return UNKNOWN
    distinct = tuple(dict.fromkeys(gene for genes in by_reading for gene in genes))
    if len(by_reading) > 1 and len(distinct) > 1:
        return Match("ambiguous", candidates=distinct, why="a date, made of one of several genes by a spreadsheet")
    absent = [gene for gene in distinct if gene.symbol not in present]
    if len(distinct) > 1 and (repeated or not absent):
        return Match("ambiguous", candidates=distinct, why="a date, made of one of several genes by a spreadsheet")
    chosen = absent[0] if absent else distinct[0]
    others = [gene.symbol for gene in absent if gene is not chosen]
    also = f" (could also be {', '.join(others)})" if others else ""
    return Match("spreadsheet", chosen, why=f"a spreadsheet made a date of the name{also}")


def _genes(table: GeneTable, families: tuple[tuple[str, ...], ...], number: int, several: bool) -> list[Gene]:
    """One gene per family (only of the first family that has one, unless `several`)."""
    found: list[Gene] = []
    for family in families:
        words = [f"{word}{number}" for word in family]
        gene = next((g for word in words if (g := (table.match(word).gene or table.match_case(word).gene))), None)
        if gene is not None:
            found.append(gene)
            if not several:
                break
    return found
