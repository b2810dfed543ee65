"""The vocabularies of a run: built from data or a gene table, or read from a folder; completed by training cells where asked for."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig, require_path
from bmfm_pipeline.data.sources.gene_names import check_genes
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.storage import localise, read_json, write_json_atomic
from bmfm_pipeline.vocabulary import MultiFieldVocabulary, build_vocabularies
from bmfm_pipeline.vocabulary.building import hgnc_genes, with_tokens, with_values

logger = logging.getLogger(__name__)
CHUNK = 20_000  # cells looked at together


def fixed_vocabularies(
    run: RunConfig, n_values: int | None = None, folder: str | Path | None = None, table: str | Path | None = None
) -> MultiFieldVocabulary | None:
    """The vocabularies that do not depend on the cells; None where the data's genes are the vocabulary.

    `folder`: where the tokenizer folder lies on this machine, `table` the gene-name table, when they are not where the config says.
    Raises ConfigError and DataError.
    """
    identifier = run.tokenizer.identifier
    if identifier == "data":
        return None
    if run.tokenizer.is_folder:
        return MultiFieldVocabulary.load(localise(folder or require_path(identifier, "tokenizer.identifier")))
    if table is None:
        raise ConfigError(
            f"tokenizer.identifier {identifier} is built from a table of gene names; set "
            "data_module.transform_kwargs.gene_names.table=hgnc after `bmfm genes download`, or name the file there"
        )
    return build_vocabularies(hgnc_genes(table, identifier == "hgnc_protein_coding"), n_values, _prepended(run))


def make_vocabularies(
    run: RunConfig, genes: Sequence[str], n_values: int | None, fixed: MultiFieldVocabulary | None
) -> tuple[MultiFieldVocabulary, dict[str, Any]]:
    """The vocabularies of cells with these `genes`, and numbers on them for a person.

    `genes` are those of the transformed training cells, `n_values` how many bins their values have; `fixed` is what
    `fixed_vocabularies` gave. Raises DataError when no gene is known, or a token of tokenizer.prepend_tokens is missing.
    """
    if fixed is None:
        vocabularies = build_vocabularies(genes, n_values, _prepended(run))
        summary = {"genes": len(genes), "known": len(genes), "unknown": 0, "unknown_examples": []}
    else:
        vocabularies = MultiFieldVocabulary(fixed)
        if "genes" not in vocabularies:
            raise DataError(
                f"tokenizer.identifier {run.tokenizer.identifier}: has vocabularies of {', '.join(vocabularies)}, none of genes"
            )
        if "genes" in _dynamic(run):
            before = len(vocabularies["genes"])
            vocabularies["genes"] = with_tokens(vocabularies["genes"], genes)
            added = {"added_genes": len(vocabularies["genes"]) - before}
        else:
            added = {}
        # Whether enough is known was decided by counts when the input was checked.
        summary = check_genes(genes, vocabularies["genes"].tokens, run.tokenizer.identifier, min_share=0) | added
    vocabularies.prefix_ids(run.tokenizer.prepend_tokens)
    return vocabularies, summary | {"tokens": {name: len(vocabulary) for name, vocabulary in vocabularies.items()}}


def complete_vocabularies(run: RunConfig, folder: Path, split_column: str) -> dict[str, int]:
    """Give dynamic value fields a token for every whole value up to the largest in the processed training cells of `folder`.

    With fit_on: all, up to the largest of all cells. Returns {field: tokens added}; later values without a token are [UNK].
    """
    fields = [name for name in _dynamic(run) if name != "genes"]
    if not fields:
        return {}
    from bmfm_pipeline.data.store import CellStore

    store = CellStore(folder / "processed.h5ad")
    chosen = np.ones(store.n_cells, dtype=bool)
    if run.data_module.transform_kwargs.fit_on != "all":
        chosen = store.column(split_column) == "train"
    largest = largest_value(store, chosen.astype(bool))
    vocabularies, added = MultiFieldVocabulary.load(folder), {}
    for name in fields:
        grown = with_values(vocabularies[name], largest, f"fields.{name}: vocab_update_strategy dynamic")
        added[name] = len(grown) - len(vocabularies[name])
        vocabularies[name] = grown
    vocabularies.save(folder)
    file = folder / "vocabulary.json"
    summary = read_json(file)
    summary |= {"tokens": {name: len(vocabulary) for name, vocabulary in vocabularies.items()}, "added_values": added}
    write_json_atomic(file, summary)
    return added


def largest_value(store, chosen: np.ndarray) -> float:
    """The largest finite stored value of the chosen cells, bool (cells,); 0 when there is none. Reads the file once, in pieces."""
    largest = 0.0
    indptr = np.asarray(store.indptr, dtype=np.int64)
    for start in range(0, store.n_cells, CHUNK):
        stop = min(start + CHUNK, store.n_cells)
        values = store.data[indptr[start] : indptr[stop]]
        values = values[np.repeat(chosen[start:stop], np.diff(indptr[start : stop + 1]))]
        if values.dtype.kind == "f":
            values = values[np.isfinite(values)]
        largest = max(largest, float(values.max(initial=0)))
    return largest


def _dynamic(run: RunConfig) -> list[str]:
    return [entry.field_name for entry in run.fields if entry.vocab_update_strategy == "dynamic"]


def _prepended(run: RunConfig) -> list[str]:
    return run.tokenizer.prepend_tokens or []
