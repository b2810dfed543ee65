"""`bmfm preprocess|pretrain|finetune|evaluate` and the command line of bmfm_targets: single stages, without Prefect."""

import argparse
import json
import sys
from typing import Any

from bmfm_pipeline.commands.results import describe, outcome
from bmfm_pipeline.commands.terminal import Terminal
from bmfm_pipeline.config import compose
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages import plan_stage, run_stage
from bmfm_pipeline.stages.controls_plan import check_controls
from bmfm_pipeline.stages.planning import DEFAULT_CONFIGS, compose_stage


def preprocess(arguments: argparse.Namespace) -> dict[str, Any]:
    return _run("preprocess", arguments)


def pretrain(arguments: argparse.Namespace) -> dict[str, Any]:
    return _run("pretrain", arguments)


def finetune(arguments: argparse.Namespace) -> dict[str, Any]:
    return _run("finetune", arguments)


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.write_label_mapping:
        return _write_label_mapping(arguments)
    return _run("evaluate", arguments)


def _write_label_mapping(arguments: argparse.Namespace) -> dict[str, Any]:
    """The labels of other data as a file to fill in, for evaluation.label_mapping."""
    from bmfm_pipeline.stages.planning import write_label_mapping

    label, overrides = _label(arguments.overrides)
    file = arguments.write_label_mapping
    named = {"config_name": arguments.config_name, "config_dir": arguments.config_dir, "overrides": overrides}
    found = write_label_mapping(file, arguments.target, label=label, **named)
    print(
        f"{found['file']}: {found['labels']} labels, of which {found['to_fill_in']} are to be filled in (?); then test with "
        f"evaluation.label_mapping={file}",
        file=sys.stderr if arguments.json else sys.stdout,
    )
    return found


def interpret(arguments: argparse.Namespace) -> dict[str, Any]:
    return _run("interpret", arguments)


def seed(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a bmfm_targets config asks for: its task and what it masks say which stage it is."""
    arguments.target = None
    arguments.config_name = arguments.config_name.removesuffix(".yaml")
    run = compose(arguments.config_name, arguments.overrides, arguments.config_dir)
    if run.task_kind == "train":
        return _run(run.training_stage, arguments)
    if run.task_kind == "test":
        return _run("evaluate", arguments)
    if run.task_kind == "interpret":
        return _run("interpret", arguments)
    if run.task_kind == "predict":
        from bmfm_pipeline.commands.prediction import predict_as_configured

        return predict_as_configured(run, arguments)
    raise ConfigError(
        f"{arguments.config_name}: a task of kind '{run.task_kind}' cannot be run; kinds are train, test, predict, interpret"
    )


def _run(stage: str, arguments: argparse.Namespace) -> dict[str, Any]:
    label, overrides = _label(arguments.overrides)
    if stage == "evaluate":
        overrides = _with_controls(overrides)
    named = {"config_name": arguments.config_name, "config_dir": arguments.config_dir, "overrides": overrides}
    if arguments.cfg:
        return _show_config(stage, arguments, label, named)
    jobs = plan_stage(stage, arguments.target, label=label, **named)
    workspace, results = jobs[-1].place, {}
    with Terminal() as terminal:
        for job in jobs:
            terminal({"kind": "stage", "stage": job.title, "cached": job.cached, "reason": job.reason})
            results[job.title] = run_stage(job, terminal)
        terminal.finish()
        if stage == "finetune" and jobs[-1].config["promotion"]["after_finetune"] != "nothing":
            from bmfm_pipeline.commands.reevaluating import person
            from bmfm_pipeline.stages.registering import offer_model

            offer_model(jobs[-1], None, person())
    found = outcome(workspace, results)
    print(describe(found), file=sys.stderr if arguments.json else sys.stdout)
    return found


def _show_config(stage: str, arguments: argparse.Namespace, label: str | None, named: dict[str, Any]) -> dict[str, Any]:
    """The composed and checked config, as it would be run."""
    import yaml

    if arguments.target is None and arguments.config_name is None:
        named["config_name"] = DEFAULT_CONFIGS[stage]
    plain = compose_stage(stage, arguments.target, label=label, **named).model_dump(mode="json")
    if not arguments.json:
        print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120), end="")
    return plain


def _label(overrides: list[str]) -> tuple[str | None, list[str]]:
    """label=COLUMN is an argument of a stage too; the rest are Hydra overrides."""
    labels = [word.partition("=")[2] for word in overrides if word.startswith("label=")]
    if labels and not labels[-1]:
        raise ConfigError("label= needs a value, the name of an obs column")
    return (labels[-1] if labels else None), [word for word in overrides if not word.startswith("label=")]


def _with_controls(overrides: list[str]) -> list[str]:
    """controls=full,no_pretrain is an argument of evaluate, as it is of `bmfm run`."""
    found = []
    for word in overrides:
        name, _, value = word.partition("=")
        if name == "controls":
            check_controls(value)
            word = f"evaluation.controls={json.dumps(value)}"
        found.append(word)
    return found
