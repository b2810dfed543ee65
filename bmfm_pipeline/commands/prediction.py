"""`bmfm predict`: labels, probabilities and embeddings for the cells of an h5ad file."""

import argparse
import sys
from typing import Any

from bmfm_pipeline.commands.terminal import Terminal


def predict(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.perturb:
        return _perturbed(arguments)
    if arguments.variants:
        return _variants(arguments)
    if arguments.mutagenesis:
        return _mutagenesis(arguments)
    _of_changes_only(arguments)
    from bmfm_pipeline.stages.predict import Asked, predict_file
    from bmfm_pipeline.stages.prediction_settings import read_settings

    settings = read_settings(arguments.overrides)
    asked = Asked(
        poolings=arguments.pooling,
        format=arguments.format,
        annotated=arguments.h5ad,
        unknown_below=arguments.unknown_below,
        umap=arguments.umap,
        batch_column=arguments.batch_column,
    )
    with Terminal() as terminal:
        terminal({"kind": "step", "stage": "predict", "step_name": "predict"})
        found = predict_file(
            arguments.model,
            arguments.input,
            arguments.output,
            layer=arguments.layer,
            batch_size=arguments.batch_size,
            asked=asked,
            settings=settings,
            windows=arguments.windows,
            on_progress=terminal,
        )
    return _say(found, arguments)


def _perturbed(arguments: argparse.Namespace) -> dict[str, Any]:
    """What perturbations in silico do to the cells of a file."""
    from bmfm_pipeline.stages.in_silico import perturb_file

    _alone(arguments, "--perturb", ("layer",))
    with Terminal() as terminal:
        terminal({"kind": "step", "stage": "predict", "step_name": "perturb"})
        found = perturb_file(
            arguments.model,
            arguments.input,
            arguments.output,
            arguments.perturb,
            layer=arguments.layer,
            batch_size=arguments.batch_size,
            kind=arguments.format,
            on_progress=terminal,
        )
    lines = [
        f"{len(found['perturbations'])} perturbations of {found['cells']} cells",
        *(f"  {file}" for file in found["files"]),
    ]
    if found["cells_left_out"]:
        lines.append(f"{found['cells_left_out']} cells of the file were left out: unusable, or no control cells")
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    return found


# Options of a plain prediction, which other tables have no use for, and of these tables.
_OPTIONS = (
    "h5ad", "pooling", "umap", "batch_column", "unknown_below", "layer", "perturb", "variants", "window", "one_strand", "mutagenesis",
    "limit", "windows",
)  # fmt: skip


def _alone(arguments: argparse.Namespace, option: str, own: tuple[str, ...]) -> None:
    """Raise ConfigError for an option that does nothing beside `option`, whose own are named."""
    from bmfm_pipeline.errors import ConfigError

    known = (option.removeprefix("--").replace("-", "_"), *own)
    spare = [name for name in _OPTIONS if name not in known and getattr(arguments, name)]
    if spare:
        names = ", ".join("--" + name.replace("_", "-") for name in spare)
        raise ConfigError(f"{names}: does not go with {option}, which writes tables of its own; leave it out")
    if arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]}: does not go with {option}")


def _of_changes_only(arguments: argparse.Namespace) -> None:
    from bmfm_pipeline.errors import ConfigError

    for name, where in (
        ("window", "--variants"),
        ("one_strand", "--variants and --mutagenesis"),
        ("limit", "--mutagenesis"),
    ):
        if getattr(arguments, name):
            raise ConfigError(f"--{name.replace('_', '-')}: goes with {where} only; leave it out")


