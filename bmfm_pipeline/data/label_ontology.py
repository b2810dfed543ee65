"""Classes of a label column in an ontology: which term each one is, and which classes lie under which.

The finest classes of the data are what a model tells apart, and every class of the dictionary is one output: a class with others
below it stands for them and for whatever it covers that has no class of its own. So `allowed` is square, and class ids, predictions
and metrics are those of any label column.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.storage import read_json, write_json_atomic
from bmfm_pipeline.vocabulary.ontology import Ontology

FILE = "label_ontology.json"


def place_classes(column, classes: Mapping[str, int], ontology: Ontology) -> dict[str, Any]:
    """{terms: {class: term id or None}, names: {class: name of the term}, allowed: {class: classes that it stands for}}.

    `column` is a label column of the config with a label_ontology; `classes` its dictionary. Raises DataError that lists every
    class without a term, with one that is obsolete, or with several, unless `unmapped` is flat. Silent labels need no term.
    """
    settings, silent = column.label_ontology, {str(value) for value in column.silent_label_values or []}
    if unknown := sorted(set(settings.terms) - set(classes)):
        raise DataError(
            f"label_columns: label_ontology.terms of '{column.label_column_name}' names {few(unknown)}, which are no classes of the data "
            f"({few(classes)}); correct or remove them"
        )
    terms: dict[str, str | None] = {}
    problems = []
    for name in classes:
        asked = settings.terms.get(name, name)
        found = ontology.find(asked)
        terms[name] = found[0] if len(found) == 1 else None
        needed = name in settings.terms or (settings.unmapped == "error" and name not in silent)
        if len(found) != 1 and needed:
            problems.append(f"- {name}{_why(asked, name, found, ontology)}")
    if problems:
        raise DataError(
            f"{ontology.source}: {len(problems)} of {len(classes)} classes of '{column.label_column_name}' are no term of this ontology:\n"
            + "\n".join(problems)
            + "\nSay which term each is, by id or name, in label_ontology.terms ({class: term}), or set label_ontology.unmapped=flat to let "
            "them stand beside all others"
        )
    return {
        "terms": terms,
        "names": {name: ontology.terms[term].name for name, term in terms.items() if term},
        "allowed": _allowed(terms, ontology, tuple(settings.relations)),
    }


def _why(asked: str, name: str, found: list[str], ontology: Ontology) -> str:
    said = "" if asked == name else f" ({asked})"
    if found:
        return f"{said}: may be " + " or ".join(f"{term} ({ontology.terms[term].name})" for term in found)
    if (term := ontology.obsolete(asked)) is not None:
        return f"{said}: {term.id} is obsolete"
    return said


def _allowed(terms: Mapping[str, str | None], ontology: Ontology, relations: tuple[str, ...]) -> dict[str, list[str]]:
    """Of each class itself and the classes below it; two classes of one term stand for each other."""
    above = {name: {term, *ontology.ancestors(term, relations)} if term else set() for name, term in terms.items()}
    return {
        name: [other for other in terms if other == name or (term is not None and term in above[other])]
        for name, term in terms.items()
    }


def describe(placed: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers for a report: classes with a term, without one, and with others below them."""
    return {
        "placed": sum(term is not None for term in placed["terms"].values()),
        "flat": sorted(name for name, term in placed["terms"].items() if term is None),
        "with_classes_below": {
            name: sorted(set(below) - {name}) for name, below in placed["allowed"].items() if len(below) > 1
        },
    }


def write_placed(folder: str | Path, placed: Mapping[str, Mapping[str, Any]]) -> None:
    """Write {label column: what place_classes returns}."""
    write_json_atomic(Path(folder) / FILE, placed)


def read_allowed(folder: str | Path, column: str, classes: Mapping[str, int]) -> np.ndarray | None:
    """bool (classes, classes): by row the classes that a class stands for; None where the data have no ontology for the column."""
    path = Path(folder) / FILE
    placed = read_json(path).get(column) if path.exists() else None
    if placed is None:
        return None
    table = np.eye(max(classes.values()) + 1, dtype=bool)
    for name, below in placed["allowed"].items():
        table[classes[name], [classes[other] for other in below]] = True
    return table
