"""A processed artefact as training needs it: cells, vocabularies, labels and splits, made into field specs and model fields."""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.batching import BatchingConfig, FieldSpec, ZeroExposure, choose_rows
from bmfm_pipeline.batching.pairs import LAYERS, SIGNED
from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.splits import resolve_split
from bmfm_pipeline.data.label_files import read_label_dict
from bmfm_pipeline.data.label_ontology import read_allowed
from bmfm_pipeline.data.perturbations import read_record
from bmfm_pipeline.data.splits import part_of_each_class, read_split_info
from bmfm_pipeline.data.store import CellStore
from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.objectives import ClassTables
from bmfm_pipeline.storage import localise
from bmfm_pipeline.training.gene_tables import builder_options
from bmfm_pipeline.training.perturbed import PerturbedCells
from bmfm_pipeline.vocabulary import MultiFieldVocabulary
from bmfm_pipeline.vocabulary.building import READ_DEPTH_TOKENS

logger = logging.getLogger(__name__)
WITHOUT_COUNTS = "data_module.sqrt_normalize_transform: the processed data holds no raw counts, so square roots are taken of the shares of its values (X)"


class PreparedData:
    """The folder of a preprocess artefact, local or on s3: processed.h5ad, split.json, label_dict.json, tokenizers/."""

    def __init__(self, folder: str | Path):
        self.folder = localise(folder)
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

    @cached_property
    def split_group(self) -> str | None:
        """The obs column whose values the split kept whole, such as the donor."""
        info = read_split_info(self.folder)
        return info.get("group") or info.get("made_as", {}).get("group")

    @cached_property
    def perturbed(self) -> PerturbedCells | None:
        """What the artefact knows of perturbations; None where it was not made of perturbed cells."""
        return PerturbedCells.of(self.folder, self.store)

    def rows(self, split: str) -> np.ndarray:
        """The cells of a split, int64, ascending; of perturbed data the perturbed ones, for control cells stand beside these."""
        rows = self.store.rows_of_split(split, self.split_column)
        return rows if self.perturbed is None else self.perturbed.only(rows)

    @property
    def gene_columns(self) -> list[str]:
        """The genes that a batch may show: those of the columns, then targets of perturbations that were not measured."""
        return [*self.store.var_names, *(self.perturbed.unmeasured if self.perturbed is not None else ())]

    def training_rows(self, run: RunConfig) -> np.ndarray:
        """Rows that a run learns from, int64, ascending: of the training split the share data_module.train_fraction, of these as many as
        limit_dataset_samples lets in. Models and controls of a run are fitted to these and no others.

        The share is drawn by class of the first label column with one class a cell, at least one cell of each, and depends on the seed of
        the split: a larger share contains the smaller ones, whatever the seed of the training.
        """
        rows, module = self.rows("train"), run.data_module
        if module.train_fraction is not None and len(rows):
            names = self.store.obs_names
            kept = part_of_each_class(
                [names[row] for row in rows], self._classes(run)[rows], module.train_fraction, resolve_split(run).seed
            )
            rows = rows[kept]
        limit = module.limit_dataset_samples
        limit = limit.get("train") if isinstance(limit, dict) else limit
        return choose_rows(rows, limit, run.seed.seed_value)

    def training_sentence(self, run: RunConfig) -> str:
        """How many cells data_module.train_fraction left to learn from, in words."""
        rows, classes = self.training_rows(run), self._classes(run)
        sizes = np.bincount(classes[rows])
        single = int((sizes[1:] == 1).sum())
        few = f"; {single} {'class has' if single == 1 else 'classes have'} a single cell" if single else ""
        return f"data_module.train_fraction {run.data_module.train_fraction:g}: {len(rows)} of {len(self.rows('train'))} training cells{few}"

    def _classes(self, run: RunConfig) -> np.ndarray:
        """The class of each cell that shares are drawn by, from 0; cells without a label are a class, and all are one without labels."""
        for column in run.label_columns:
            if not (column.is_regression_label or column.is_multilabel):
                labels = self.labels(run)[column.label_column_name]
                return np.where(labels < 0, 0, labels + 1).astype(np.int64)
        return np.zeros(len(self.store.obs_names), dtype=np.int64)

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
        return field_specs(run, self.vocabularies, self.gene_columns)

    def batching_config(self, run: RunConfig) -> BatchingConfig:
        """What the batch builder reads of `run`, for these cells."""
        if run.data_module.sqrt_normalize_transform and self._counts is None:
            logger.warning(WITHOUT_COUNTS)
        return batching_config(run, self.vocabularies, self._counts, self._most_reads)

    def builder_options(self, run: RunConfig) -> dict[str, Any]:
        """Tables and weights by gene that `run` names, as keyword arguments of the batch builder."""
        if run.data_module.sequences is not None:
            return {"reverse_complement": run.data_module.sequences.reverse_complement}
        options = builder_options(run, self.gene_columns, self.folder / "transforms.json")
        if run.predicts_pairs:
            if self.perturbed is None:
                read_record(self.folder)  # says what to run
            options["pairs"] = self.perturbed.table(run)
        return options

    @property
    def _counts(self) -> str | None:
        """The matrix of raw counts; None where X itself is all there is."""
        return "counts" if getattr(self.store, "counts", None) is not None else None

    def _most_reads(self) -> int:
        """The largest total count of a training cell."""
        from bmfm_pipeline.batching.arranging import largest_total
        from bmfm_pipeline.batching.matrices import CellMatrix

        matrix = CellMatrix(self.store if self._counts is None else self.store.counts, self.store.shape[0])
        rows = self.rows("train")
        blocks = (rows[start : start + 10_000] for start in range(0, len(rows), 10_000))
        most = round(max((largest_total(*matrix.select(block)) for block in blocks), default=0.0))
        if most < 1:
            raise DataError(f"{self.folder}: no training cell has a read, so rda_transform has nothing to align to")
        return most

    def labels(self, run: RunConfig) -> dict[str, np.ndarray]:
        """{label column: of every cell the class id (cells,), the number (cells,), or 0 and 1 for each class (cells, classes)}."""
        found = {}
        for column in run.label_columns:
            name = column.label_column_name
            known = None if column.is_regression_label else self.label_dict.get(name)
            if known is None and not column.is_regression_label:
                raise ConfigError(
                    f"label_columns: '{name}' is not in the label dictionary of the data ({', '.join(self.label_dict)})"
                )
            separator = column.multilabel_str_sep if column.is_multilabel else None
            found[name] = self.store.labels(name, known, column.silent_label_values, separator)
        return found

    def units(self, run: RunConfig) -> dict[str, dict[str, float]]:
        """{regression column: value_mean and value_scale of the cells that are trained on}, which its head counts in.

        Left out are columns that do not vary, and those whose loss takes the score through a link function.
        """
        linked = {entry.get("label_column_name") for entry in run.trainer.losses or [] if entry.get("link_function")}
        names = [column.label_column_name for column in run.label_columns if column.is_regression_label]
        found: dict[str, dict[str, float]] = {}
        if not names:
            return found
        labels, rows = self.labels(run), self.training_rows(run)
        for name in (name for name in names if name not in linked):
            values = labels[name][rows].astype(np.float64)
            values = values[np.isfinite(values)]
            if len(values) and values.std() > 0:
                found[name] = {"value_mean": float(values.mean()), "value_scale": float(values.std())}
        return found

    def class_tables(self, run: RunConfig) -> dict[str, ClassTables]:
        """Of each label column with classes: training cells of each class, and which classes its ontology puts under which.

        Counted are the cells that are trained on.
        """
        rows = self.training_rows(run)
        tables = {}
        for name, values in self.labels(run).items():
            known, own = self.label_dict.get(name), values[rows]
            if values.ndim == 2:
                tables[name] = ClassTables(np.stack([(own == 0).sum(axis=0), (own > 0).sum(axis=0)]))
            elif known and np.issubdtype(values.dtype, np.integer):
                counts = np.bincount(own[own >= 0], minlength=max(known.values()) + 1)
                tables[name] = ClassTables(counts, read_allowed(self.folder, name, known))
        return tables

    def token_values(self, run: RunConfig) -> dict[str, np.ndarray]:
        """The number each token stands for, for tokenised fields whose tokens are numbers."""
        tables = {}
        for entry in run.fields:
            vocabulary = self.vocabularies.get(entry.field_name)
            if vocabulary is None or entry.continuous or vocabulary.subwords:
                continue
            if entry.field_name != "genes":
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
                layer=entry.field_name if run.predicts_pairs and entry.field_name in LAYERS else None,
                signed=entry.field_name in SIGNED,
                value_ids=vocabulary.value_ids() if vocabulary and not is_genes else None,
                never_switch=tuple(index for index in vocabulary.ids(READ_DEPTH_TOKENS).tolist() if index)
                if vocabulary
                else (),
            )
        )
    return specs


