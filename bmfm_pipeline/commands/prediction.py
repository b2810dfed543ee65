"""`bmfm predict`: labels, probabilities and embeddings for the cells of an h5ad file."""

import argparse
import sys
from typing import Any

from bmfm_pipeline.commands.terminal import Terminal


def predict(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.perturb:
        return _perturbed(arguments)
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
            on_progress=terminal,
        )
    return _say(found, arguments)


def _perturbed(arguments: argparse.Namespace) -> dict[str, Any]:
    """What perturbations in silico do to the cells of a file."""
    from bmfm_pipeline.errors import ConfigError
    from bmfm_pipeline.stages.in_silico import perturb_file

    spare = {
        "--h5ad": arguments.h5ad, "--pooling": arguments.pooling, "--umap": arguments.umap, "--batch-column": arguments.batch_column,
        "--unknown-below": arguments.unknown_below,
    }  # fmt: skip
    if given := [name for name, value in spare.items() if value]:
        raise ConfigError(
            f"{', '.join(given)}: does not go with --perturb, which writes tables of its own; leave it out"
        )
    if arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]}: does not go with --perturb")
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


def predict_as_configured(run, arguments: argparse.Namespace) -> dict[str, Any]:
    """A bmfm_targets config with a predict task."""
    from bmfm_pipeline.stages.predict import predict_with_config

    with Terminal() as terminal:
        terminal({"kind": "step", "stage": "predict", "step_name": "predict"})
        found = predict_with_config(run, arguments.workspace, terminal)
    return _say(found, arguments)


def _say(found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    genes = found["genes"]
    rate = f" ({found['cells_per_s']:.0f} cells/s)" if found["cells_per_s"] else ""
    what = "cells" if genes is not None else "sequences"
    lines = [f"{found['cells']} {what} predicted{rate}"]
    lines += [f"  {file}" for file in found["files"]]
    lines.append(f"{found['tensors_loaded']} tensors of the model were loaded, none was missing or left over")
    if genes is not None:
        lines.append(f"{genes['known']} of {genes['genes']} genes are known to the model")
    if too_long := found.get("longer_than_the_model"):
        lines.append(f"{too_long} sequences are longer than the model reads and were cut")
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
