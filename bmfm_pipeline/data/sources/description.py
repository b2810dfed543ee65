"""What an h5ad file holds, in words: before anyone decides what to run on it."""

import shlex
from collections import Counter
from typing import Any

from bmfm_pipeline.config.catalogue import default_transforms
from bmfm_pipeline.data.sources.gene_names import looks_transposed
from bmfm_pipeline.data.sources.label_columns import best_labels, look_at_columns
from bmfm_pipeline.data.sources.matrix_facts import matrix_facts, matrix_names
from bmfm_pipeline.data.sources.name_facts import name_facts, name_problems

PLACE = "data_module.transform_kwargs"
RAW = ("raw/X", "raw.X")


def describe_file(source, quick: bool = False, uri: str | None = None) -> dict[str, Any]:
    """Matrices, values, gene names and obs columns of an opened source, what preprocessing would keep, and what to run.

    `quick` leaves out the pass over all cells. `uri` is how commands name the file (default: its path). Returns "file", "cells",
    "genes", "matrix", "stored", "matrices" (see matrix_facts), "values" (of the matrix in words), "gene_names" (see name_facts),
    "obs" (see look_at_columns), "labels" (likely ones, best first), "layers", "survey" (None when quick, or where nothing can be
    read), "problems" and "next" (the command to run).
    """
    import h5py

    with h5py.File(source.path, "r") as file:
        matrices = [matrix_facts(file, name) for name in matrix_names(file)]
    chosen = next(entry for entry in matrices if entry["name"] == source.where)
    columns = look_at_columns(source.obs)
    labels = best_labels(columns)
    names = name_facts(source.var_names, source.var)
    processed = _is_processed(matrices, columns, chosen)
    if processed:
        chosen["kind"] = "bins"
    counts = (
        chosen if chosen["kind"] == "counts" else next((entry for entry in matrices if entry["kind"] == "counts"), None)
    )
    found = {
        "file": str(uri or source.path),
        "cells": source.n_cells,
        "genes": source.n_genes,
        "matrix": source.where,
        "stored": source.encoding,
        "matrices": matrices,
        "values": values_in_words(chosen),
        "gene_names": names,
        "gene_examples": names["examples"],
        "layers": [*source.layers, *(["raw"] if source.has_raw else [])],
        "obs": columns,
        "labels": [entry["name"] for entry in labels],
        "processed": processed,
        "survey": None,
    }
    problems, blocking = _problems(source, chosen, counts, names, columns, labels, processed)
    if not quick and not blocking:
        found["survey"], more = _survey(source, chosen, counts, processed)
        problems += more
        blocking = blocking or any("cannot be used" in text for text in more)
    found |= {"problems": problems, "next": _next(found, chosen, counts, columns, labels, blocking)}
    found["advice"] = [*problems, found["next"]]
    return found


def values_in_words(matrix: dict[str, Any]) -> str:
    """The kind of values of a matrix, as a sentence without its end."""
    span = f"{matrix['min']:.4g} to {matrix['max']:.4g}"
    to = f" to {matrix['normalised_to']:,g} a cell" if "normalised_to" in matrix else ""
    base = f", {matrix['log_base']}" if "log_base" in matrix else ""
    return {
        "counts": f"whole numbers, as counts are; {span}",
        "bins": f"bins that preprocessing made; {span}",
        "log-normalised": f"not whole numbers: log-normalised{to}{base}; {span}",
        "normalised": f"not whole numbers: normalised{to}; {span}",
        "scaled": f"not counts: values below zero, scaled or corrected; {span}",
        "not finite": f"holds NaN or infinite values; {span} otherwise",
        "empty": "no value above zero",
    }[matrix["kind"]]


def _is_processed(matrices: list[dict[str, Any]], columns: list[dict[str, Any]], chosen: dict[str, Any]) -> bool:
    """Whether this is a file that preprocessing wrote: bins in X, the counts beside them, and a split."""
    kinds = {entry["name"]: entry["kind"] for entry in matrices}
    split = any(entry["role"] == "split" for entry in columns)
    return split and kinds.get("layers/counts") == "counts" and chosen["name"] == "X" and chosen["max"] <= 1000


