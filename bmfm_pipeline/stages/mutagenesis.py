"""Mutagenesis in silico: every base of a sequence exchanged for each of the three others, and what a model says of that."""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.errors import ConfigError, DataError
from bmfm_pipeline.stages.predicting.pace import Pace
from bmfm_pipeline.stages.predicting.scoring import Scored, SequenceScorer
from bmfm_pipeline.stages.predicting.sequences import EMPTY, SequenceInput
from bmfm_pipeline.stages.predicting.tables import TableWriter
from bmfm_pipeline.stages.remote_output import written_to
from bmfm_pipeline.storage import Workspace, check_allowed, disk_errors, localise, strip_userinfo, write_json_atomic

logger = logging.getLogger(__name__)
TABLE, SEQUENCES, SUMMARY, FIGURES = "mutagenesis", "mutagenesis_sequences", "mutagenesis.json", "figures"
BASES = "ACGT"
LIMIT, DRAWN = 20, 10
BEYOND = "letters behind what the model reads were not changed"
Progress = Callable[[dict[str, Any]], None]


@dataclass
class _Sequence:
    """`letters` uint8 that the model reads of a sequence of `length`, and `places` (n,) of those among them that are A, C, G or T."""

    name: str
    letters: np.ndarray
    length: int

    @property
    def places(self) -> np.ndarray:
        return np.flatnonzero(np.isin(self.letters, np.frombuffer(BASES.encode(), np.uint8)))

    @property
    def reason(self) -> str:
        return EMPTY if not self.length else BEYOND if len(self.letters) < self.length else ""

    def changed(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """(position from 0, the base put there, letters)"""
        for place in self.places.tolist():
            own = chr(self.letters[place])
            for base in BASES:
                if base != own:
                    letters = self.letters.copy()
                    letters[place] = ord(base)
                    yield place, base, letters


def mutagenesis(
    model: str,
    file: str,
    output: str | Path,
    *,
    limit: int = LIMIT,
    both_strands: bool = True,
    batch_size: int | None = None,
    kind: str = "csv",
    workspace: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what every change of a base does to the first `limit` sequences of `file` (a table, a folder or FASTA) into `output`.

    mutagenesis: sequence, position (from 1), ref, alt, and of each class by how much the change moves its log odds (of a number, the number).
    mutagenesis_sequences: the scores of the sequences as they are. figures/: of the first ten a logo and a map of the changes. Of a sequence
    that is longer than the model reads, the part that it reads is changed. Returns the summary, which is mutagenesis.json too. Raises
    ConfigError and DataError.
    """
    place, tell = Workspace(workspace), on_progress or (lambda event: None)
    check_allowed(file, "--input")
    if limit < 1:
        raise ConfigError(f"--limit: is {limit}; at least one sequence is needed")
    scorer = SequenceScorer.open(model, place, batch_size, both_strands, "--mutagenesis")
    source = SequenceInput.open(localise(file), scorer.chunks.settings)
    sequences = list(_first(source, scorer, limit))
    changes = sum(3 * len(one.places) for one in sequences)
    if not changes:
        raise DataError(
            f"{source.path}: none of its first {len(sequences)} sequences holds a letter A, C, G or T to change"
        )

    def write(folder: Path) -> dict[str, Any]:
        check_allowed(folder, "--output", also=(place.state_dir,))
        tell({"kind": "note", "message": _cost(source, sequences, changes, scorer)})
        with disk_errors(folder, "--output"):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".mutagenesis-", dir=folder) as scratch:
                scratch = Path(scratch)
                strongest = _write_all(scratch, kind, sequences, scorer, Pace(changes, tell, observed="sequences"))
                made = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
                (folder / FIGURES).mkdir(exist_ok=True)
                for older in (folder / FIGURES).glob("[0-9][0-9][0-9]-*.svg"):
                    older.unlink()
                for name in made:
                    os.replace(scratch / name, folder / name)
            summary = {
                "model": str(model),
                "input": strip_userinfo(str(file)),
                "sequences": len(sequences),
                "sequences_left_out": source.n_cells - len(sequences),
                "changes": changes,
                "positions_without_a_base": sum(len(one.letters) - len(one.places) for one in sequences),
                "empty": sum(not one.length for one in sequences),
                "longer_than_the_model": sum(one.reason == BEYOND for one in sequences),
                **scorer.described(),
                "strongest": strongest,
            }
            write_json_atomic(folder / SUMMARY, summary)
        files = [*(str(folder / name) for name in made), str(folder / SUMMARY)]
        return {"output": str(folder), **summary, "files": files}

    return written_to(output, place, write)


def _first(source: SequenceInput, scorer: SequenceScorer, limit: int) -> Iterator[_Sequence]:
    """The first `limit` sequences, each as far as the model reads it."""
    tokenizer, room, count = scorer.chunks.tokenizer, scorer.chunks.room, 0
    for row, letters, starts in source.chunks(0, scorer.chunks.settings.upper_case):
        for number in range(len(starts) - 1):
            own = letters[starts[number] : starts[number + 1]]
            read = own[: room * tokenizer.longest_piece]
            lengths = tokenizer.lengths(read.tobytes().decode("latin-1"))
            yield _Sequence(str(source.obs_names[row + number]), read[: int(lengths[:room].sum())], len(own))
            count += 1
            if count == limit:
                return


def _cost(source: SequenceInput, sequences: list[_Sequence], changes: int, scorer: SequenceScorer) -> str:
    passes = (changes + len(sequences)) * (2 if scorer.both_strands else 1)
    longest = max(len(one.letters) for one in sequences)
    of = (
        f"the first {len(sequences):,} of {source.n_cells:,}"
        if len(sequences) < source.n_cells
        else f"all {len(sequences):,}"
    )
    return (
        f"{of} sequences, {changes:,} changes: {passes:,} sequences of up to {longest:,} letters go through the model; --limit says of how "
        "many sequences"
    )


def _write_all(
    folder: Path, kind: str, sequences: list[_Sequence], scorer: SequenceScorer, pace: Pace
) -> dict[str, Any]:
    """Both tables and the figures; returns the largest change of each score."""
    strongest: dict[str, Any] = {}
    (folder / FIGURES).mkdir()
    tables = [TableWriter(folder / f"{name}.{kind}", header=True) for name in (TABLE, SEQUENCES)]
    done = drawn = 0
    try:
        for one in sequences:
            own, changes = _of_sequence(one, scorer)
            table: dict[str, Any] = {"sequence": [one.name], "letters": np.array([one.length]), "reason": [one.reason]}
            for label, values in own.items():
                table |= {name: values[:, place] for place, name in enumerate(scorer.columns(label))}
            tables[1].write(table)
            if not changes:
                continue
            places, bases = zip(*((place, base) for place, base, _ in one.changed()), strict=True)
            reference = [chr(one.letters[place]) for place in places]
            table = {
                "sequence": [one.name] * len(places),
                "position": np.array(places) + 1,
                "ref": reference,
                "alt": list(bases),
            }
            for label, values in changes.items():
                for column, name in enumerate(scorer.columns(label)):
                    table[f"{name}_difference"] = values[:, column].astype(np.float32)
                    _keep_strongest(strongest, name, table, values[:, column])
            tables[0].write(table)
            if drawn < DRAWN:
                _draw(folder / FIGURES, drawn, one, places, bases, own, changes, scorer)
                drawn += 1
            done += len(places)
            pace(done)
    finally:
        for table in tables:
            table.close()
    return strongest


def _of_sequence(one: _Sequence, scorer: SequenceScorer) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({label: scores (1, C)}, {label: differences (changes, C)}), the second empty where nothing can be changed."""
    empty = {name: np.full((1, width), np.nan, np.float32) for name, width in scorer.widths.items()}
    if not len(one.letters):
        return empty, {}
    first = scorer([one.letters])
    own = {name: scorer.scores(name, values) for name, values in first.outputs.items()}
    parts: list[Scored] = []
    waiting: list[np.ndarray] = []
    for _, _, letters in one.changed():
        waiting.append(letters)
        if len(waiting) == scorer.at_once_of(len(one.letters)):
            parts.append(scorer(waiting))
            waiting = []
    if waiting:
        parts.append(scorer(waiting))
    plain = {name: values.astype(np.float32) for name, values in own.items()}
    if not parts:
        return plain, {}
    return plain, {
        name: scorer.scores(name, np.concatenate([part.outputs[name] for part in parts])) - own[name] for name in own
    }


def _keep_strongest(strongest: dict[str, Any], name: str, table: dict[str, Any], values: np.ndarray) -> None:
    row = int(np.argmax(np.abs(values)))
    value = float(values[row])
    if name not in strongest or abs(value) > abs(strongest[name]["difference"]):
        where = {column: table[column][row] for column in ("sequence", "position", "ref", "alt")}
        strongest[name] = {**where, "position": int(where["position"]), "difference": value}


def _draw(folder: Path, number: int, one: _Sequence, places, bases, own, changes, scorer: SequenceScorer) -> None:
    """A figure of each label column: of the class that the sequence is predicted as, or the number."""
    from bmfm_pipeline.evaluation.pages.logos import drawn_part, logo

    for label, values in changes.items():
        best = int(np.argmax(own[label][0]))
        name = scorer.columns(label)[best]
        table = np.full((len(one.letters), 4), np.nan)
        table[np.array(places), [BASES.index(base) for base in bases]] = values[:, best]
        known = np.isfinite(table).any(axis=1)
        heights = np.zeros(len(table))
        heights[known] = -np.nanmean(table[known], axis=1)
        part = drawn_part(heights)
        letters = one.letters[part].tobytes().decode("latin-1")
        title = f"{one.name}: what changes of a base do to {name}"
        about = (
            f"{title}. Letters are as tall as exchanging them lowers the score, on the mean of the three others; positions {part.start + 1} to "
            f"{part.stop}"
        )
        drawing = logo(title, about, letters, heights[part], table[part], first=part.start + 1)
        safe = re.sub(r"[^\w.+-]+", "-", f"{one.name}-{name}").strip("-")[:80]
        (folder / f"{number:03d}-{safe}.svg").write_text(drawing.svg(alone=True), encoding="utf-8")
