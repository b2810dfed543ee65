"""Names of perturbations in the spellings of several collections, read into one: target genes joined by "_", or Control."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmfm_pipeline.errors import DataError

CONTROL = "Control"
COLUMN = "perturbed_genes"  # of the processed cells
_CONTROLS = re.compile(
    r"(ctrl|ctl|control|neg(ative)?[-_ ]?(ctrl|control)|non[-_ ]?targeting|nt|ntc|safe[-_ ]?targeting|unperturbed|mock)"
    r"([-_ ]?(ctrl|control|guide|grna|sgrna))?([-_ ]?\d+)?",
    re.IGNORECASE,
)
_SHOWN = 20


@dataclass(frozen=True)
class Perturbations:
    """`names` (cells,): target genes sorted and joined by "_", Control, or None where the column says nothing.

    `targets` {name: its genes}; `dialect` is the spelling that was read; `controls` {value of the column: cells}.
    """

    names: np.ndarray
    targets: dict[str, tuple[str, ...]]
    dialect: str
    controls: dict[str, int]

    @property
    def genes(self) -> list[str]:
        """All target genes, sorted."""
        return sorted({gene for genes in self.targets.values() for gene in genes})

    @property
    def is_control(self) -> np.ndarray:
        return self.names == CONTROL


def looks_like_control(value: str) -> bool:
    """Whether this is one of the words by which unperturbed cells are called: control, ctrl, non-targeting, NT-12 and the like."""
    return _CONTROLS.fullmatch(value.strip()) is not None


def read_perturbations(
    values: Sequence[Any], column: str, dialect: str = "auto", control: str | None = None
) -> Perturbations:
    """Read the values of an obs column; missing ones (None, nan, empty) are no perturbation.

    Raises DataError when no value stands for control cells, listing the values that there are, or when all do.
    """
    texts = np.array([_text(value) for value in values], dtype=object)
    known, codes = np.unique(np.array([text or "" for text in texts], dtype=str), return_inverse=True)
    counts = np.bincount(codes, minlength=len(known))
    there = [str(value) for value in known if value]
    if dialect == "auto":
        dialect = recognise(there, column)
    if control is not None and control not in there:
        raise DataError(
            f"obs['{column}']: no cell has the value '{control}' that data_module.perturbation.control names; {_listed(there)}"
        )
    found: dict[str, tuple[str, ...] | None] = {}
    for value in there:
        if value == control or (control is None and _is_control(value, dialect)):
            found[value] = ()
        else:
            found[value] = _genes(value, dialect, control)
    controls = {value: int(counts[place]) for place, value in enumerate(known) if found.get(str(value)) == ()}
    if not controls:
        raise DataError(
            f"obs['{column}']: no value stands for control cells (looked for control, ctrl, non-targeting, NT and the like); "
            f"{_listed(there)}. Name it with data_module.perturbation.control=VALUE"
        )
    names = [_name(found.get(str(value))) for value in known]
    if not any(name not in (None, CONTROL) for name in names):
        raise DataError(f"obs['{column}']: every value stands for control cells; {_listed(there)}")
    targets = {name: genes for genes in found.values() if genes and (name := _name(genes))}
    return Perturbations(np.array(names, dtype=object)[codes], dict(sorted(targets.items())), dialect, controls)


def recognise(values: Sequence[str], column: str = "") -> str:
    """The dialect that distinct values of an obs column look like."""
    if any("+" in value for value in values):
        return "gears"
    if any("(mod)" in value for value in values) and any("_" in value for value in values):
        return "adamson"
    if any(re.fullmatch(r"non[-_ ]?targeting", value, re.IGNORECASE) for value in values):
        return "vcc" if column == "target_gene" else "replogle"
    return "scperturb" if any("_" in value and not looks_like_control(value) for value in values) else "plain"


def _is_control(value: str, dialect: str) -> bool:
    if dialect == "adamson":
        stem = _without_guide(value)
        return stem.endswith("(mod)") or stem.endswith("ctrl") or looks_like_control(stem)
    if dialect == "gears":
        return all(looks_like_control(part) for part in value.split("+"))
    return looks_like_control(value)


def _without_guide(value: str) -> str:
    """SPI1_pDS255 without the name of its guide."""
    return value.rpartition("_")[0] or value


def _genes(value: str, dialect: str, control: str | None) -> tuple[str, ...] | None:
    """The target genes of a value that is no control; None where it names none."""
    if dialect in ("gears", "plain", "scperturb"):
        parts = value.split("+" if dialect == "gears" else "_")
        # With a control of another name, a gene may be called CTRL, as one is.
        parts = [part for part in parts if part != control and (control is not None or not looks_like_control(part))]
    elif dialect == "adamson":
        stem = _without_guide(value).removesuffix("_only")
        parts = [] if stem == "*" or "*" in value else stem.split("_")
    else:  # one target a cell
        parts = [value]
    genes = {part.strip() for part in parts if part.strip()}
    return tuple(sorted(genes)) or None


def _name(genes: tuple[str, ...] | None) -> str | None:
    return None if genes is None else "_".join(genes) if genes else CONTROL


def _text(value: Any) -> str | None:
    if value is None or value != value:
        return None
    text = str(value).strip()
    return None if text in ("", "nan", "None", "NaN") else text


def _listed(values: Sequence[str]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return f"its {len(values)} values are {', '.join(values[:_SHOWN])}{more}"
