"""Labels of other data beside a model's classes: by name, by file, by ontology; what is merged, left out, and said."""

import json

import numpy as np
import pytest

from bmfm_pipeline.config.label_ontology import LabelOntology
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.evaluation.common_classes import (
    count_labels,
    in_common_classes,
    merged_log_probabilities,
    notes_of,
    relate,
    score_related,
)
from bmfm_pipeline.evaluation.label_mapping import LabelMapping, write_template
from bmfm_pipeline.evaluation.predictions import LabelPredictions
from bmfm_pipeline.evaluation.rows import Evaluation, Settings
from bmfm_pipeline.vocabulary.ontology import Ontology

CLASSES = ["B cell", "CD4 T cell", "CD8 T cell", "monocyte"]
OBO = """format-version: 1.2
ontology: cl
""" + "".join(
    f"\n[Term]\nid: CL:000000{number}\nname: {name}\n" + "".join(f"is_a: CL:000000{parent}\n" for parent in parents)
    for number, name, parents in (
        (0, "cell", ()), (1, "T cell", (0,)), (2, "CD4 T cell", (1,)), (3, "CD8 T cell", (1,)), (4, "B cell", (0,)),
        (5, "monocyte", (0,)), (6, "naive B cell", (4,)), (7, "hepatocyte", (0,)), (8, "double positive T cell", (2, 3)),
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def ontology(tmp_path_factory) -> Ontology:
    file = tmp_path_factory.mktemp("ontology") / "cl.obo"
    file.write_text(OBO)
    return Ontology.read(file)


def related(labels, mapping=None, ontology=None, unmapped="error", **terms):
    settings = None if ontology is None else LabelOntology(file="cl.obo", unmapped=unmapped, terms=terms)
    return relate("celltype", "cell_type", labels, CLASSES, mapping, ontology, settings, where="other.h5ad")


def test_labels_that_are_no_class_are_refused_with_both_sides_and_rows_to_fill_in():
    with pytest.raises(DataError) as caught:
        related({"B cell": 5, "T helper, naive": 7})
    said = str(caught.value)
    assert "other.h5ad: 1 of the 2 labels of obs['cell_type'] is no class of the model" in said
    assert "- T helper, naive (7 cells)" in said and ", ".join(CLASSES) in said
    assert 'from,to\n"T helper, naive",?' in said and "evaluation.label_mapping=FILE" in said


def test_a_mapping_gives_labels_a_class_or_leaves_them_out_and_merges_classes_of_the_model(tmp_path):
    file = tmp_path / "map.csv"
    file.write_text(
        "# made by hand\nfrom,to,side\nT helper,T cell,\ncytotoxic,CD8 T cell,data\nplatelet,,\nnobody,B cell,\n"
        "CD4 T cell,T cell,model\nCD8 T cell,T cell,model\n"
    )
    labels = {"B cell": 5, "T helper": 7, "cytotoxic": 2, "platelet": 3}
    found = related(labels, LabelMapping.read(file))
    assert found.names == ["B cell", "T cell", "monocyte"] and found.of_model == [0, 1, 1, 2] and found.merges
    assert found.of_label == {"B cell": 0, "T helper": 1, "cytotoxic": 1}
    assert (found.excluded, found.unused) == (["platelet"], ["nobody"])
    values = np.array(["platelet", "cytotoxic", None, "B cell", "nan"], dtype=object)
    assert found.ids(values).tolist() == [-100, 1, -100, 0, -100]
    assert found.tested(values).tolist() == [False, True, False, True, False]
    said = "\n".join(notes_of(found, cells=20, unlabelled=3))
    assert "3 of 4 labels" in said and "1 by same name (5 cells), 2 by mapping (9 cells)" in said
    assert "merged, 4 into 3" in said and "T cell = CD4 T cell + CD8 T cell" in said
    assert "platelet (3)" in said and "nobody" in said and "3 of 20 cells have no label" in said
    as_json = tmp_path / "map.json"
    data = {"T helper": "T cell", "cytotoxic": "CD8 T cell", "platelet": None, "nobody": "B cell"}
    as_json.write_text(json.dumps({"data": data, "model": {"CD4 T cell": "T cell", "CD8 T cell": "T cell"}}))
    again = related(labels, LabelMapping.read(as_json))
    assert again.to_dict() == found.to_dict()


def test_probabilities_of_merged_classes_are_added_up_and_the_likeliest_is_the_answer():
    mapping = LabelMapping(model={"CD4 T cell": "T cell", "CD8 T cell": "T cell"})
    common = related({"B cell": 1}, mapping)
    own = np.array([[0.4, 0.3, 0.3, 0.0], [0.1, 0.2, 0.1, 0.6]])
    label = LabelPredictions(np.array([0, 0]), own.argmax(axis=1), own, CLASSES)
    merged = in_common_classes(label, common, np.array([1, 2]))
    assert merged.predicted.tolist() == [1, 2] and merged.class_names == ["B cell", "T cell", "monocyte"]
    np.testing.assert_allclose(merged.probabilities, [[0.4, 0.6, 0.0], [0.1, 0.3, 0.6]])
    with np.errstate(divide="ignore"):
        logs = merged_log_probabilities(np.log(own), common)
    np.testing.assert_allclose(np.exp(logs), merged.probabilities, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from,to\nT helper,?\n", "1 labels still have '?'"),
        ("from,to\nT helper,CD4 T cell\nT helper,B cell\n", "mapped twice"),
        ("from,to,side\nB cell,,model\n", "cannot be left out"),
        ("label,class\nx,y\n", "must name the columns from,to"),
        ("from,to\nT helper, naive,B cell\n", "double quotes"),
        ("from,to,side\nx,B cell,theirs\n", "side must be data or model"),
    ],
)
def test_a_mapping_file_that_cannot_be_meant_is_refused(tmp_path, text, message):
    file = tmp_path / "map.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=r"map\.csv") as caught:
        LabelMapping.read(file)
    assert message in str(caught.value)


def test_a_mapping_to_what_the_model_does_not_know_is_refused():
    with pytest.raises(DataError, match=r"mapped to 'Bcell'.*did you mean 'B cell'"):
        related({"b": 1}, LabelMapping({"b": "Bcell"}, source="map.csv"))
    with pytest.raises(DataError, match="which the model does not predict"):
        related({"B cell": 1}, LabelMapping(model={"NK": "lymphocyte"}, source="map.csv"))
    with pytest.raises(DataError, match="no cell is left to test"):
        related({"b": 1}, LabelMapping({"b": None}))


def test_the_template_fills_in_what_is_only_spelled_otherwise_and_overwrites_nothing(tmp_path):
    file = tmp_path / "map.csv"
    left = write_template(file, {"b-Cell": 3, "CD4 T cell": 2, "NK": 1}, CLASSES, {"CD4 T cell": "CD4 T cell"})
    rows = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert left == 1 and rows == ["from,to", "b-Cell,B cell", "CD4 T cell,CD4 T cell", "NK,?"]
    with pytest.raises(DataError, match="is there already"):
        write_template(file, {"NK": 1}, CLASSES, {})
    file.write_text(file.read_text().replace("?", "monocyte"))
    assert LabelMapping.read(file).data["NK"] == "monocyte"


def test_an_ontology_puts_finer_labels_under_the_nearest_class_and_counts_the_others(ontology):
    labels = {"B cell": 1, "T cell": 2, "cell": 3, "double positive T cell": 4, "hepatocyte": 5, "naive B cell": 6}
    found = related(labels, ontology=ontology)
    assert found.of_label == {"B cell": 0, "naive B cell": 0}
    assert found.how == {"B cell": "same name", "naive B cell": "ontology"}
    assert found.broader == ["T cell", "double positive T cell"]
    assert (found.too_broad, found.unrelated) == (["cell"], ["hepatocyte"])
    assert found.allowed == {"B cell": [0], "T cell": [1, 2], "double positive T cell": [1, 2], "naive B cell": [0]}
    with pytest.raises(DataError, match=r"no class of the model and no term of .*cl.obo(.|\n)*Treg,\?"):
        related({"B cell": 1, "Treg": 1}, ontology=ontology)
    assert related({"B cell": 1, "Treg": 1}, ontology=ontology, unmapped="flat").unrelated == ["Treg"]
    assert related({"B cell": 1, "Treg": 1}, ontology=ontology, Treg="CL:0000002").of_label["Treg"] == 1


def test_a_mapping_comes_before_the_ontology(ontology):
    found = related({"naive B cell": 6, "T cell": 2}, LabelMapping({"T cell": "CD4 T cell"}), ontology)
    assert found.of_label == {"naive B cell": 0, "T cell": 1} and found.allowed["T cell"] == [1]


def test_hierarchical_accuracy_counts_broader_labels_and_plain_accuracy_does_not(ontology):
    values = np.array(["B cell", "naive B cell", "T cell", "T cell", "T cell"], dtype=object)
    common = related(count_labels(values), ontology=ontology)
    assert common.ids(values).tolist() == [0, 0, -100, -100, -100]
    label = LabelPredictions(common.ids(values), np.array([0, 3, 1, 2, 0]), None, CLASSES)
    result = Evaluation()
    score_related(result, common, values, {"model": label}, Settings(resamples=20))
    row = result.rows[0]
    assert (row["metric"], row["n"], row["value"]) == ("hierarchical_accuracy", 5, 3 / 5)