def _problems(source, chosen, counts, names, columns, labels, processed) -> tuple[list[str], bool]:
    """(what is wrong and what to do, whether nothing can be run before it is mended)."""
    if 0 in source.shape:
        what = "cells" if source.n_cells == 0 else "genes"
        return [
            f"the file has no {what}: {source.n_cells} cells x {source.n_genes} genes; check the step that wrote it"
        ], True
    problems, blocking = [], False
    if swapped := looks_transposed(source.obs_names, source.var_names):
        problems.append(swapped)
        blocking = True
    if chosen["kind"] not in ("counts", "bins"):
        problems.append(_no_counts(source, chosen, counts))
        blocking = blocking or (counts is None and chosen["kind"] != "log-normalised")
    twice = [str(name) for name, count in Counter(source.obs_names).items() if count > 1]
    if twice:
        problems.append(
            f"{len(twice):,} cell names repeat (e.g. {', '.join(twice[:3])}): make them unique, adata.obs_names_make_unique()"
        )
        blocking = True
    problems += name_problems(names)
    if chosen["unsorted"]:
        problems.append("indices are not sorted within cells, or repeat: harmless here, other programs may refuse it")
    if labels and labels[0]["small"] and not processed:
        shown = ", ".join(f"'{name}'" for name in labels[0]["small"][:3])
        problems.append(
            f"{len(labels[0]['small'])} classes of {labels[0]['name']} have fewer than 3 cells (e.g. {shown}) and cannot be split: add "
            f"{PLACE}.split.rare_classes=train"
        )
    return problems, blocking


def _no_counts(source, chosen: dict[str, Any], counts: dict[str, Any] | None) -> str:
    if counts is None:
        cure = (
            "no layer of the file holds counts, nor .raw: give the file as it was before normalisation, which controls and many models "
            f"need, or, where the logarithm of normalised counts was taken, say so ({PLACE}.input_values=log_normalised): nothing is then "
            "normalised again, and controls read the values as they are"
        )
    else:
        cure = f"{_called(counts)} holds counts: set {PLACE}.layer={_layer(counts)}"
    return f"counts are needed, and {chosen['name']} is {chosen['kind']}; {cure}"


def _called(matrix: dict[str, Any]) -> str:
    layer = _layer(matrix)
    return {"X": "X", "raw": ".raw"}.get(layer, f"layer '{layer}'")


def _layer(matrix: dict[str, Any]) -> str:
    return "raw" if matrix["name"] in RAW else matrix["name"].removeprefix("layers/")


def _survey(source, chosen, counts, processed) -> tuple[dict[str, Any], list[str]]:
    """(one pass over the matrix with counts, problems that only a whole pass shows)."""
    from bmfm_pipeline.data.sources.h5ad import open_source
    from bmfm_pipeline.data.transforms import build_chain
    from bmfm_pipeline.data.transforms.survey import survey

    matrix = counts or chosen
    if matrix is not chosen or source.duplicate_genes == "refuse":
        layer = None if matrix["name"] == "X" else _layer(matrix)
        source = open_source(source.path, layer, "sum")
    chain = build_chain(default_transforms()) if matrix["kind"] == "counts" and not processed else None
    plain = survey(source, chain).to_plain()
    plain["matrix"] = matrix["name"]
    problems = []
    for name, words in (
        ("not_finite", "NaN or infinite"),
        ("negative", "below zero"),
        ("fractional", "no whole numbers"),
    ):
        if matrix["kind"] == "counts" and plain[name]:
            problems.append(
                f"{matrix['name']}: {plain[name]:,} values are {words}, among counts; it cannot be used before that is mended"
            )
    return plain, problems


def _next(found, chosen, counts, columns, labels, blocking: bool) -> str:
    """The command to run next."""
    file = shlex.quote(found["file"])
    if found["processed"]:
        words = f"data_module.transform_datasets=false data_module.dataset_kwargs.processed_data_source={file}"
        return f"bmfm pretrain -cn pre_train_config {words}"
    if blocking:
        return f"mend the file, then: bmfm data inspect {file}"
    words = [f"bmfm run {file}"]
    if labels:
        words.append(f"label={shlex.quote(labels[0]['name'])}")
    matrix = counts or chosen
    if matrix["name"] != "X":
        words.append(f"{PLACE}.layer={shlex.quote(_layer(matrix))}")
    if counts is None:
        words.append(f"{PLACE}.input_values=log_normalised")
    if found["gene_names"]["repeated"]:
        words.append(f"{PLACE}.duplicate_genes=sum")
    if labels and labels[0]["small"]:
        words.append(f"{PLACE}.split.rare_classes=train")
    return " ".join(words)