def prefix_ids(run: RunConfig, vocabularies: MultiFieldVocabulary) -> tuple[int, ...]:
    """Ids of the tokens before the genes of every cell: [CLS], or tokenizer.prepend_tokens instead. Raises DataError."""
    used = [entry.field_name for entry in run.fields if entry.field_name in vocabularies]
    return MultiFieldVocabulary({name: vocabularies[name] for name in used}).prefix_ids(run.tokenizer.prepend_tokens)


def batching_config(
    run: RunConfig,
    vocabularies: MultiFieldVocabulary,
    counts: str | None = None,
    most_reads: Callable[[], int] | None = None,
) -> BatchingConfig:
    """What the batch builder reads of the data module and tokenizer sections.

    `counts` names the store's matrix of raw counts, which read-depth transforms need; `most_reads` tells the reads of the deepest
    training cell, for rda_transform=auto_align. Raises ConfigError where the vocabulary lacks the tokens that are needed.
    """
    module = run.data_module
    zeros, strategy = module.pad_zero_expression_strategy, module.masking_strategy
    depth = module.rda_transform
    if depth == "auto_align":
        depth = most_reads()
    whole = strategy is not None and strategy.kind == "wced"
    return BatchingConfig(
        collation_strategy=module.collation_strategy,
        mlm=module.masks,
        max_length=module.max_length,
        max_mfi_data_len=module.max_mfi_data_len,
        limit_genes=None if module.limit_genes is None else "tokenizer",
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
        prefix_ids=prefix_ids(run, vocabularies),
        log_normalize_transform=module.log_normalize_transform,
        values_from=counts if depth is not None or module.sqrt_normalize_transform else None,
        sqrt_normalize_transform=module.sqrt_normalize_transform,
        sequence_dropout_factor=module.sequence_dropout_factor,
        selective_dropout=module.selective_dropout.fraction if module.selective_dropout else 0.0,
        expose_zeros=module.dataset_kwargs.expose_zeros == "all",
        zeros=None if zeros is None else ZeroExposure(**zeros.model_dump()),
        rda_transform=depth,
        depth_ids=None if depth is None else _depth_ids(vocabularies),
        wced_targets=tuple(strategy.label_sets) if whole else (),
        wced_normalize=strategy.normalize if whole else True,
        weigh_evaluation=strategy is not None and strategy.use_for_validation,
    )


def _depth_ids(vocabularies: MultiFieldVocabulary) -> tuple[int, int]:
    seen, asked = vocabularies["genes"].ids(READ_DEPTH_TOKENS).tolist()
    if not (seen and asked):
        raise ConfigError(
            f"data_module.rda_transform: the genes vocabulary has no {' and '.join(READ_DEPTH_TOKENS)}, the tokens that tell a cell's "
            "read depth; use a vocabulary that has them (tokenizer.identifier=data builds one), or set rda_transform=null"
        )
    return seen, asked
