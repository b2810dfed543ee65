"""Ontologies from OBO and OWL files, among them the real Cell Ontology; and files that are neither."""

import gzip

import pytest

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.ontology import Ontology

OBO = """format-version: 1.2
ontology: cl/cl-basic

[Term]
id: CL:0000000
name: cell

[Term]
id: CL:0000084
name: T cell
alt_id: CL:0000001
synonym: "T-lymphocyte" EXACT []
synonym: "T \\"killer\\"" EXACT [PMID:1]
synonym: "thymocyte" NARROW []
is_a: CL:0000000 ! cell

[Term]
id: CL:0000815
name: regulatory T cell
is_a: CL:0000084 {is_inferred="true"} ! T cell
relationship: part_of UBERON:0000178 ! blood
relationship: has_part PR:000001

[Term]
id: CL:0000003
name: obsolete native cell
is_obsolete: true
replaced_by: CL:0000000

[Term]
id: CL:0000004
name: obsolete odd cell
is_obsolete: true

[Term]
id: PATO:0001
name: regulatory
synonym: "B cell" EXACT []

[Typedef]
id: part_of
name: part of
"""
OWL = """<?xml version="1.0"?>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:rdfs="http://www.w3.org/2000/01/rdf-schema#"
  xmlns:owl="http://www.w3.org/2002/07/owl#" xmlns:obo="http://purl.obolibrary.org/obo/"
  xmlns:oboInOwl="http://www.geneontology.org/formats/oboInOwl#">
  <owl:Ontology rdf:about="http://purl.obolibrary.org/obo/cl.owl"/>
  <owl:Class rdf:about="http://purl.obolibrary.org/obo/CL_0000000"><rdfs:label>cell</rdfs:label></owl:Class>
  <owl:Class rdf:about="http://purl.obolibrary.org/obo/CL_0000084">
    <owl:equivalentClass><owl:Class><owl:intersectionOf rdf:parseType="Collection">
      <rdf:Description rdf:about="http://purl.obolibrary.org/obo/CL_0009999"/></owl:intersectionOf></owl:Class></owl:equivalentClass>
    <rdfs:label>T cell</rdfs:label>
    <oboInOwl:hasAlternativeId>CL:0000001</oboInOwl:hasAlternativeId>
    <oboInOwl:hasExactSynonym>T-lymphocyte</oboInOwl:hasExactSynonym>
    <oboInOwl:hasExactSynonym>T "killer"</oboInOwl:hasExactSynonym>
    <oboInOwl:hasNarrowSynonym>thymocyte</oboInOwl:hasNarrowSynonym>
    <rdfs:subClassOf rdf:resource="http://purl.obolibrary.org/obo/CL_0000000"/>
  </owl:Class>
  <owl:Class rdf:about="http://purl.obolibrary.org/obo/CL_0000815">
    <rdfs:label>regulatory T cell</rdfs:label>
    <rdfs:subClassOf rdf:resource="http://purl.obolibrary.org/obo/CL_0000084"/>
    <rdfs:subClassOf><owl:Restriction>
      <owl:onProperty rdf:resource="http://purl.obolibrary.org/obo/BFO_0000050"/>
      <owl:someValuesFrom rdf:resource="http://purl.obolibrary.org/obo/UBERON_0000178"/></owl:Restriction></rdfs:subClassOf>
    <rdfs:subClassOf><owl:Restriction>
      <owl:onProperty rdf:resource="http://purl.obolibrary.org/obo/RO_0002215"/>
      <owl:someValuesFrom rdf:resource="http://purl.obolibrary.org/obo/GO_0019724"/></owl:Restriction></rdfs:subClassOf>
  </owl:Class>
  <owl:Class rdf:about="http://purl.obolibrary.org/obo/CL_0000003"><rdfs:label>obsolete native cell</rdfs:label>
    <owl:deprecated>true</owl:deprecated><obo:IAO_0100001 rdf:resource="http://purl.obolibrary.org/obo/CL_0000000"/></owl:Class>
  <owl:Class rdf:about="http://purl.obolibrary.org/obo/PATO_0001"><rdfs:label>regulatory</rdfs:label>
    <oboInOwl:hasExactSynonym>B cell</oboInOwl:hasExactSynonym></owl:Class>
  <owl:Class rdf:about="http://purl.obolibrary.org/obo/CL_0000004"><rdfs:label>obsolete odd cell</rdfs:label>
    <owl:deprecated>true</owl:deprecated></owl:Class>
</rdf:RDF>
"""


@pytest.fixture(params=["obo", "owl", "owl.gz"])
def ontology(request, tmp_path) -> Ontology:
    path = tmp_path / f"cl.{request.param}"
    text = OBO if request.param == "obo" else OWL
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return Ontology.read(path)


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("CL:0000815", "CL:0000815"),
        ("CL_0000815", "CL:0000815"),
        ("http://purl.obolibrary.org/obo/CL_0000815", "CL:0000815"),
        ("regulatory T cell", "CL:0000815"),
        ("Regulatory T-cell", "CL:0000815"),
        ("T-lymphocyte", "CL:0000084"),
        ('T "killer"', "CL:0000084"),
        ("CL:0000001", "CL:0000084"),
        ("CL:0000003", "CL:0000000"),
        ("native cell", "CL:0000000"),
        ("thymocyte", None),  # a narrower thing
        ("odd cell", None),
        ("CL:0000004", None),
        ("B cell", None),  # a synonym of a term of another ontology
        ("regulatory", None),
        ("PATO:0001", "PATO:0001"),
    ],
)
def test_a_term_is_found_by_id_name_and_exact_synonym(ontology, text, term):
    assert ontology.find(text) == ([term] if term else [])


def test_what_lies_above_a_term(ontology):
    assert ontology.ancestors("CL:0000815") == {"CL:0000084", "CL:0000000"}
    assert ontology.ancestors("CL:0000815", ("is_a", "part_of")) == {"CL:0000084", "CL:0000000", "UBERON:0000178"}
    assert ontology.obsolete("odd cell").id == ontology.obsolete("CL:0000004").id == "CL:0000004"
    assert ontology.obsolete("T cell") is None


def test_two_terms_of_one_synonym_are_both_found_and_loops_end(tmp_path):
    path = tmp_path / "loop.obo"
    path.write_text(
        '[Term]\nid: X:1\nname: one\nsynonym: "same" EXACT []\nis_a: X:2\n\n'
        '[Term]\nid: X:2\nname: two\nsynonym: "Same" EXACT []\nis_a: X:1\n'
    )
    loop = Ontology.read(path)
    assert loop.find("same") == ["X:1", "X:2"] and loop.ancestors("X:1") == {"X:2"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"cell,label\na,b\n", "holds no terms of an ontology"),
        (b"", "holds no terms"),
        (OWL.encode()[:-200], "cannot be read as an OBO or OWL"),
        (gzip.compress(OWL.encode())[:300], "cannot be read as an OBO or OWL"),
        (b"[Term]\nid: X:1\nname: \xff\xfe\n", "cannot be read as an OBO or OWL"),
    ],
)
def test_a_file_that_is_no_ontology_or_is_damaged_is_refused(tmp_path, content, words):
    path = tmp_path / "cl.owl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"cl.owl: .*{words}"):
        Ontology.read(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cl\.obo: cannot be read \(No such file"):
        Ontology.read(tmp_path / "cl.obo")
