"""Classes of a label column in an ontology: found, refused in words, and laid out as a table of what each one stands for."""

import numpy as np
import pytest

from bmfm_pipeline.config import LabelColumnInfo
from bmfm_pipeline.data.label_ontology import describe, place_classes, read_allowed, write_placed
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.ontology import Ontology, Term

TERMS = {
    "CL:0": ("cell", []),
    "CL:1": ("lymphocyte", ["CL:0"]),
    "CL:2": ("T cell", ["CL:1"]),
    "CL:3": ("regulatory T cell", ["CL:2"]),
    "CL:4": ("B cell", ["CL:1"]),
}


@pytest.fixture
def ontology() -> Ontology:
    terms = {name: Term(name, label, parents={"is_a": above, "part_of": []}) for name, (label, above) in TERMS.items()}
    terms["CL:4"].parents["part_of"] = ["CL:2"]
    terms["CL:9"] = Term("CL:9", "obsolete old cell", obsolete=True)
    for name in ("CL:5", "CL:6"):
        terms[name] = Term(name, f"kind {name[-1]}", synonyms=["twin"])
    return Ontology(terms, "cl.obo")


def column(silent=None, **options) -> LabelColumnInfo:
    settings = {"file": "cl.obo", **options}
    return LabelColumnInfo(label_column_name="cell_type", label_ontology=settings, silent_label_values=silent)


def test_a_broad_class_stands_for_those_below_it(ontology, tmp_path):
    classes = {"regulatory T cell": 0, "CL:4": 1, "lymphocyte": 2, "T cell": 3}
    placed = place_classes(column(), classes, ontology)
    write_placed(tmp_path, {"cell_type": placed})
    expected = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]], dtype=bool)
    np.testing.assert_array_equal(read_allowed(tmp_path, "cell_type", classes), expected)
    assert read_allowed(tmp_path, "tissue", classes) is None
    assert placed["names"]["CL:4"] == "B cell"
    assert describe(placed) == {
        "placed": 4,
        "flat": [],
        "with_classes_below": {
            "lymphocyte": ["CL:4", "T cell", "regulatory T cell"],
            "T cell": ["regulatory T cell"],
        },
    }


def test_part_of_is_followed_when_asked_for(ontology):
    classes = {"T cell": 0, "B cell": 1}
    assert place_classes(column(), classes, ontology)["allowed"]["T cell"] == ["T cell"]
    both = place_classes(column(relations=["is_a", "part_of"]), classes, ontology)
    assert both["allowed"]["T cell"] == ["T cell", "B cell"]


def test_classes_without_a_term_are_all_listed_with_what_to_do(ontology):
    classes = {"T cell": 0, "CD19+ B": 1, "twin": 2, "old cell": 3}
    with pytest.raises(DataError) as caught:
        place_classes(column(), classes, ontology)
    text = str(caught.value)
    assert "cl.obo: 3 of 4 classes of 'cell_type' are no term of this ontology" in text
    assert "- CD19+ B\n" in text and "- twin: may be CL:5 (kind 5) or CL:6 (kind 6)" in text
    assert "- old cell: CL:9 is obsolete" in text
    assert "label_ontology.terms" in text and "unmapped=flat" in text


def test_doing_what_the_message_says_mends_it(ontology):
    classes = {"T cell": 0, "CD19+ B": 1, "twin": 2}
    named = place_classes(column(terms={"CD19+ B": "B cell", "twin": "CL:6"}), classes, ontology)
    assert named["terms"] == {"T cell": "CL:2", "CD19+ B": "CL:4", "twin": "CL:6"}
    flat = place_classes(column(unmapped="flat"), classes, ontology)
    assert describe(flat)["flat"] == ["CD19+ B", "twin"] and flat["allowed"]["twin"] == ["twin"]


def test_a_wrong_entry_of_terms_is_refused_even_where_flat_classes_are_allowed(ontology):
    classes = {"T cell": 0, "x": 1}
    with pytest.raises(DataError, match=r"- x \(CL:77\)"):
        place_classes(column(terms={"x": "CL:77"}, unmapped="flat"), classes, ontology)
    with pytest.raises(DataError, match=r"label_ontology\.terms of 'cell_type' names y, which are no classes"):
        place_classes(column(terms={"y": "CL:2"}), classes, ontology)


def test_silent_labels_need_no_term(ontology):
    placed = place_classes(column(silent=["unknown"]), {"T cell": 0, "unknown": 1}, ontology)
    assert placed["terms"] == {"T cell": "CL:2", "unknown": None}
