"""`bmfm run` and `bmfm plan`: the whole chain on one dataset."""

import argparse
import json
import sys
from typing import Any

from bmfm_pipeline.commands.results import describe, outcome, where_to_look
from bmfm_pipeline.commands.terminal import Terminal
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages import STAGES, plan_pipeline
from bmfm_pipeline.stages.controls_plan import check_controls
from bmfm_pipeline.stages.pipeline_page import pipeline_page
from bmfm_pipeline.stages.planning import why_skipped
from bmfm_pipeline.stages.running import restore_copies
from bmfm_pipeline.stages.study_plan import StudyPlan, plan_study
from bmfm_pipeline.stages.study_running import IncompleteStudy
from bmfm_pipeline.storage import Workspace

# `bmfm run` takes these before Hydra sees the overrides.
STUDY_ARGUMENTS = ("few_shot", "seeds", "seeds_of", "parallel", "fan_out")
RUN_ARGUMENTS = ("label", "task", "perturbation_column_name", "controls", *STUDY_ARGUMENTS)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan, then run what is not there yet through Prefect, in this process; without anything to do no server is started."""
    own, overrides = split_run_arguments(arguments.overrides)
    study = plan_of_study(arguments.target, own, overrides)
    jobs = list(study.main.jobs) if study else plan_pipeline(arguments.target, overrides=overrides, **own)
    workspace = jobs[-1].place
    summary = study.study_job() if study else None
    with Terminal() as terminal:
        if all(job.cached for job in ([*study.jobs, summary] if study else jobs)):
            for job in jobs:
                terminal({"kind": "stage", "stage": job.title, "cached": True, "reason": job.reason})
                restore_copies(job)
            results = {job.title: {"uri": job.uri, "cached": True} for job in jobs}
            found = outcome(workspace, results)
            page = pipeline_page(workspace, results, summary.uri if study else None)
            found |= {"mlflow_url": None, "flow_run_id": None, "pipeline_report": page}
            if study:
                terminal.say(f"study: reused ({len(study.points)} points)")
                tests = {point.name: point.evaluation.uri for point in study.points}
                found["study"] = {"uri": summary.uri, "points": tests, "failed": {}}
        else:
            found = _through_prefect(arguments.target, own, overrides, workspace, terminal)
        for stage in STAGES:
            if stage not in found["artefacts"]:
                terminal.say(f"{stage}: skipped, {why_skipped(stage, jobs)}")
    incomplete = found.pop("incomplete", None)
    print("\n".join([describe(found), where_to_look(workspace)]), file=sys.stderr if arguments.json else sys.stdout)
    if incomplete is not None:
        raise incomplete
    return found


def _through_prefect(
    target: str, own: dict[str, str], overrides: list[str], workspace: Workspace, terminal: Terminal
) -> dict[str, Any]:
    workspace.check_writable()
    from flows import local

    terminal.say(f"starting Prefect; its state lies in {workspace.state_dir}")
    parameters = {"target": target, "overrides": overrides, "workspace": workspace.uri, **own}
    incomplete = {}
    try:
        result = local.start_here(workspace.state_dir, parameters, terminal)
    except IncompleteStudy as error:  # what there is is shown first
        result, incomplete = error.answer, {"incomplete": error}
    terminal.finish()
    found = outcome(workspace, result["stages"])
    told = ("mlflow_url", "mlflow_run_id", "flow_run_id", "start_seconds", "pipeline_report", "study")
    return found | {name: result[name] for name in told if name in result} | incomplete


def plan(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What `bmfm run` would do: which stages are reused, which would run, and what made them differ."""
    own, overrides = split_run_arguments(arguments.overrides)
    if study := plan_of_study(arguments.target, own, overrides):
        jobs = [(job, "all points") for job in study.shared]
        jobs += [(job, point.name) for point in study.points for job in study.own(point)]
        jobs.append((study.study_job(), "all points"))
    else:
        jobs = [(job, "") for job in plan_pipeline(arguments.target, overrides=overrides, **own)]
    rows = []
    for job, point in jobs:
        row = {"stage": job.title, "cached": job.cached, "reason": job.reason, "key": job.key, "uri": job.uri}
        rows.append({**row, "point": point} if study else row)
    if not arguments.json:
        width = max(len(row.get("point", "")) for row in rows)
        name = max(11, *(len(row["stage"]) for row in rows))
        for row in rows:
            point = f"{row['point']:<{width}}  " if study else ""
            print(
                f"{row['stage']:<{name}} {'reuse' if row['cached'] else 'run':<6} {row['key'][:8]}  {point}{row['reason']}"
            )
    return rows


def plan_of_study(target: str, own: dict[str, str], overrides: list[str]) -> StudyPlan | None:
    """The study that few_shot= and seeds= ask for; None when neither does, and then nothing about one is left in `own`."""
    asked = {name: own[name] for name in ("few_shot", "seeds") if own.get(name, "false").lower() != "false"}
    if not asked:
        spare = [f"{name}={own[name]}" for name in ("seeds_of", "parallel", "fan_out") if name in own]
        if spare:
            raise ConfigError(
                f"{', '.join(spare)}: is about several trainings; ask for them with few_shot=true or seeds=5"
            )
        for name in STUDY_ARGUMENTS:
            own.pop(name, None)
        return None
    parallel = own.get("parallel", "1")
    if not parallel.isdecimal() or int(parallel) < 1:
        raise ConfigError(f"parallel={parallel}: must be a whole number from 1, of trainings at the same time")
    named = {name: own[name] for name in ("label", "controls", "seeds_of") if name in own}
    return plan_study(target, overrides=overrides, **asked, **named)


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
    hydra += _about_pairs(own)
    if "controls" in own:
        check_controls(own["controls"])
    return own, hydra


def _about_pairs(own: dict[str, str]) -> list[str]:
    """task= and perturbation_column_name=, taken out of the arguments, as the overrides that they stand for."""
    task, column = own.pop("task", None), own.pop("perturbation_column_name", None)
    if task not in (None, "perturbation", "label"):
        raise ConfigError(f"task={task}: must be perturbation, or label, which is what a run does without it")
    if task == "label":
        if column is not None:
            raise ConfigError(
                f"perturbation_column_name={column}: goes with task=perturbation; leave one of the two out"
            )
        return []
    if task is None and column is None:
        return []
    if "label" in own:
        raise ConfigError(
            f"label={own['label']}: a run predicts a label or perturbations; leave it out, or leave out task=perturbation"
        )
    words = ["data_module.collation_strategy=sequence_labeling"]
    return words + ([f"data_module.perturbation.column={json.dumps(column)}"] if column else [])
