"""What a chain does with some of the cells, in this process or another: observe them, or write them for the processed file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bmfm_pipeline.data.processed import Spool, SpooledMatrix
from bmfm_pipeline.data.transforms.blocks import StepCount


class Spread(Protocol):
    """Passes over several files that are made in parts, each a group of files. The groups do not depend on who makes them."""

    def each(self, function: Callable[[Any, np.ndarray | None], Any], rows: np.ndarray | None) -> list[Any]:
        """function(source, rows) of each part in their order; `rows` (all cells,), boolean, is cut to the cells of the part."""

    def write(self, function: Callable[[Any, Path], Any]) -> list[tuple[Any, Path]]:
        """(function(source, path), path) of each part in their order; the function makes a file at the path, which is then here."""


@dataclass(frozen=True)
class Writing:
    """How cells are written; see Chain.run."""

    keep_counts: bool = True
    layer: str = "counts"
    keep_empty: bool = False
    row_filters: bool = True


@dataclass
class Part:
    """Some of the cells after a chain. `numbers`: int64, their numbers in the whole source; `added`: columns for their obs; `counts` None
    where they are not kept, `fractions` where that is because they are no counts."""

    numbers: np.ndarray
    counter: list[StepCount]
    added: dict[str, np.ndarray]
    values: SpooledMatrix
    counts: SpooledMatrix | None
    same_places: bool = True
    fractions: bool = False


def observe_part(chain, position: int, source, rows: np.ndarray | None) -> None:
    """Show step `position` of the chain the cells `rows` (boolean, None: all) of a source, after the steps before it."""
    step, names = chain.steps[position][1], chain.names_after(position, source.var_names)
    for block in chain.blocks(source, position, rows):
        step.observe_rows(block.values, names, block.numbers)


def seen_part(chain, position: int, source, rows: np.ndarray | None) -> Any:
    """The same; returns what the step saw, for the one that it is a copy of."""
    observe_part(chain, position, source, rows)
    return chain.steps[position][1].seen()


def write_part(chain, writing: Writing, source, spool: Spool) -> Part:
    """Run the fitted chain over a source, or some files of one, and put what stays into `spool`."""
    added: dict[str, np.ndarray] = {}
    counter = chain.counter(writing.keep_empty)
    names = chain.names_after(len(chain.steps), source.var_names)
    kept = []
    values, counts = SpooledMatrix(), SpooledMatrix() if writing.keep_counts else None
    same_places, fractions = True, False
    for block in chain.blocks(source, counter=counter, obs_columns=added, row_filters=writing.row_filters):
        block.drop_zeros()
        if not writing.keep_empty:
            block.keep(np.diff(block.values.indptr) > 0)
            counter[-1].add(block, len(names))
            block.settle()
        kept.append(block.numbers)
        spool.add(values, block.values)
        if counts is not None:
            shared = block.shares_structure
            spool.add(counts, block.counts, like=values if shared else None)
            same_places = same_places and shared
            if writing.layer == "counts" and counts.data[-1][2].kind == "f":
                counts, fractions = None, True
    numbers = np.concatenate(kept) if kept else np.array([], dtype=np.int64)
    of_kept = {name: column[numbers - source.first_row] for name, column in added.items()}
    return Part(numbers, counter, of_kept, values, counts, same_places, fractions)


def write_part_file(chain, writing: Writing, source, path: Path) -> Part:
    """The same, into the file `path`."""
    with Spool(path.parent, path.name) as spool:
        return write_part(chain, writing, source, spool)


def joined_counts(parts: list[Part]) -> list[StepCount]:
    """What the steps left of all parts."""
    counter = parts[0].counter
    for part in parts[1:]:
        for total, entry in zip(counter, part.counter, strict=True):
            total.take(entry)
    return counter
