"""Splits by perturbation: whole perturbations are held out, never cells of one that is trained on."""

import numpy as np
import pandas as pd

from bmfm_pipeline.config.splits import PLACE, SplitPlan
from bmfm_pipeline.data.perturbations.names import CONTROL
from bmfm_pipeline.data.splits import Split
from bmfm_pipeline.errors import DataError

GROUP_COLUMN = "perturbation_group"
_SEEN_BOTH_IN_TRAIN = 0.85  # of combinations of two training genes, in a simulation


def split_by_perturbation(names: pd.Series, targets: dict[str, tuple[str, ...]], plan: SplitPlan) -> Split:
    """The split of every cell from the perturbations `names` (cells,), None for none; controls are training cells, cells of none unused.

    plan.perturbations says what is held out. single_only: single genes, and cells of combinations are unused. single: single genes; a
    combination is trained on when none of its genes is held out, and else unused. combo_seen0, 1, 2: combinations of which so many genes
    are trained on (alone, for combo_seen2) make up test and dev. simulation: a share of the genes is held out; single ones of these, every
    combination with at least one, and 15 % of the combinations of other genes are divided into dev and test.
    The record has, in its notes, the group of every perturbation. Draws depend on the sorted names and the seed alone.
    """
    generator = np.random.default_rng([plan.seed & 0xFFFFFFFF, 0x9E7])
    present = {name for name in names.dropna().unique() if name != CONTROL}
    targets = {name: genes for name, genes in sorted(targets.items()) if name in present}
    weights = plan.weights or {}
    made = _grouped(_MAKERS[plan.perturbations](targets, weights, generator), targets, plan.perturbations)
    notes = {
        "perturbations": {
            split: [name for name in made if made[name][0] == split] for split in ("train", "dev", "test", "unused")
        }
    }
    notes["perturbation_groups"] = {name: group for name, (_, group) in made.items() if group}
    for split in ("train", "test"):
        if (split == "train" or weights.get(split, 0) > 0) and not notes["perturbations"][split]:
            singles = sum(len(genes) == 1 for genes in targets.values())
            raise DataError(
                f"{PLACE}: {split} would have no perturbation; there are {singles} of single genes and {len(targets) - singles} of several, too few "
                f"for perturbations={plan.perturbations} with these weights"
            )
    if weights.get("dev", 0) > 0 and not notes["perturbations"]["dev"]:
        notes["without_dev"] = "too few perturbations are held out for some of them to be dev"
    meant = {name: split for name, (split, _) in made.items()} | {CONTROL: "train"}
    assigned = pd.Series([meant.get(name, "unused") for name in names], index=names.index, dtype=object)
    if missing := int(names.isna().sum()):
        notes["cells_without_perturbation"] = missing
    return Split(assigned, notes)


Made = dict[str, str]  # the split of every perturbation


def _grouped(made: Made, targets, method: str) -> dict[str, tuple[str, str]]:
    """{perturbation: (split, group)}: a group says of how many of its genes the training has a perturbation, alone or with others.

    Combinations that a combo_seen split would hold out with another number of such genes are unused.
    """
    trained = {gene for name, split in made.items() if split == "train" for gene in targets[name]}
    found = {}
    for name, split in sorted(made.items()):
        genes, seen = targets[name], len(trained & set(targets[name]))
        kind = f"combo_seen{seen}" if len(genes) > 1 else "seen_single" if seen else "unseen_single"
        if split in ("dev", "test") and method.startswith("combo_seen") and kind != method:
            split = "unused"
        found[name] = (split, f"{kind}_{split}" if split in ("dev", "test") else "")
    return found


def _held_out(names: list[str], weights: dict[str, float], generator) -> dict[str, str]:
    """dev, test or train of each: at least one of a split that is wanted, as long as there are enough."""
    order = [names[place] for place in generator.permutation(len(names))]
    test = _count(len(order), weights.get("test", 0))
    rest = len(order) - test
    share = weights.get("dev", 0) / max(1e-9, 1 - weights.get("test", 0))
    dev = _count(rest, share)
    return {
        name: "test" if place < test else "dev" if place < test + dev else "train" for place, name in enumerate(order)
    }


def _count(n: int, share: float) -> int:
    return min(n, max(1, int(n * share + 1e-9))) if share > 0 and n else 0


def _single(combinations: bool):
    def make(targets, weights, generator) -> Made:
        made = _held_out([name for name, genes in targets.items() if len(genes) == 1], weights, generator)
        out = {targets[name][0] for name, split in made.items() if split != "train"}
        for name, genes in targets.items():
            if len(genes) > 1:
                made[name] = "train" if combinations and not out & set(genes) else "unused"
        return made

    return make


def _genes_held_out(targets, weights, generator) -> set[str]:
    genes = sorted({gene for of in targets.values() for gene in of})
    share = weights.get("test", 0) + weights.get("dev", 0)
    return {genes[place] for place in generator.permutation(len(genes))[: _count(len(genes), share)]}


def _halves(names: list[str], weights, generator) -> Made:
    """Held-out perturbations as dev and test, in the proportion of the weights of the two."""
    total = weights.get("dev", 0) + weights.get("test", 0)
    share = weights.get("dev", 0) / total if total else 0.0
    order = [names[place] for place in generator.permutation(len(names))]
    dev = min(round(share * len(order)), max(0, len(order) - 1))
    return {name: "dev" if place < dev else "test" for place, name in enumerate(order)}


def _combinations(seen: int):
    def make(targets, weights, generator) -> Made:
        pairs = [name for name, genes in targets.items() if len(genes) > 1]
        if seen == 2:  # whole genes are not held out: each is trained on alone, or in another combination
            known = {gene for genes in targets.values() if len(genes) == 1 for gene in genes}
            whole = [name for name in pairs if set(targets[name]) <= known]
            return {name: "train" for name in targets} | _held_out(whole, weights, generator)
        out = _genes_held_out(targets, weights, generator)
        made = {name: "unused" if out & set(genes) else "train" for name, genes in targets.items()}
        chosen = [name for name in pairs if len(set(targets[name]) - out) == seen and out & set(targets[name])]
        return made | _halves(chosen, weights, generator)

    return make


def _simulation(targets, weights, generator) -> Made:
    out = _genes_held_out(targets, weights, generator)
    groups: dict[str, list[str]] = {}
    for name, genes in targets.items():
        unseen = len(out & set(genes))
        kind = "combo" if len(genes) > 1 else "single"
        groups.setdefault(f"{kind} {unseen}", []).append(name)
    made: Made = {}
    for group in sorted(groups):
        names = groups[group]
        if group.endswith(" 0"):
            held = weights.get("test", 0) + weights.get("dev", 0) > 0 and group == "combo 0"
            order = [names[place] for place in generator.permutation(len(names))]
            kept = min(round(_SEEN_BOTH_IN_TRAIN * len(order)), max(0, len(order) - 1)) if held else len(order)
            made |= {name: "train" for name in order[:kept]}
            names = sorted(order[kept:])
        made |= _halves(names, weights, generator)
    return made


_MAKERS = {
    "single_only": _single(False),
    "single": _single(True),
    "combo_seen0": _combinations(0),
    "combo_seen1": _combinations(1),
    "combo_seen2": _combinations(2),
    "simulation": _simulation,
}