def _mutagenesis(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every change of a base does to the first sequences of a file."""
    from bmfm_pipeline.stages.mutagenesis import LIMIT, mutagenesis

    _alone(arguments, "--mutagenesis", ("one_strand", "limit"))
    with Terminal() as terminal:
        terminal({"kind": "step", "stage": "predict", "step_name": "mutagenesis"})
        found = mutagenesis(
            arguments.model,
            arguments.input,
            arguments.output,
            limit=LIMIT if arguments.limit is None else arguments.limit,
            both_strands=not arguments.one_strand,
            batch_size=arguments.batch_size,
            kind=arguments.format,
            on_progress=terminal,
        )
    lines = [
        f"{found['changes']:,} changes in {found['sequences']:,} sequences, strands: {found['strands']}",
        *(f"  {file}" for file in found["files"]),
    ]
    if found["sequences_left_out"]:
        lines.append(f"{found['sequences_left_out']:,} sequences of the file were left out; --limit N takes more")
    if found["longer_than_the_model"]:
        lines.append(
            f"{found['longer_than_the_model']:,} sequences are longer than the model reads; what it reads was changed"
        )
    if found["empty"]:
        lines.append(f"{found['empty']:,} sequences are empty")
    for name, entry in found["strongest"].items():
        change = f"{entry['ref']} to {entry['alt']} at {entry['position']} of {entry['sequence']}"
        lines.append(f"{name}: the largest change is {entry['difference']:+.3g}, by {change}")
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    return found


def _variants(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores of the reference and the alternative of each variant of a VCF file."""
    from bmfm_pipeline.stages.variants import variant_effects

    _alone(arguments, "--variants", ("window", "one_strand"))
    with Terminal() as terminal:
        terminal({"kind": "step", "stage": "predict", "step_name": "variants"})
        found = variant_effects(
            arguments.model,
            arguments.input,
            arguments.variants,
            arguments.output,
            window=arguments.window,
            both_strands=not arguments.one_strand,
            batch_size=arguments.batch_size,
            kind=arguments.format,
            on_progress=terminal,
        )
    lines = [
        f"{found['scored']:,} of {found['alternatives']:,} alternatives scored, windows of {found['window']:,} letters, strands: {found['strands']}",
        *(f"  {file}" for file in found["files"]),
        *(f"{count:,} have no score: {reason}" for reason, count in found["not_scored"].items()),
        *(f"{count:,} have one, but {reason}" for reason, count in found["scored_with_a_remark"].items()),
    ]
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    return found


def predict_as_configured(run, arguments: argparse.Namespace) -> dict[str, Any]:
    """A bmfm_targets config with a predict task."""
    from bmfm_pipeline.stages.predict import predict_with_config

    with Terminal() as terminal:
        terminal({"kind": "step", "stage": "predict", "step_name": "predict"})
        found = predict_with_config(run, arguments.workspace, terminal)
    return _say(found, arguments)


def _say(found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    genes = found["genes"]
    what = "cells" if genes is not None else "sequences"
    rate = f" ({found['cells_per_s']:.0f} {what}/s)" if found["cells_per_s"] else ""
    lines = [f"{found['cells']} {what} predicted{rate}"]
    lines += [f"  {file}" for file in found["files"]]
    lines.append(f"{found['tensors_loaded']} tensors of the model were loaded, none was missing or left over")
    if genes is not None:
        lines.append(f"{genes['known']} of {genes['genes']} genes are known to the model")
    if too_long := found.get("longer_than_the_model"):
        done = (
            "read in overlapping windows, whose answers are averaged"
            if found["in_windows"]
            else "cut; --windows reads all of them"
        )
        lines.append(f"{too_long} sequences are longer than the model reads and were {done}")
    lines += [f"{count} {what} have no label: {reason}" for reason, count in found["reasons"].items()]
    for name, entry in found["unknown"].items():
        lines.append(f"{entry['cells']} cells are called unknown: their {name} is less sure than {entry['below']:.3f}")
    lines += [
        f"{name:<18} {'none' if entry['value'] is None else format(entry['value'], '.3f')}"
        for name, entry in found.get("integration", {}).items()
    ]
    lines += found.get("integration_notes", [])
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    return found
