"""Which obs columns could be labels, which tell donors or batches apart, which split the cells; the rest in words."""

import re
from typing import Any

from bmfm_pipeline.data.label_values import missing_mask

SHOWN_CLASSES, MOST_CLASSES = 6, 200
_LABEL = re.compile(
    r"cell.?(type|state|class|label|identity|annot)|annot|^(label|class|subclass|identity|type)s?$|bulk_labels|celltypist|subpop|lineage",
    re.I,
)
_CLUSTER = re.compile(r"cluster|leiden|louvain|^(res|snn|rna_snn)[._]|phenograph", re.I)
_GROUP = re.compile(
    r"donor|patient|subject|individual|^indiv|participant|batch|sample|library|^lane|plate|replicate|channel|orig.?ident|dataset|study|^run$|chip|^pool",
    re.I,
)
_PERSON = re.compile(r"donor|patient|subject|individual|^indiv|participant", re.I)
_DESCRIBES = re.compile(
    r"sex|gender|age|disease|condition|tissue|organ|stage|phase|ethnic|assay|protocol|treat|perturb|drug|dose|species|organism|suspension",
    re.I,
)
_SPLIT_WORDS = {"train", "training", "dev", "val", "valid", "validation", "test", "testing", "unused"}
_ONTOLOGY = re.compile(r"^[A-Za-z]+:\d{4,}$")
LIKELY, POSSIBLE = (
    0.6,
    0.45,
)  # scores from which a column is taken for a label, and from which one is when no other is likelier


def look_at_columns(obs) -> list[dict[str, Any]]:
    """One entry a column of obs (DataFrame), in its order: "name", "what" (in words), "role" and "score".

    Roles: label (score 0 to 1, how likely it is one to predict), group (donors, batches), split, number, id, constant, empty.
    Labels also have "classes", "smallest" (cells of the smallest class), "small" (names of classes with fewer than 3 cells) and
    "missing".
    """
    return [_column(str(name), obs[name]) for name in obs.columns]


def best_labels(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns that are likely labels, best first; one that is only possible when none is likely."""
    labels = sorted((entry for entry in columns if entry["role"] == "label"), key=lambda entry: -entry["score"])
    likely = [entry for entry in labels if entry["score"] >= LIKELY]
    return likely or [entry for entry in labels[:1] if entry["score"] >= POSSIBLE]


def _column(name: str, values) -> dict[str, Any]:
    missing = int(missing_mask(values).sum())
    also = f", {missing:,} missing" if missing else ""
    counts = values[~missing_mask(values)].value_counts()
    counts = counts[counts > 0]
    n_cells, n_classes = len(values) - missing, len(counts)
    plain = {"name": name, "score": 0.0, "missing": missing}
    if n_classes == 0:
        return plain | {"role": "empty", "what": "every value is missing"}
    shown = ", ".join(f"{entry} ({count:,})" for entry, count in counts.head(SHOWN_CLASSES).items())
    more = ", ..." if n_classes > SHOWN_CLASSES else ""
    is_number = values.dtype.kind in "fiu"
    if n_classes == 1:
        return plain | {"role": "constant", "what": f"one value: {shown}{also}"}
    texts = [str(entry) for entry in counts.index]
    words = {entry.lower() for entry in texts}
    if words <= _SPLIT_WORDS or (words & {"train", "training"} and "split" in name.lower()):
        return plain | {"role": "split", "what": f"a split: {shown}{also}"}
    whole = is_number and bool((values.dropna() == values.dropna().round()).all())
    if is_number and (not whole or (n_classes > 50 and not _GROUP.search(name))):
        return plain | {"role": "number", "what": f"numbers {values.min():.4g} to {values.max():.4g}{also}"}
    if n_cells > 20 and n_classes > 0.9 * n_cells:
        return plain | {"role": "id", "what": f"an id: {n_classes:,} different values, e.g. {texts[0]}{also}"}
    what = f"{n_classes:,} classes: {shown}{more}{also}"
    if _GROUP.search(name) and not _LABEL.search(name):
        return plain | {"role": "group", "classes": n_classes, "person": bool(_PERSON.search(name)), "what": what}
    if is_number and not (_LABEL.search(name) or _CLUSTER.search(name)) and n_classes > SHOWN_CLASSES:
        return plain | {"role": "number", "what": f"numbers {values.min():.4g} to {values.max():.4g}{also}"}
    if n_classes > max(MOST_CLASSES, n_cells // 20):
        return plain | {"role": "id", "what": f"{n_classes:,} different values, e.g. {texts[0]}{also}"}
    small = [str(entry) for entry, count in counts.items() if count < 3]
    return plain | {
        "role": "label",
        "score": round(_score(name, texts, counts.to_numpy(), missing / len(values), is_number), 2),
        "classes": n_classes,
        "smallest": int(counts.min()),
        "small": small,
        "what": what,
    }


def _score(name: str, texts: list[str], counts, share_missing: float, is_number: bool) -> float:
    """0 to 1: named like a label, classes with words for names, few enough and large enough to learn."""
    score = 0.3
    if _LABEL.search(name):
        score += 0.5
    elif _CLUSTER.search(name):
        score += 0.1
    elif _DESCRIBES.search(name):
        score -= 0.1
    if any(letter.isalpha() for entry in texts for letter in entry) and not is_number:
        score += 0.1
    if 3 <= len(texts) <= MOST_CLASSES:
        score += 0.1
    elif len(texts) > MOST_CLASSES:
        score -= 0.3
    if "ontology" in name.lower() or sum(bool(_ONTOLOGY.match(entry)) for entry in texts) > len(texts) / 2:
        score -= 0.2
    if sum(map(len, texts)) > 40 * len(texts):  # formulas or sentences, not names of classes
        score -= 0.3
    score -= 0.2 * float((counts < 3).mean())
    return max(0.0, min(1.0, score * (1 - share_missing)))
