"""`bmfm run` and `bmfm plan`: the whole chain on one dataset."""

import argparse
import sys
from typing import Any

from bmfm_pipeline.commands.results import describe, outcome, where_to_look
from bmfm_pipeline.commands.terminal import Terminal
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages import STAGES, plan_pipeline
from bmfm_pipeline.stages.running import restore_copies
from bmfm_pipeline.storage import Workspace

# `bmfm run` takes these before Hydra sees the overrides.
RUN_ARGUMENTS = ("label", "task", "perturbation_column_name", "controls")
CONTROLS = ("default", "full")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan, then run what is not there yet through Prefect, in this process; without anything to do no server is started."""
    own, overrides = split_run_arguments(arguments.overrides)
    jobs = plan_pipeline(arguments.target, overrides=overrides, **own)
    workspace = jobs[-1].place
    with Terminal() as terminal:
        if all(job.cached for job in jobs):
            for job in jobs:
                terminal({"kind": "stage", "stage": job.stage, "cached": True, "reason": job.reason})
                restore_copies(job)
            found = outcome(workspace, {job.stage: {"uri": job.uri} for job in jobs})
            found |= {"mlflow_url": None, "flow_run_id": None}
        else:
            found = _through_prefect(arguments.target, own, overrides, workspace, terminal)
        for stage in STAGES:
            if stage not in found["artefacts"]:
                terminal.say(f"{stage}: skipped, {jobs[-1].name} has no label column")
    print("\n".join([describe(found), where_to_look(workspace)]), file=sys.stderr if arguments.json else sys.stdout)
    return found


def _through_prefect(
    target: str, own: dict[str, str], overrides: list[str], workspace: Workspace, terminal: Terminal
) -> dict[str, Any]:
    workspace.check_writable()
    from flows import local

    terminal.say(f"starting Prefect; its state lies in {workspace.state_dir}")
    parameters = {"target": target, "overrides": overrides, "workspace": workspace.uri, **own}
    result = local.start_here(workspace.state_dir, parameters, terminal)
    terminal.finish()
    found = outcome(workspace, result["stages"])
    return found | {name: result[name] for name in ("mlflow_url", "mlflow_run_id", "flow_run_id", "start_seconds")}


def plan(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What `bmfm run` would do: which stages are reused, which would run, and what made them differ."""
    own, overrides = split_run_arguments(arguments.overrides)
    jobs = plan_pipeline(arguments.target, overrides=overrides, **own)
    rows = [
        {"stage": job.stage, "cached": job.cached, "reason": job.reason, "key": job.key, "uri": job.uri} for job in jobs
    ]
    if not arguments.json:
        for row in rows:
            print(f"{row['stage']:<11} {'reuse' if row['cached'] else 'run':<6} {row['key'][:8]}  {row['reason']}")
    return rows


def split_run_arguments(overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the arguments of `run` (label=..., controls=...) from the Hydra overrides that follow."""
    own: dict[str, str] = {}
    hydra = []
    for word in overrides:
        name, _, value = word.partition("=")
        if name in RUN_ARGUMENTS:
            if not value:
                raise ConfigError(f"{name}= needs a value")
            own[name] = value
        else:
            hydra.append(word)
    for name in ("task", "perturbation_column_name"):
        if name in own:
            raise ConfigError(
                f"{name}={own[name]}: this version predicts labels of cells; perturbation tasks are not among its datasets. "
                f"Leave {name} out, or name a label column with label=COLUMN"
            )
    if own.get("controls", "default") not in CONTROLS:
        raise ConfigError(f"controls={own['controls']}: must be one of {', '.join(CONTROLS)}")
    return own, hydra
