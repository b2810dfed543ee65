"""`bmfm reevaluate` and `bmfm promote`: the champion of a dataset tested again, and a challenger beside it."""

import argparse
import getpass
import sys
from typing import Any

from bmfm_pipeline.commands.one_stage import _label
from bmfm_pipeline.commands.terminal import Terminal
from bmfm_pipeline.errors import ConfigError


def person() -> str:
    """Who works at this terminal, as records name them."""
    try:
        return f"person ({getpass.getuser()})"
    except (OSError, KeyError):  # a container's user without a name
        return "person"


def reevaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from bmfm_pipeline.stages.reevaluate import plan_reevaluation

    label, overrides = _label(arguments.overrides)
    return _carry_out(
        plan_reevaluation(_target(arguments), label=label, data=arguments.data, overrides=overrides), arguments
    )


def promote(arguments: argparse.Namespace) -> dict[str, Any]:
    from bmfm_pipeline.stages.reevaluate import plan_promotion

    label, overrides = _label(arguments.overrides)
    plan = plan_promotion(
        _target(arguments), model=arguments.model, label=label, overrides=overrides, triggered_by=person()
    )
    return _carry_out(plan, arguments)


def _target(arguments: argparse.Namespace) -> str:
    if arguments.target is None:
        raise ConfigError(
            f"{arguments.command}: name a dataset (see `bmfm datasets`) or the file that the model is about"
        )
    return arguments.target


def _carry_out(plan: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from bmfm_pipeline.stages import run_stage

    with Terminal() as terminal:
        for job in plan.jobs:
            terminal({"kind": "stage", "stage": job.title, "cached": job.cached, "reason": job.reason})
            run_stage(job, terminal)
        terminal.finish()
    from bmfm_pipeline.stages.reevaluate_decision import conclude, page

    found = conclude(plan, {"triggered_by": person()})
    text = found["message"] if plan.only_promotion else page(found)
    print(text.rstrip(), file=sys.stderr if arguments.json else sys.stdout)
    return found
