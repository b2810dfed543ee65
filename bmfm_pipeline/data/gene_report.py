"""What became of every gene name of the data: one category for each, and the share of counts that a model will see."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.data.transforms.columns import ColumnMap
from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.harmonising import Naming, describe_names
from bmfm_pipeline.vocabulary.spreadsheet import readings

CATEGORIES = ("matched", "renamed", "merged", "ambiguous", "unknown", "dropped")
SHOWN, LOSSES = 5, 10
_LIMIT = "data_module.transform_kwargs.gene_names.min_share_of_counts"
_TABLE = "data_module.transform_kwargs.gene_names.table"


@dataclass
class GeneFate:
    """One gene name of the data: its new name (None: its column is dropped), how that was found, and its counts."""

    name: str
    target: str | None
    category: str
    how: str
    why: str
    counts: float


@dataclass
class GeneReport:
    """All names of the data in one category each: matched, renamed, merged, ambiguous, unknown or dropped.

    `vocabulary`: what the names were compared with, in words. `share_of_counts` (0 to 1): counts in genes that are matched,
    renamed or merged.
    """

    fates: list[GeneFate]
    vocabulary: str
    naming: Naming
    settings: dict[str, Any] = field(default_factory=dict)

    def recount(self, totals: np.ndarray) -> "GeneReport":
        """The same names with other counts, `totals` (names,), in place: for names whose fate does not depend on counts."""
        for fate, counts in zip(self.fates, totals.tolist(), strict=True):
            fate.counts = counts
        for name in ("total", "share_of_counts"):
            self.__dict__.pop(name, None)
        return self

    def of(self, category: str) -> list[GeneFate]:
        return [fate for fate in self.fates if fate.category == category]

    @cached_property
    def total(self) -> float:
        return sum(fate.counts for fate in self.fates)

    @property
    def known(self) -> list[GeneFate]:
        return [fate for fate in self.fates if fate.category in ("matched", "renamed", "merged")]

    @cached_property
    def share_of_counts(self) -> float:
        return sum(fate.counts for fate in self.known) / self.total if self.total else 0.0

    @property
    def losses(self) -> list[GeneFate]:
        """Names whose counts are lost to the model, most counts first."""
        lost = [fate for fate in self.fates if fate.category in ("ambiguous", "unknown", "dropped")]
        return sorted(lost, key=lambda fate: -fate.counts)

    def largest_losses(self, n_names: int = LOSSES) -> list[dict[str, Any]]:
        return [_loss(fate, self.total) for fate in self.losses[:n_names]]

    @cached_property
    def damaged(self) -> list[GeneFate]:
        """Names that a spreadsheet made dates of, rescued or not."""
        return [fate for fate in self.fates if fate.how == "spreadsheet" or readings(fate.name)]

    def to_dict(self) -> dict[str, Any]:
        categories = {}
        for name in CATEGORIES:
            fates = self.of(name)
            counts = sum(fate.counts for fate in fates)
            how: dict[str, int] = {}
            for fate in fates:
                how[fate.how] = how.get(fate.how, 0) + 1
            categories[name] = {
                "names": len(fates),
                "counts": counts,
                "share_of_counts": counts / self.total if self.total else 0.0,
                "how": how,
                "examples": [_words(fate) for fate in sorted(fates, key=lambda fate: -fate.counts)[:SHOWN]],
            }
        return {
            "names": len(self.fates),
            "counts": self.total,
            "genes_known": len({fate.target for fate in self.known}),
            "share_of_counts_kept": self.share_of_counts,
            **{name: entry["names"] for name, entry in categories.items()},
            "naming": str(self.naming),
            "compared_with": self.vocabulary,
            "categories": categories,
            "spreadsheet": {"names": len(self.damaged), "examples": [_words(fate) for fate in self.damaged[:SHOWN]]},
            "largest_losses": self.largest_losses(),
            **self.settings,
        }

    def rows(self) -> list[dict[str, str]]:
        """A short table for a person: what, and how much of it."""
        rows = []
        for name, entry in self.to_dict()["categories"].items():
            if entry["names"]:
                how = ", ".join(f"{count} {word}" for word, count in entry["how"].items())
                how = f" ({how})" if name in ("renamed", "merged") else ""
                found = f"{entry['names']}{how}, {entry['share_of_counts']:.1%} of counts"
                rows.append({"what": f"gene names {name}", "found": found})
        if self.damaged:
            rows.append(
                {"what": "gene names damaged by a spreadsheet", "found": "; ".join(map(_words, self.damaged[:SHOWN]))}
            )
        rows.append({"what": "share of counts kept", "found": f"{self.share_of_counts:.1%}"})
        return rows

    def write_csv(self, path: Path) -> None:
        """Every name with its category, new name, how and why, and its counts."""
        with open(path, "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["name", "category", "new_name", "how", "why", "counts"])
            for fate in self.fates:
                writer.writerow(
                    [fate.name, fate.category, fate.target or "", fate.how, fate.why, f"{fate.counts:.10g}"]
                )

    def shortfall(self, floor: float) -> str | None:
        """What is missing, in words, when less than `floor` of the counts is in known genes, or no gene is known; else None."""
        n_known, names = len(self.known), len(self.fates)
        if n_known and self.share_of_counts >= floor:
            return None
        if not n_known:
            return f"{self.vocabulary} knows none of the {names} gene names"
        return (
            f"{self.vocabulary} knows {n_known} of the {names} gene names, which hold {self.share_of_counts:.1%} of the counts; "
            f"at least {floor:.0%} is asked for ({_LIMIT})"
        )

    def check(self, floor: float, advice: Sequence[str]) -> None:
        """Raise DataError when less than `floor` of the counts is in known genes, or no gene is known; `advice`: what to do."""
        found = self.shortfall(floor)
        if found is None:
            return
        losses = "\n".join(
            f"    {fate.name}: {fate.counts / self.total if self.total else 0:.1%} of counts, {fate.why or fate.how}"
            for fate in self.losses[:LOSSES]
        )
        what = "\n".join(f"  - {line}" for line in advice)
        raise DataError(
            f"var: {found}.\n  The data's names look like {self.naming}.\n  Largest losses:\n{losses}\n  What can be done:\n{what}"
        )


def _words(fate: GeneFate) -> str:
    new = f" -> {fate.target}" if fate.target is not None and fate.target != fate.name else ""
    why = f" ({fate.why})" if fate.why and fate.category in ("ambiguous", "unknown", "dropped") else ""
    return f"{fate.name}{new}{why}"


def _loss(fate: GeneFate, total: float) -> dict[str, Any]:
    share = fate.counts / total if total else 0.0
    return {"name": fate.name, "share_of_counts": share, "category": fate.category, "why": fate.why}


def report_genes(
    chain, names: list[str], totals: np.ndarray, vocabulary: str, known: Sequence[str] | None = None, **settings: Any
) -> GeneReport:
    """Follow `names` with their `totals` of counts (one each) through the steps of `chain` that give genes names.

    `known`: the genes of a fixed vocabulary, `vocabulary` its name for messages; None: what the steps know decides, and where no
    step looks names up every name is known. `settings` are added to the report.
    """
    position = list(range(len(names)))  # of each name's column by now, -1 when dropped
    how = ["symbol"] * len(names)
    why = [""] * len(names)
    fine = [True] * len(names)
    current = list(names)
    last = max((index for index, (_, step) in enumerate(chain.steps) if step.gives_names), default=-1)
    for title, step in chain.steps[: last + 1]:
        if step.needs_pass and not step.gives_names:
            continue
        lookup = getattr(step, "resolve", None)
        if lookup is not None and step.needs_pass:
            here = ColumnMap(np.array(position, dtype=np.int32), len(current))
            step.choose(current, here.totals(totals))
        after, columns = step.column_map(current)
        target = columns.tolist()
        resolved = lookup(current) if lookup is not None else None
        renamed = step.renamed(current) if hasattr(step, "renamed") else None
        for index, at in enumerate(position):
            if at < 0:
                continue
            position[index] = target[at]
            if resolved is not None:
                entry = resolved[at]
                how[index], why[index], fine[index] = entry.how, entry.why, entry.known
                if target[at] < 0 and entry.target is not None:
                    why[index] = f"another column of {entry.target} has more counts"
            elif renamed is not None:
                if renamed[at] is None:
                    why[index] = f"{title}: the map has no name for it"
                elif target[at] < 0:
                    why[index] = f"{title}: another column is {renamed[at]} already, the first is kept"
                elif renamed[at] != current[at]:
                    how[index] = "compound" if current[at].startswith(f"{renamed[at]}_") else "gene_map"
            elif target[at] < 0:
                why[index] = f"left out by {title}"
        current = after
    return GeneReport(
        _fates(names, position, current, how, why, fine, totals, None if known is None else set(known)),
        vocabulary,
        describe_names(names),
        settings,
    )


def _fates(names, position, current, how, why, fine, totals, tokens: set[str] | None) -> list[GeneFate]:
    fates = []
    groups: dict[str, list[GeneFate]] = {}
    counts = totals.tolist()
    for index, name in enumerate(names):
        target = current[position[index]] if position[index] >= 0 else None
        known = fine[index] if tokens is None else target in tokens
        if target is None:
            category = "dropped"
        elif not known:
            category = "ambiguous" if how[index] == "ambiguous" else "unknown"
            why[index] = why[index] or "not in the vocabulary"
        else:
            category = "matched" if name == target else "renamed"
        fate = GeneFate(name, target, category, how[index], why[index], counts[index])
        fates.append(fate)
        if category in ("matched", "renamed"):
            groups.setdefault(target, []).append(fate)
    for found in groups.values():
        best = next((fate for fate in found if fate.category == "matched"), found[0])
        for fate in found:
            if fate is not best:
                fate.category = "merged"
    return fates
