"""Ontologies of classes, such as the Cell Ontology, read from OBO or OWL (RDF/XML) files, plain or gzip.

Both readers stream: the OWL file of the Cell Ontology (50 MB unpacked) takes about a second and few megabytes.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

from bmfm_pipeline.errors import DataError

RELATIONS = ("is_a", "part_of")


@dataclass
class Term:
    """A term with the ids of the terms right above it by relation. `replaced_by` is for an obsolete one."""

    id: str
    name: str = ""
    synonyms: list[str] = field(default_factory=list)
    alternative_ids: list[str] = field(default_factory=list)
    parents: dict[str, list[str]] = field(default_factory=lambda: {relation: [] for relation in RELATIONS})
    obsolete: bool = False
    replaced_by: str | None = None


class Ontology:
    """Terms by id, found by id, name or exact synonym.

    Files bring terms of other ontologies along (qualities, organs, genes), some named like classes. So names are looked up among the
    terms of `own`, the prefix of the ontology's ids, where it has such terms.
    """

    def __init__(self, terms: dict[str, Term], source: str = "", own: str = ""):
        self.terms, self.source = terms, source
        prefix = f"{own.upper()}:"
        named = [term for term in terms.values() if term.id.upper().startswith(prefix)] or list(terms.values())
        self._alternative = {other: term.id for term in terms.values() for other in term.alternative_ids}
        self._names = {term.name: term.id for term in named if term.name and not term.obsolete}
        self._loose: dict[str, dict[str, None]] = {}
        self._gone: dict[str, str] = {}
        for term in named:
            if term.obsolete:
                self._gone.setdefault(_loose(term.name.removeprefix("obsolete ")), term.id)
                continue
            for name in (term.name, *term.synonyms):
                self._loose.setdefault(_loose(name), {})[term.id] = None

    @classmethod
    def read(cls, path: str | Path, name: str | None = None) -> "Ontology":
        """Read a file; `name` is what messages call it. Raises DataError for one that is neither OBO nor OWL, or damaged."""
        path, source = Path(path), name or str(path)
        terms: dict[str, Term] = {}
        own: list[str] = []
        try:
            with _opened(path) as stream:
                start = stream.read(2048).lstrip(b"\xef\xbb\xbf \t\r\n")
                stream.seek(0)
                for term in _owl_terms(stream, own) if start.startswith(b"<") else _obo_terms(stream, own):
                    terms[term.id] = _joined(terms.get(term.id), term)
        except (ElementTree.ParseError, UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{source}: cannot be read as an OBO or OWL (RDF/XML) file ({error}); fetch it again"
            ) from None
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror or error})") from None
        if not terms:
            raise DataError(
                f"{source}: holds no terms of an ontology; an OBO file, or an OWL file written as RDF/XML, is needed"
            )
        return cls(terms, source, own[0] if own else "")

    def find(self, text: str) -> list[str]:
        """Ids of the terms that `text` may mean, none obsolete: by id, else by name, else by name or exact synonym in any spelling of case,
        spaces and hyphens. An obsolete id or name gives the term that replaces it."""
        found = self._by_id(text)
        if found is None and text in self._names:
            found = self._names[text]
        if found is None and _loose(text) not in self._loose and (gone := self.obsolete(text)) is not None:
            found = self._by_id(gone.id)
        return [found] if found is not None else list(self._loose.get(_loose(text), {}))

    def _by_id(self, text: str) -> str | None:
        wanted = _readable_id(text)
        wanted = wanted if wanted in self.terms else self._alternative.get(wanted, wanted)
        term = self.terms.get(wanted)
        if term is not None and term.obsolete:
            term = self.terms.get(term.replaced_by or "")
        return None if term is None or term.obsolete else term.id

    def obsolete(self, text: str) -> Term | None:
        """The obsolete term that `text` is the id or name of, when there is one."""
        term = self.terms.get(_readable_id(text)) or self.terms.get(self._gone.get(_loose(text), ""))
        return term if term is not None and term.obsolete else None

    def ancestors(self, term: str, relations: tuple[str, ...] = ("is_a",)) -> set[str]:
        """Ids of all terms above a term, without itself. Loops, which a damaged file may have, do no harm."""
        found: set[str] = set()
        waiting = [term]
        while waiting:
            entry = self.terms.get(waiting.pop())
            for relation in relations if entry is not None else ():
                new = [parent for parent in entry.parents[relation] if parent not in found]
                found.update(new)
                waiting += new
        return found - {term}


def _loose(name: str) -> str:
    return re.sub(r"[\s\-_]+", " ", name).strip().casefold()


def _readable_id(text: str) -> str:
    """CL:0000236 of http://purl.obolibrary.org/obo/CL_0000236 and of CL_0000236."""
    last = re.split(r"[/#]", text.strip())[-1]
    return re.sub(r"^([A-Za-z]\w*?)_(\w+)$", r"\1:\2", last)


