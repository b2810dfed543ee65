"""What attributions of pieces say of single bases, and whether these are the bases that a model reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.config.sequences import FIELD
from bmfm_pipeline.evaluation.attributions.bases import base_scores, check_exchanged, top_sequences, write_bases
from bmfm_pipeline.stages.predicting.predictor import Predictor
from bmfm_pipeline.stages.predicting.scoring import SequenceScorer
from bmfm_pipeline.vocabulary.sequences import SequenceTokenizer


def write_base_attributions(
    staging: Path, found: Any, chosen: Any, model: Any, folder: Path, run: RunConfig, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any] | None]:
    """base_attributions.json and .csv into `staging`; returns what is drawn of each label column, and the check of exchanged bases."""
    tokenizer = SequenceTokenizer(folder / "tokenizers" / FIELD, run.data_module.sequences.upper_case)
    bases = base_scores(found, chosen.columns, chosen.letters, tokenizer.lengths)
    write_bases(staging, bases)
    predictor = Predictor.open(folder)
    predictor = replace(predictor, run=predictor.run.model_copy(update={"task": run.task}))
    scorer = SequenceScorer(predictor, model, predictor.run, both_strands=False)

    def score(label: str, kind: str | None, sequences: list[str]) -> np.ndarray:
        outputs = scorer([np.frombuffer(text.encode("latin-1"), np.uint8) for text in sequences]).outputs[label]
        place = 0 if kind is None else predictor.class_names[label].index(kind)
        return scorer.scores(label, outputs)[:, place]

    return top_sequences(bases), check_exchanged(bases, score, seed)
