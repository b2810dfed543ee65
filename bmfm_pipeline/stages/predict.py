"""Predict: labels, probabilities and embeddings for the cells of an h5ad file, with nothing but a model folder.

Gene mapping and the fitted normalisation travel with the model; row filters do not: every cell of the input has a row in the output,
and a cell that cannot be used has an empty label and a reason.
"""

import csv
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.strict import readable
from bmfm_pipeline.data.label_files import read_label_dict
from bmfm_pipeline.data.sources import check_genes, open_source
from bmfm_pipeline.data.sources.checks import check_names, where_counts_lie
from bmfm_pipeline.data.stores import MemoryStore
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.errors import CheckpointError, ConfigError, DataError
from bmfm_pipeline.stages.gene_names import merges_genes
from bmfm_pipeline.stages.models import find_checkpoint
from bmfm_pipeline.stages.prediction_settings import left_to_defaults, merge_settings, settings_of_config
from bmfm_pipeline.storage import Workspace, disk_errors, localise, read_json, strip_userinfo
from bmfm_pipeline.tracking import EXPERIMENT, StageTracker, tracking_uri
from bmfm_pipeline.training.gene_tables import builder_options, with_kept_tables
from bmfm_pipeline.training.prepared import batching_config, field_specs
from bmfm_pipeline.vocabulary import MultiFieldVocabulary

FILES = ("predictions.csv", "probabilities.csv", "logits.csv", "embeddings.csv")
_ASKED_BY = ("output_predictions", "output_embeddings")
_OTHER_NAMES = (
    "Rename the genes of the file to the names that the model was trained with; a model whose data were preprocessed with "
    "data_module.transform_kwargs.gene_names.table=hgnc (after `bmfm genes download`) takes symbols, aliases and Ensembl ids alike"
)
Progress = Callable[[dict[str, Any]], None]
logger = logging.getLogger(__name__)
BY_DEFAULT = (
    "%s does not say how cells are prepared for it, so these settings are used: %s. Change one with data_module.KEY=VALUE, and compare "
    "predictions with known ones before relying on them"
)
UNKNOWN_VALUES = "%d expression values were not among those of the training cells and were read as [UNK]"


@dataclass
class Predictor:
    """A model folder, opened: network, transforms, vocabularies and class names."""

    folder: Path
    run: RunConfig
    chain: Chain
    vocabularies: MultiFieldVocabulary
    class_names: dict[str, list[str]]
    pooling: Any = "first_token"
    values_from: str | None = None
    published: bool = False  # elsewhere, without settings of the data; `defaults` are those that nobody has chosen
    defaults: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: str | Path, settings: dict[str, Any] | None = None, insist: bool = True) -> "Predictor":
        """Read what a training stage exported.

        `settings` are keys of the data module, for a model that carries none (`defaults` then lists those left to defaults); a model
        of ours is used as it was trained, and settings are refused, or left aside unless `insist`. Raises CheckpointError when the folder lacks what prediction needs, ConfigError.
        """
        folder = Path(folder)
        for name in ("config.json", "bmfm.json", "transforms.json"):
            if not (folder / name).exists():
                raise CheckpointError(
                    f"{folder}: holds no {name}; name a model that `bmfm finetune` or `bmfm pretrain` published"
                )
        stored = read_json(folder / "bmfm.json")
        module = with_kept_tables(stored["data_module"], folder)
        chain, defaults = Chain.from_json(read_json(folder / "transforms.json")), stored.get("defaults")
        if defaults is None and not insist:
            settings = None
        if settings and defaults is None:
            raise ConfigError(
                f"data_module.{next(iter(settings))}: cannot be changed for a model that is trained already: cells are prepared as its "
                "training cells were"
            )
        if settings:
            module, defaults = merge_settings(module, settings), left_to_defaults(defaults, settings)
            if "transforms" in settings.get("transform_kwargs", {}):
                chain = build_chain(module["transform_kwargs"]["transforms"] or [])
        module |= {"collation_strategy": "sequence_classification", "mlm": False, "masking_strategy": None}
        plain = {
            "fields": stored["fields"],
            "label_columns": stored["label_columns"],
            "seed": stored["seed"],
            "data_module": module,
            "tokenizer": stored.get("tokenizer") or {},
        }
        known = read_label_dict(folder / "label_dict.json") if (folder / "label_dict.json").exists() else {}
        heads = {entry["label_column_name"] for entry in read_json(folder / "config.json").get("label_columns") or []}
        names = {}
        for column in stored["label_columns"]:
            name = column["label_column_name"]
            if name in heads:
                ids = {} if column["is_regression_label"] else known[name]
                names[name] = sorted(ids, key=ids.get)
        trainer = read_json(folder / "run_config.json")["trainer"] if (folder / "run_config.json").exists() else {}
        vocabularies = MultiFieldVocabulary.load(folder)
        if "genes" not in vocabularies:
            raise CheckpointError(f"{folder}: reads {', '.join(vocabularies)}, so it cannot predict for cells of genes")
        try:
            run = RunConfig.model_validate({**plain, "task": {"kind": "predict"}})
        except ValidationError as error:
            raise readable(error) from None
        return cls(
            folder,
            run,
            chain,
            vocabularies,
            names,
            trainer.get("pooling_method", stored.get("pooling_method", "first_token")),
            stored.get("values_from"),
            defaults is not None,
            tuple(defaults or ()),
        )


