"""Scores of sequences that are made on the way (changed ones beside their originals): the model's answers, on one strand or both."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config.sequences import FIELD
from bmfm_pipeline.data.sequences import clean, reverse_complement
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.models import find_checkpoint
from bmfm_pipeline.stages.predicting.chunks import LOGITS
from bmfm_pipeline.stages.predicting.predictor import Predictor
from bmfm_pipeline.stages.predicting.rows import Answers
from bmfm_pipeline.stages.predicting.sequences import SequenceChunks, SequenceInput
from bmfm_pipeline.storage import Workspace, read_json, strip_userinfo

LETTERS_AT_ONCE, MOST_AT_ONCE = 4_000_000, 1024


@dataclass
class Scored:
    """Of n sequences: `outputs` {label column: (n, C) logits, (n, 1) where a number is predicted}, nan for an empty sequence, and whether
    each was `cut` (n,) because it is longer than the model reads."""

    outputs: dict[str, np.ndarray]
    cut: np.ndarray


class SequenceScorer:
    """A model of sequences that scores letters. With `both_strands` outputs are means over the sequence and its reverse complement."""

    def __init__(self, predictor: Predictor, network, run, batch_size: int | None = None, both_strands: bool = True):
        source = SequenceInput(Path("sequences"), [], None, lambda: iter(()))
        self.chunks = SequenceChunks(predictor, source, network, run, batch_size, {})
        self.predictor, self.both_strands = predictor, both_strands
        self.answers = Answers(predictor)
        self._kinds = {entry.label_column_name: entry for entry in predictor.run.label_columns}

    @classmethod
    def open(
        cls, model: str, place: Workspace, batch_size: int | None, both_strands: bool, option: str
    ) -> "SequenceScorer":
        """The scorer of a model named as for prediction. ConfigError where it reads cells, which `option` is not about."""
        from bmfm_pipeline.models import load_model, model_folder
        from bmfm_pipeline.stages.planning import settled

        named = find_checkpoint(model, place, None, stage="finetune")
        folder = model_folder(named.uri)
        predictor = Predictor.open(folder)
        if not predictor.reads_sequences:
            raise ConfigError(
                f"{option}: {model} reads cells, and {option} is about sequences; name a model of sequences"
            )
        if not predictor.class_names:
            raise ConfigError(f"{option}: {model} predicts no label column; name a fine-tuned model")
        network = load_model(folder, source=strip_userinfo(named.uri))
        return cls(predictor, network, settled(predictor.run), batch_size, both_strands)

    @property
    def strands(self) -> str:
        return "both, averaged" if self.both_strands else "as given"

    def at_once_of(self, length: int) -> int:
        """How many sequences of `length` letters are scored together."""
        return max(1, min(MOST_AT_ONCE, LETTERS_AT_ONCE // max(1, length)))

    @property
    def window(self) -> int:
        """Letters that the model is best shown: as many as its training sequences have on average, if it can read these."""
        kept = self.predictor.folder / "preprocessing.json"
        check = (read_json(kept).get("check") or {}) if kept.exists() else {}
        if check.get("sequences"):
            return max(1, min(round(check["letters"] / check["sequences"]), self.most_letters))
        pieces = self.predictor.vocabularies[FIELD].tokens[self.predictor.vocabularies[FIELD].n_special :]
        lengths = [len(piece) for piece in pieces if re.fullmatch("[ACGT]+", piece)]
        return max(1, int(self.chunks.room * (np.median(lengths) if lengths else 1)))

    @property
    def most_letters(self) -> int:
        """More letters than the model reads of any sequence are never read."""
        return self.chunks.room * self.chunks.tokenizer.longest_piece

    def __call__(self, sequences: list[np.ndarray]) -> Scored:
        """Scores of sequences, each letters (uint8) as a file has them. Equal ones are computed once."""
        places: dict[bytes, int] = {}
        rows = np.array([places.setdefault(one.tobytes(), len(places)) for one in sequences], dtype=np.int64)
        whole = np.frombuffer(b"".join(places), dtype=np.uint8)
        starts = np.cumsum([0, *(len(text) for text in places)]).astype(np.int64)
        cleaned = clean(whole, starts, self.chunks.settings.upper_case)
        letters, starts = cleaned.letters, cleaned.starts
        count = len(places)
        if self.both_strands:
            letters = np.concatenate([letters, reverse_complement(letters, starts)])
            starts = np.concatenate([starts, starts[-1] + starts[1:]])
        output, cut = self.chunks.of_letters(letters, starts)
        found = {name: output.arrays[LOGITS + name].astype(np.float64) for name in self.predictor.class_names}
        if self.both_strands:
            found = {name: (values[:count] + values[count:]) / 2 for name, values in found.items()}
            cut = cut[:count] | cut[count:]
        return Scored({name: values[rows] for name, values in found.items()}, cut[rows])

    # ---- what outputs are called, and how they are read

    @property
    def widths(self) -> dict[str, int]:
        return {name: max(1, len(classes)) for name, classes in self.predictor.class_names.items()}

    def columns(self, label: str) -> list[str]:
        """LABEL_CLASS of each class, LABEL where a number is predicted."""
        return [f"{label}_{name}" for name in self.predictor.class_names[label]] or [label]

    def scores(self, label: str, outputs: np.ndarray) -> np.ndarray:
        """(n, C) logits -> log odds of each class, before calibration: log(p / (1 - p)). Numbers are themselves."""
        if not self.predictor.class_names[label] or self._kinds[label].is_multilabel:
            return outputs
        found = np.empty_like(outputs)
        for place in range(outputs.shape[1]):
            others = np.delete(outputs, place, axis=1)
            top = others.max(axis=1, keepdims=True)
            found[:, place] = outputs[:, place] - (top[:, 0] + np.log(np.exp(others - top).sum(axis=1)))
        return found

    def probabilities(self, label: str, outputs: np.ndarray) -> np.ndarray | None:
        """(n, C), calibrated where the model is; None of numbers."""
        return self.answers.of_label(label, outputs, np.isfinite(outputs).all(axis=1)).probabilities

    def described(self) -> dict[str, Any]:
        """What scores are, for a summary."""
        kinds = {
            name: "log odds of each class" if classes else "the predicted number"
            for name, classes in self.predictor.class_names.items()
        }
        return {"scores": kinds, "strands": self.strands}
