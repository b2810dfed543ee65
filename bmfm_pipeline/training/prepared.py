"""A processed artefact as training needs it: cells, vocabularies, labels and splits, made into field specs and model fields."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.batching import BatchingConfig, FieldSpec
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.data.labels import read_label_dict
from bmfm_pipeline.data.splits import read_split_info
from bmfm_pipeline.data.store import CellStore
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.vocabulary import MultiFieldVocabulary


class PreparedData:
    """The folder of a preprocess artefact: processed.h5ad, split.json, label_dict.json, tokenizers/."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "processed.h5ad").exists():
            raise DataError(f"{self.folder}: holds no processed.h5ad; make it with `bmfm preprocess`")

    @cached_property
    def store(self) -> CellStore:
        return CellStore(self.folder / "processed.h5ad")

    @cached_property
    def vocabularies(self) -> MultiFieldVocabulary:
        return MultiFieldVocabulary.load(self.folder)

    @cached_property
    def label_dict(self) -> dict[str, dict[str, int]]:
        return read_label_dict(self.folder / "label_dict.json")

    @cached_property
    def split_column(self) -> str:
        return read_split_info(self.folder)["column"]

    def rows(self, split: str) -> np.ndarray:
        return self.store.rows_of_split(split, self.split_column)

    def field_dicts(self, run: RunConfig) -> list[dict[str, Any]]:
        """The fields of `run` with vocabulary sizes, special tokens and vocabulary hashes filled in, for the model."""
        filled = []
        for entry in run.model_dump(mode="json")["fields"]:
            vocabulary = self.vocabularies.get(entry["field_name"])
            if vocabulary is None and entry["tokenization_strategy"] == "tokenize":
                known = ", ".join(self.vocabularies)
                raise ConfigError(
                    f"fields: '{entry['field_name']}' has no vocabulary in the data; fields with one: {known}"
                )
            special = self.vocabularies.get("expressions") or vocabulary
            entry["num_special_tokens"] = special.n_special if special else 5
            if vocabulary is not None:
                entry.update(vocab_size=len(vocabulary), vocab_sha256=vocabulary.sha256)
            filled.append(entry)
        return filled

    def field_specs(self, run: RunConfig) -> list[FieldSpec]:
        """The fields of `run` as the batch builder takes them."""
        return field_specs(run, self.vocabularies, self.store.var_names)

    def labels(self, run: RunConfig) -> dict[str, np.ndarray]:
        """{label column: class ids or values of every cell}."""
        found = {}
        for column in run.label_columns:
            name = column.label_column_name
            known = None if column.is_regression_label else self.label_dict.get(name)
            if known is None and not column.is_regression_label:
                raise ConfigError(
                    f"label_columns: '{name}' is not in the label dictionary of the data ({', '.join(self.label_dict)})"
                )
            found[name] = self.store.labels(name, known, column.silent_label_values)
        return found

    def token_values(self, run: RunConfig) -> dict[str, np.ndarray]:
        """The number each token stands for, for tokenised fields whose tokens are numbers."""
        tables = {}
        for entry in run.fields:
            vocabulary = self.vocabularies.get(entry.field_name)
            if vocabulary is not None and not entry.continuous and entry.field_name != "genes":
                tables[entry.field_name] = vocabulary.token_values()
        return tables


def field_specs(run: RunConfig, vocabularies: MultiFieldVocabulary, gene_names: list[str]) -> list[FieldSpec]:
    """The fields of `run` for cells whose columns are `gene_names`, as the batch builder takes them."""
    specs = []
    for entry in run.fields:
        vocabulary = vocabularies.get(entry.field_name)
        is_genes = entry.field_name == "genes"
        specs.append(
            FieldSpec(
                name=entry.field_name,
                role="genes" if is_genes else "values",
                tokenized=not entry.continuous,
                is_masked=entry.is_masked,
                is_input=entry.is_input,
                vocab_size=len(vocabulary) if vocabulary else 0,
                num_special_tokens=vocabulary.n_special if vocabulary else 5,
                column_ids=vocabulary.ids(gene_names) if is_genes and vocabulary else None,
                value_ids=vocabulary.value_ids() if vocabulary and not is_genes else None,
            )
        )
    return specs


def batching_config(run: RunConfig) -> BatchingConfig:
    """The part of the data module section that the batch builder reads."""
    module = run.data_module
    return BatchingConfig(
        collation_strategy=module.collation_strategy,
        mlm=module.masks,
        max_length=module.max_length,
        max_mfi_data_len=module.max_mfi_data_len,
        limit_genes=module.limit_genes,
        padding=module.padding,
        truncation=module.truncation,
        pad_to_multiple_of=module.pad_to_multiple_of,
        sequence_order=module.sequence_order,
        change_ratio=module.change_ratio,
        mask_ratio=module.mask_ratio,
        switch_ratio=module.switch_ratio,
        comask_across_fields=module.comask_across_fields,
        prevent_attention_to_masked=module.prevent_attention_to_masked,
        seed=run.seed.seed_value,
    )