def predict_file(
    model: str,
    file: str,
    output: str | Path,
    *,
    layer: str | None = None,
    batch_size: int | None = None,
    pooling: Any = None,
    settings: dict[str, Any] | None = None,
    insist: bool = True,
    files: Collection[str] = FILES,
    workspace: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write predictions.csv (cell, each label, reason), probabilities.csv, logits.csv and embeddings.csv (no header) into `output`.

    `model` is whatever names a checkpoint. The files appear together when all cells are done; a run that fails leaves what was there
    before. `settings` are keys of the data module for a model that carries none; for another they are refused, or left aside unless
    `insist`; `files` are those that are kept. Returns numbers for a person: cells, unusable cells
    by reason, genes known and unknown, settings left to defaults, weights loaded. Raises DataError, CheckpointError, ConfigError or
    StorageError.
    """
    from bmfm_pipeline.models import load_model, model_folder

    place = Workspace(workspace)
    named = find_checkpoint(model, place, None, stage="finetune")
    folder = model_folder(named.uri)
    predictor = Predictor.open(folder, settings, insist)
    network = load_model(folder, source=strip_userinfo(named.uri))
    if predictor.defaults:
        logger.warning(BY_DEFAULT, model, "; ".join(predictor.defaults))
    source = open_source(localise(file), layer, _duplicates(predictor))
    genes = _check(source, predictor)
    output = Path(output).expanduser().absolute()
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".predicting-", dir=output))
    with StageTracker(
        tracking_uri(place.state_dir),
        EXPERIMENT,
        f"predict-{Path(file).stem}",
        tags={"bmfm.stage": "predict", "bmfm.model": str(model)},
        state_dir=place.state_dir,
    ) as tracker:
        try:
            with disk_errors(output):
                writing = _Writing(staging, predictor, source, network, batch_size, pooling or predictor.pooling)
                reasons = writing.run(on_progress or (lambda event: None))
                for name in files:
                    if (staging / name).exists():
                        os.replace(staging / name, output / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        summary = {"cells": source.n_cells, "unusable": sum(reasons.values()), "reasons": reasons, "genes": genes}
        summary["values_outside_vocabulary"] = writing.unknown_values
        summary |= {"settings_by_default": list(predictor.defaults), "tensors_loaded": len(network.load_report.loaded)}
        if writing.unknown_values:
            logger.warning(UNKNOWN_VALUES, writing.unknown_values)
        tracker.log_params(
            {"input": str(file), "model": str(model), "model_hash": named.id, "output": str(output)}
            | ({"settings_by_default": "; ".join(predictor.defaults)} if predictor.defaults else {})
        )
        tracker.log_metrics({"cells": source.n_cells, "unusable_cells": summary["unusable"]})
    return {"output": str(output), "model": str(model), **summary}


def _duplicates(predictor: Predictor) -> str:
    return predictor.run.data_module.transform_kwargs.duplicate_genes


def _check(source, predictor: Predictor) -> dict[str, Any]:
    """Refuse an input that would give numbers without meaning; returns how many genes the model knows."""
    problems: list[str] = []
    if 0 in source.shape:
        raise DataError(f"{source.path}: {source.where} is empty: {source.n_cells} cells x {source.n_genes} genes")
    check_names(source, "sum" if merges_genes(predictor.chain) else _duplicates(predictor), problems)
    if predictor.chain.needs_counts:
        chunk = source.first_rows(1000)
        finite = chunk.data[np.isfinite(chunk.data)]
        off = finite[finite != np.rint(finite)]
        if len(off):
            problems.append(
                f"{source.where}: holds values that are not whole numbers, e.g. {float(off[0]):.4g}; the model was made from counts"
                f"{where_counts_lie(source).replace('set data_module.transform_kwargs.layer=', 'name it with --layer ')}"
            )
    if problems:
        raise DataError(f"{source.path} cannot be used:\n" + "\n".join(f"- {problem}" for problem in problems))
    names, vocabulary = predictor.chain.gene_names(source.var_names), predictor.vocabularies["genes"]
    own = vocabulary.tokens[vocabulary.n_special :]
    # A model of few genes finds them all in a file of many.
    floor = {"min_share": 0.0} if 2 * len(set(own) & set(names)) >= len(own) else {}
    return check_genes(names, vocabulary.tokens, "the model", cure=_OTHER_NAMES, **floor)


class _Writing:
    """Predicts chunk by chunk and writes as it goes: memory does not grow with the number of cells."""

    def __init__(self, folder: Path, predictor: Predictor, source, network, batch_size: int | None, pooling: Any):
        self.folder, self.predictor, self.source = folder, predictor, source
        self.network, self.pooling = network, pooling
        self.batch_size = batch_size or predictor.run.data_module.evaluation_batch_size
        self.unknown_values = 0

    def run(self, on_progress: Progress) -> dict[str, int]:
        """{reason: cells} of the cells that could not be used."""
        reasons: dict[str, int] = {}
        done = 0
        with (
            open(self.folder / "predictions.csv", "w", newline="") as labels,
            open(self.folder / "probabilities.csv", "w", newline="") as probabilities,
            open(self.folder / "embeddings.csv", "w", newline="") as embeddings,
            open(self.folder / "logits.csv", "w", newline="") as logits,
        ):
            writers = csv.writer(labels), csv.writer(probabilities), csv.writer(embeddings), csv.writer(logits)
            names = self.predictor.class_names
            writers[0].writerow(["cell", *names, "reason"])
            classes = [f"{column}_{name}" for column, known in names.items() for name in known]
            writers[1].writerow(["cell", *classes])
            writers[3].writerow(["cell", *classes])
            for start, chunk in self.source.iter_chunks():
                cells = [str(name) for name in self.source.obs_names[start : start + chunk.shape[0]]]
                why = self._chunk(cells, chunk, writers, len(classes))
                for reason in filter(None, why):
                    reasons[reason] = reasons.get(reason, 0) + 1
                done += len(cells)
                on_progress({"kind": "progress", "stage": "predict", "step": done, "max_steps": self.source.n_cells})
        return reasons

    def _chunk(self, cells: list[str], chunk, writers, n_classes: int) -> list[str | None]:
        applied = self.predictor.chain.apply_to_cells(chunk, self.source.var_names)
        usable = np.array([row for row, reason in enumerate(applied.reasons) if reason is None], dtype=np.int64)
        found = self._predict(cells, chunk, applied, usable) if len(usable) else None
        position = {row: index for index, row in enumerate(usable.tolist())}
        blank = [""] * len(self.predictor.class_names)
        columns = self.predictor.run.label_columns
        separators = {column.label_column_name: column.multilabel_str_sep for column in columns}
        width = self._width(found)
        for row, cell in enumerate(cells):
            index = position.get(row)
            if index is None:
                writers[0].writerow([cell, *blank, applied.reasons[row]])
                writers[1].writerow([cell, *[""] * n_classes])
                writers[2].writerow([cell, *["nan"] * width])
                writers[3].writerow([cell, *[""] * n_classes])
                continue
            words = (_label(entry, index, separators[name]) for name, entry in found.labels.items())
            writers[0].writerow([cell, *words, ""])
            shares = [
                f"{share:.6g}"
                for entry in found.labels.values()
                if entry.class_names
                for share in entry.probabilities[index]
            ]
            writers[1].writerow([cell, *shares])
            writers[2].writerow([cell, *(f"{value:.7g}" for value in found.embeddings[index])])
            writers[3].writerow([cell, *(f"{value:.7g}" for entry in found.logits.values() for value in entry[index])])
        return applied.reasons

    def _width(self, found) -> int:
        if found is not None:
            return found.embeddings.shape[1]
        parts = len(self.pooling) if isinstance(self.pooling, list) else 1
        return parts * self.network.config.hidden_size

    def _predict(self, cells: list[str], chunk, applied, usable: np.ndarray):
        from bmfm_pipeline.batching import BatchBuilder, CellDataset, EpochBatchSampler, make_loader
        from bmfm_pipeline.evaluation.inference import predict_loader
        from bmfm_pipeline.stages.planning import settled

        order = np.arange(len(applied.gene_names))
        if not self.predictor.published:
            # Genes in the order of the vocabulary, as in the processed file: the same cell is cut and shuffled alike in both.
            order = np.argsort(self.predictor.vocabularies["genes"].ids(applied.gene_names), kind="stable")
        values = applied.values[usable][:, order]
        values.sort_indices()
        names = np.array([cells[row] for row in usable], dtype=object)
        genes = [applied.gene_names[column] for column in order]
        run = settled(self.predictor.run)
        vocabularies = self.predictor.vocabularies
        from_counts, counts = self.predictor.values_from, None
        if from_counts:
            counts = self.predictor.chain.apply_genes(chunk, self.source.var_names)[usable][:, order]
        store = MemoryStore(values, names, genes, counts=counts)
        config = replace(batching_config(run, vocabularies, from_counts), max_length=run.data_module.evaluation_length)
        options = builder_options(run, genes, self.predictor.folder / "transforms.json")
        builder = BatchBuilder(store, field_specs(run, vocabularies, genes), config, **options)
        loader = make_loader(
            CellDataset(builder, np.arange(len(usable)), evaluation=True),
            EpochBatchSampler(len(usable), self.batch_size, shuffle=False),
        )
        found = predict_loader(
            self.network,
            loader,
            self.predictor.class_names,
            pooling=self.pooling,
            keep_logits=True,
            precision=run.task.precision,
            device="cuda" if run.task.accelerator == "gpu" else "cpu",
        )
        self.unknown_values += builder.report.values_outside_vocabulary
        return found


def _label(entry, index: int, separator: str) -> str:
    if entry.has_several:
        chosen = (name for name, has in zip(entry.class_names, entry.predicted[index], strict=True) if has)
        return separator.join(chosen) or separator  # the separator alone is how a file says "none of them"
    if entry.class_names:
        return entry.class_names[int(entry.predicted[index])]
    return f"{entry.predicted[index]:.7g}"


def predict_with_config(run: RunConfig, workspace: str | None, on_progress: Progress | None = None) -> dict[str, Any]:
    """Predict as a config with a predict task says: task.checkpoint, source_h5ad_file_name, task.default_root_dir.

    Raises ConfigError naming what the config leaves out.
    """
    from bmfm_pipeline.stages.inputs import find_source

    if not run.task.checkpoint:
        raise ConfigError("predict: task.checkpoint must name a model artefact or folder")
    source = find_source(run)
    if source.files:
        raise ConfigError(
            f"predict: data_module.transform_kwargs.source_h5ad_file_name must name one file, and {source.place} are named; predict one "
            "file after another, each into a folder of its own"
        )
    files = [name for name in FILES if getattr(run.task, _ASKED_BY[name == "embeddings.csv"])]
    if not files:
        raise ConfigError(
            "predict: task.output_predictions and task.output_embeddings are both false, so nothing would be written"
        )
    output = run.task.default_root_dir or str(Path(Workspace(workspace).uri) / "predictions")
    return predict_file(
        run.task.checkpoint, source.uri, output, workspace=workspace, on_progress=on_progress,
        layer=run.data_module.transform_kwargs.layer, batch_size=run.data_module.batch_size,
        settings=settings_of_config(run), insist=False, files=files,
    )  # fmt: skip
