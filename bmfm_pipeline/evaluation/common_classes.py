"""Labels of other data and classes of a model, brought to the classes that both have: by name, by a mapping file, by an ontology.

A label is scored as a class where it is the same, where a person says so, or where the ontology puts it under that class (the nearest one).
A label that is broader than the classes, such as T cell for a model of CD4 and CD8 T cells, cannot be scored as one of them: its cells count
in hierarchical_accuracy alone, where every class under the label is right. Whatever is left out is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bmfm_pipeline.config.losses import IGNORED_LABEL
from bmfm_pipeline.data.label_files import few
from bmfm_pipeline.data.label_values import is_missing
from bmfm_pipeline.errors import DataError, did_you_mean
from bmfm_pipeline.evaluation.label_mapping import LabelMapping, mapping_template
from bmfm_pipeline.evaluation.metrics import Metric
from bmfm_pipeline.evaluation.predictions import LabelPredictions
from bmfm_pipeline.evaluation.rows import Evaluation, Settings, add_score
from bmfm_pipeline.vocabulary.ontology import Ontology

KEY = "evaluation.label_mapping"
SHOWN = 30


@dataclass
class CommonClasses:
    """How the labels of obs column `obs_column` and the classes of the model's label column `column` meet.

    `names` are the classes that are scored; `of_model` (classes of the model,) says which each class of the model is. By label: `of_label` the
    class it is scored as; `allowed`, where an ontology is given, the classes that are right for it; `how` same name, mapping or
    ontology; `cells` how many cells have it. `excluded` were left out by the mapping, `broader` count in hierarchical accuracy alone,
    `too_broad` lie above all classes, so that any answer would be right, `unrelated` have no class above or below.
    """

    column: str
    obs_column: str
    model_classes: list[str]
    names: list[str]
    of_model: list[int]
    of_label: dict[str, int] = field(default_factory=dict)
    allowed: dict[str, list[int]] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    cells: dict[str, int] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    broader: list[str] = field(default_factory=list)
    too_broad: list[str] = field(default_factory=list)
    unrelated: list[str] = field(default_factory=list)
    without_term: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    ontology: str = ""

    @property
    def merges(self) -> bool:
        """Whether classes of the model are scored under another name."""
        return self.names != self.model_classes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def ids(self, values: Sequence) -> np.ndarray:
        """int64 (cells,): the class that each cell is scored as, -100 where none."""
        table = {label: self.of_label.get(label, IGNORED_LABEL) for label in self.cells}
        return np.array([table.get(text, IGNORED_LABEL) for text in _texts(values)], dtype=np.int64)

    def tested(self, values: Sequence) -> np.ndarray:
        """bool (cells,): whose label is scored in any way."""
        known = {*self.of_label, *self.allowed}
        return np.array([text in known for text in _texts(values)], dtype=bool)

    def of_model_ids(self, ids: np.ndarray) -> np.ndarray:
        """Class ids of the model (below 0 unknown) as ids of `names`."""
        return np.where(ids >= 0, np.asarray(self.of_model, dtype=np.int64)[np.maximum(ids, 0)], IGNORED_LABEL)

    def right(self, values: Sequence, predicted: np.ndarray) -> np.ndarray:
        """bool (cells,): whether the predicted class is one that the ontology allows for the label."""
        texts = _texts(values)
        return np.array(
            [guess in self.allowed.get(text, ()) for text, guess in zip(texts, predicted.tolist(), strict=True)],
            dtype=bool,
        )


def _texts(values: Sequence) -> list[str | None]:
    return [None if is_missing(value) else str(value) for value in values]


def count_labels(values: Sequence, silent: Sequence[str] | None = None) -> dict[str, int]:
    """{label: cells} in alphabetical order; without missing and silent values."""
    quiet, counts = {str(value) for value in silent or []}, {}
    for text in _texts(values):
        if text is not None and text not in quiet:
            counts[text] = counts.get(text, 0) + 1
    return dict(sorted(counts.items()))


def relate(
    column: str,
    obs_column: str,
    labels: Mapping[str, int],
    model_classes: Sequence[str],
    mapping: LabelMapping | None = None,
    ontology: Ontology | None = None,
    settings: Any = None,
    model_terms: Mapping[str, str | None] | None = None,
    where: str = "the data",
) -> CommonClasses:
    """Relate `labels` {label: cells} of other data to the classes of a model. A mapping comes first, then names, then the ontology.

    `settings` are those of evaluation.label_ontology (relations, terms, unmapped); `model_terms` the terms of the model's classes
    where its training said them. Raises DataError, with both sides and rows to fill in, where labels are left, and where a mapping
    names what there is not.
    """
    mapping = mapping or LabelMapping()
    names, of_model = _merged(model_classes, mapping)
    found = CommonClasses(column, obs_column, list(model_classes), names, of_model, cells=dict(labels))
    found.ontology = ontology.source if ontology is not None else ""
    found.unused = [label for label in mapping.data if label not in labels]
    targets = {name: of_model[place] for place, name in enumerate(model_classes)}
    targets |= {name: place for place, name in enumerate(names)}
    rest = []
    for label in labels:
        if label in mapping.data:
            meant = mapping.data[label]
            if meant is None:
                found.excluded.append(label)
                continue
            if meant not in targets:
                hint = did_you_mean(meant, list(targets), before="; ")
                raise DataError(
                    f"{mapping.source}: '{label}' is mapped to '{meant}', which is no class of the model ({few(targets, SHOWN)}){hint}"
                )
            found.of_label[label], found.how[label] = targets[meant], "mapping"
        elif label in targets:
            found.of_label[label], found.how[label] = targets[label], "same name"
        else:
            rest.append(label)
    if ontology is not None:
        rest = _by_ontology(found, rest, ontology, settings, model_terms or {})
    if rest:
        raise DataError(_both_sides(where, found, rest))
    if not found.of_label and not found.allowed:
        raise DataError(
            f"{where}: no cell is left to test: none of the {len(labels)} labels of obs['{obs_column}'] ({few(labels)}) is scored as a class "
            f"of the model ({few(model_classes, SHOWN)})"
        )
    return found


def _merged(model_classes: Sequence[str], mapping: LabelMapping) -> tuple[list[str], list[int]]:
    """(scored classes in the order of the model's, which of them each class of the model is)."""
    if unknown := [name for name in mapping.model if name not in model_classes]:
        hint = did_you_mean(unknown[0], list(model_classes), before="; ")
        raise DataError(
            f"{mapping.source}: side model names {few(unknown)}, which the model does not predict ({few(model_classes, SHOWN)}){hint}"
        )
    called = [mapping.model.get(name, name) for name in model_classes]
    names = list(dict.fromkeys(called))
    if len(names) < 2 <= len(model_classes):
        raise DataError(
            f"{mapping.source}: all classes of the model are merged into '{names[0]}', so there is nothing to tell apart"
        )
    return names, [names.index(name) for name in called]


def _by_ontology(
    found: CommonClasses, rest: list[str], ontology: Ontology, settings: Any, model_terms: Mapping[str, str | None]
) -> list[str]:
    """Place labels and classes in the ontology, in `found`; returns labels that must be said another way."""
    relations = tuple(settings.relations) if settings is not None else ("is_a",)
    said = dict(settings.terms) if settings is not None else {}

    def term_of(name: str) -> str | None:
        if name not in said and model_terms.get(name):
            return model_terms[name]
        terms = ontology.find(said.get(name, name))
        return terms[0] if len(terms) == 1 else None

    terms = {name: term_of(name) for name in found.model_classes}
    above = {name: {term, *ontology.ancestors(term, relations)} for name, term in terms.items() if term}
    if not above:
        raise DataError(
            f"{ontology.source}: none of the model's classes ({few(found.model_classes, SHOWN)}) is a term of this ontology; say which term "
            "each is in evaluation.label_ontology.terms ({class: term})"
        )
    found.without_term = [name for name, term in terms.items() if term is None]
    ids = dict(zip(found.model_classes, found.of_model, strict=True))
    left = []
    for label in [*found.of_label, *rest]:
        own = term_of(label)
        place = found.of_label.get(label)
        below = sorted({ids[name] for name in above if own is not None and own in above[name]})
        if place is not None:
            # What a person mapped means just that class; a class of the same name stands for those below it too.
            found.allowed[label] = sorted({place, *(below if found.how[label] == "same name" else [])})
            continue
        if own is None:
            if settings is not None and settings.unmapped == "error":
                left.append(label)
            else:
                found.unrelated.append(label)
            continue
        over = {own, *ontology.ancestors(own, relations)}
        higher = [name for name in above if terms[name] in over]
        nearest = {
            ids[name] for name in higher if not any(terms[name] in above[other] - {terms[other]} for other in higher)
        }
        if len(nearest) == 1:
            found.of_label[label], found.how[label] = nearest.pop(), "ontology"
            found.allowed[label] = sorted({found.of_label[label], *below})
        elif not nearest and len(below) == len(found.names):
            found.too_broad.append(label)
        elif nearest or below:
            found.broader.append(label)
            found.allowed[label] = sorted({*nearest, *below})
        else:
            found.unrelated.append(label)
    return left


def _both_sides(where: str, found: CommonClasses, rest: list[str]) -> str:
    """The message for labels that nothing relates to a class of the model."""
    lines = [f"- {label} ({found.cells[label]} cells)" for label in rest[:SHOWN]]
    more = [f"- and {len(rest) - SHOWN} more"] if len(rest) > SHOWN else []
    verb = "is" if len(rest) == 1 else "are"
    what = f"{verb} no class of the model" + (f" and no term of {found.ontology}" if found.ontology else "")
    template = mapping_template({label: found.cells[label] for label in rest[:SHOWN]}, found.model_classes, {})
    rows = [line for line in template.splitlines() if not line.startswith("#")]
    ways = "" if found.ontology else ", or relate both by the Cell Ontology: evaluation.label_ontology=cl.owl"
    return "\n".join(
        [
            f"{where}: {len(rest)} of the {len(found.cells)} labels of obs['{found.obs_column}'] {what} ({found.column}):",
            *lines,
            *more,
            f"The model's classes are: {few(found.model_classes, 2 * SHOWN)}",
            f"Say which class each label is in a csv file and name it with {KEY}=FILE: a class in place of ?, or nothing to leave the cells of a "
            "label out. `bmfm evaluate ... --write-label-mapping FILE` writes it, with all labels; it begins",
            *rows,
            f"Another obs column may be meant: label=COLUMN{ways}",
        ]
    )


def in_common_classes(label: LabelPredictions, common: CommonClasses, truth: np.ndarray) -> LabelPredictions:
    """Predictions of the model's classes as those of the scored ones: probabilities of merged classes are added up, and the label is the
    likeliest then. `truth` (n,) are ids of scored classes."""
    if not common.merges:
        return LabelPredictions(truth, label.predicted, label.probabilities, list(common.names))
    probabilities = np.zeros((len(truth), len(common.names)))
    for place, own in enumerate(common.of_model):
        probabilities[:, own] += label.probabilities[:, place]
    return LabelPredictions(truth, probabilities.argmax(axis=1), probabilities, list(common.names))


def merged_log_probabilities(values: np.ndarray, common: CommonClasses) -> np.ndarray:
    """Log-probabilities (n, classes of the model) as those of the scored classes (n, scored)."""
    if not common.merges:
        return values
    merged = np.full((len(values), len(common.names)), -np.inf)
    for place, own in enumerate(common.of_model):
        merged[:, own] = np.logaddexp(merged[:, own], values[:, place])
    return merged


def notes_of(common: CommonClasses, cells: int, unlabelled: int) -> list[str]:
    """What was done with labels and classes, in words; `cells` of the data in all, of which `unlabelled` have no label."""

    def listed(labels: Sequence[str]) -> str:
        return few([f"{label} ({common.cells[label]})" for label in labels], SHOWN)

    def total(labels: Sequence[str]) -> int:
        return sum(common.cells[label] for label in labels)

    name, notes = common.column, []
    ways = {
        way: [label for label in common.of_label if common.how[label] == way]
        for way in ("same name", "mapping", "ontology")
    }
    parts = [f"{len(labels)} by {way} ({total(labels)} cells)" for way, labels in ways.items() if labels]
    notes.append(
        f"{name}: {len(common.of_label)} of {len(common.cells)} labels of obs['{common.obs_column}'] are scored as classes of the model"
        + (f": {', '.join(parts)}" if parts else "")
    )
    for way in ("mapping", "ontology"):
        if ways[way]:
            pairs = few([f"{label} -> {common.names[common.of_label[label]]}" for label in ways[way]], SHOWN)
            notes.append(f"{name}: by {way}: {pairs}")
    if common.merges:
        groups = {
            merged: [
                old
                for old, place in zip(common.model_classes, common.of_model, strict=True)
                if common.names[place] == merged
            ]
            for merged in common.names
        }
        said = "; ".join(f"{merged} = {' + '.join(old)}" for merged, old in groups.items() if old != [merged])
        notes.append(
            f"{name}: classes of the model are merged, {len(common.model_classes)} into {len(common.names)}, for the model and its controls alike: {said}"
        )
    if common.excluded:
        notes.append(
            f"{name}: {len(common.excluded)} labels are left out by the mapping, {total(common.excluded)} cells: {listed(common.excluded)}"
        )
    if common.broader:
        notes.append(
            f"{name}: {len(common.broader)} labels are broader than the model's classes, {total(common.broader)} cells that count in "
            f"hierarchical_accuracy alone: {listed(common.broader)}"
        )
    if common.too_broad:
        notes.append(
            f"{name}: {len(common.too_broad)} labels lie above all classes of the model, so that any answer would be right, "
            f"{total(common.too_broad)} cells that are left out: {listed(common.too_broad)}"
        )
    if common.unrelated:
        notes.append(
            f"{name}: {len(common.unrelated)} labels have no related class in {common.ontology}, {total(common.unrelated)} cells that are left out: "
            f"{listed(common.unrelated)}"
        )
    if common.without_term:
        notes.append(
            f"{name}: {len(common.without_term)} classes of the model are no term of {common.ontology}, so no label lies under them: "
            f"{few(common.without_term, SHOWN)}"
        )
    if common.unused:
        notes.append(f"{name}: the mapping also names labels that no cell has: {few(common.unused)}")
    if unlabelled:
        notes.append(f"{name}: {unlabelled} of {cells} cells have no label and are not tested")
    return notes


def score_related(
    result: Evaluation,
    common: CommonClasses,
    values: np.ndarray,
    contenders: Mapping[str, LabelPredictions],
    settings: Settings,
) -> None:
    """Add hierarchical_accuracy of the model and its controls over all cells that the ontology relates to a class, `values` (n,) being labels."""
    if not common.allowed:
        return
    tested = common.tested(values)
    groups = None if settings.groups is None else np.asarray(settings.groups)[tested]
    truth = np.ones(int(tested.sum()), dtype=np.int64)
    for name, predictions in contenders.items():
        right = common.right(values[tested], predictions.predicted[tested]).astype(np.int64)
        # Strata would be classes, which broader labels have none of.
        metric = Metric("accuracy", truth, right)
        note = "right where the predicted class is the label's, or lies under the label, in the ontology"
        add_score(result, metric, common.column, name, settings, groups, shown_as="hierarchical_accuracy", note=note)
