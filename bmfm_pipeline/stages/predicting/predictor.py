"""A model folder, opened for prediction: network settings, transforms, vocabularies and class names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.strict import readable
from bmfm_pipeline.data.label_files import read_label_dict
from bmfm_pipeline.data.transforms import Chain, build_chain
from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.stages.prediction_settings import left_to_defaults, merge_settings
from bmfm_pipeline.storage import read_json
from bmfm_pipeline.training.gene_tables import with_kept_tables
from bmfm_pipeline.vocabulary import MultiFieldVocabulary


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

    @property
    def reads_sequences(self) -> bool:
        """Whether the model reads sequences of nucleotides, not cells."""
        return self.run.data_module.sequences is not None

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
        of_sequences = module.get("sequences") is not None
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
        module |= {"mlm": False, "masking_strategy": None}
        if module.get("collation_strategy") != "sequence_labeling":
            module["collation_strategy"] = "sequence_classification"
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
        if "genes" not in vocabularies and not of_sequences:
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