def _prefix(name: str) -> str:
    """cl of http://purl.obolibrary.org/obo/cl.owl and of cl/cl-basic."""
    return re.match(r"[A-Za-z]*", re.split(r"[/#]", name.strip())[-1])[0]


def _joined(before: Term | None, term: Term) -> Term:
    """Descriptions of one term in several places are one."""
    if before is None:
        return term
    before.name = before.name or term.name
    before.synonyms += term.synonyms
    before.alternative_ids += term.alternative_ids
    before.obsolete |= term.obsolete
    before.replaced_by = before.replaced_by or term.replaced_by
    for relation, parents in term.parents.items():
        before.parents[relation] += parents
    return before


def _opened(path: Path) -> BinaryIO:
    with open(path, "rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")


_SYNONYM = re.compile(r'"((?:[^"\\]|\\.)*)"\s+EXACT')


def _obo_terms(stream: BinaryIO, own: list[str]) -> Iterator[Term]:
    """Every [Term]; the name of the ontology is appended to `own`."""
    term: Term | None = None
    for raw in stream:
        line = raw.decode("utf-8").strip()
        if line.startswith("["):
            if term is not None and term.id:
                yield term
            term = Term("") if line == "[Term]" else None
            continue
        if line.startswith("ontology: "):
            own.append(_prefix(line.removeprefix("ontology: ")))
        if term is None or ": " not in line:
            continue
        tag, value = line.split(": ", 1)
        plain = re.split(r"\s+[!{]", value, maxsplit=1)[0].strip()
        if tag == "id":
            term.id = plain
        elif tag == "name":
            term.name = value
        elif tag == "synonym" and (match := _SYNONYM.match(value)):
            term.synonyms.append(re.sub(r"\\(.)", r"\1", match[1]))
        elif tag == "alt_id":
            term.alternative_ids.append(plain)
        elif tag == "is_a":
            term.parents["is_a"].append(plain)
        elif tag == "relationship" and plain.split()[0] in ("part_of", "BFO:0000050"):
            term.parents["part_of"].append(plain.split()[1])
        elif tag == "is_obsolete":
            term.obsolete = plain == "true"
        elif tag == "replaced_by":
            term.replaced_by = plain
    if term is not None and term.id:
        yield term


_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_RDFS = "{http://www.w3.org/2000/01/rdf-schema#}"
_OWL = "{http://www.w3.org/2002/07/owl#}"
_OBO_IN_OWL = "{http://www.geneontology.org/formats/oboInOwl#}"
_PART_OF = "BFO_0000050"
_REPLACED_BY = "{http://purl.obolibrary.org/obo/}IAO_0100001"


def _owl_terms(stream: BinaryIO, own: list[str]) -> Iterator[Term]:
    """Every named class at the top of the document; the name of the ontology is appended to `own`. What has been read is let go of."""
    depth, root = 0, None
    for event, element in ElementTree.iterparse(stream, events=("start", "end")):
        if event == "start":
            depth += 1
            root = element if root is None else root
            continue
        depth -= 1
        if depth == 1:
            about = element.get(f"{_RDF}about")
            if element.tag == f"{_OWL}Class" and about:
                yield _owl_term(element, _readable_id(about))
            elif element.tag == f"{_OWL}Ontology" and about:
                own.append(_prefix(about))
            root.clear()


def _owl_term(element: ElementTree.Element, name: str) -> Term:
    term = Term(name)
    for child in element:
        text = (child.text or "").strip()
        if child.tag == f"{_RDFS}label":
            term.name = term.name or text
        elif child.tag == f"{_OBO_IN_OWL}hasExactSynonym":
            term.synonyms.append(text)
        elif child.tag == f"{_OBO_IN_OWL}hasAlternativeId":
            term.alternative_ids.append(_readable_id(text))
        elif child.tag == f"{_OWL}deprecated":
            term.obsolete = text in ("true", "1")
        elif child.tag == _REPLACED_BY:
            term.replaced_by = _readable_id(child.get(f"{_RDF}resource") or text)
        elif child.tag == f"{_RDFS}subClassOf":
            _add_parent(term, child)
    return term


def _add_parent(term: Term, link: ElementTree.Element) -> None:
    """A named class is above by is_a; "some part of" a named class is above by part_of. Other restrictions say other things."""
    if above := link.get(f"{_RDF}resource"):
        term.parents["is_a"].append(_readable_id(above))
        return
    for restriction in link.iter(f"{_OWL}Restriction"):
        prop, some = (restriction.find(f"{_OWL}{name}") for name in ("onProperty", "someValuesFrom"))
        if prop is None or some is None:
            continue
        whole = some.get(f"{_RDF}resource")
        if whole and (prop.get(f"{_RDF}resource") or "").endswith(_PART_OF):
            term.parents["part_of"].append(_readable_id(whole))
