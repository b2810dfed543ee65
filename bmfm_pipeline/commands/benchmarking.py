"""`bmfm benchmark SUITE`: several datasets, models and seeds, and one table."""

import argparse
import sys
from typing import Any

from bmfm_pipeline.commands.results import where_to_look
from bmfm_pipeline.commands.terminal import Terminal
from bmfm_pipeline.config.suites import list_suites
from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.benchmark_plan import BenchmarkPlan, lines_of, plan_benchmark
from bmfm_pipeline.stages.benchmark_running import IncompleteBenchmark
from bmfm_pipeline.storage import Workspace, load_artefact, read_json

# Arguments of the run and not of what is run.
OWN = ("parallel", "fan_out")


class Answer(dict):
    """What a benchmark found; `exit_code` is 2 when a cell of it failed."""

    exit_code = 0


def benchmark(arguments: argparse.Namespace) -> Any:
    """Plan every cell, then run what is not there yet through Prefect, in this process; `--plan` stops before that."""
    if arguments.suite is None:
        return _list(arguments)
    own, words = _own_arguments(arguments.overrides)
    plan = plan_benchmark(arguments.suite, words)
    if arguments.plan:
        return _show_plan(plan, arguments)
    incomplete: IncompleteBenchmark | None = None
    table = plan.table_job()
    with Terminal() as terminal:
        for line in lines_of(plan.unplanned):
            terminal.say(f"warning: left out: {line.removeprefix('- ')}")
        if all(job.cached for job in plan.jobs) and table.cached:
            terminal.say(f"benchmark {plan.suite.name}: reused ({len(plan.cells)} cells)")
            answer = {
                "uri": table.uri,
                "cells": {cell.name: cell.evaluation.uri for cell in plan.cells},
                "failed": {name: str(error) for name, error in plan.unplanned.items()},
            }
            incomplete = IncompleteBenchmark(answer) if plan.unplanned else None
        else:
            try:
                answer = _through_prefect(arguments.suite, own, words, plan.place, terminal)
            except IncompleteBenchmark as error:  # what there is is shown first
                answer, incomplete = error.answer, error
    found = Answer(_found(answer, plan.place))
    text = [describe(found), where_to_look(plan.place)]
    print("\n".join(text), file=sys.stderr if arguments.json else sys.stdout)
    if incomplete is not None:  # the table is there, and programs get it too
        print(f"error: {incomplete}", file=sys.stderr)
        found.exit_code = 2
    return found


def _through_prefect(
    suite: str, own: dict[str, str], words: list[str], workspace: Workspace, terminal: Terminal
) -> dict[str, Any]:
    workspace.check_writable()
    from flows import local

    terminal.say(f"starting Prefect; its state lies in {workspace.state_dir}")
    parameters = {"suite": suite, "overrides": words, "workspace": workspace.uri, **own}
    found = local.start_benchmark_here(workspace.state_dir, parameters, terminal)
    terminal.finish()
    return found


def _found(answer: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    artefact = load_artefact(answer["uri"])
    table = read_json(artefact.local_file("benchmark.json"))
    return {
        "benchmark": artefact.uri,
        "files": {name: artefact.file(name) for name in sorted(artefact.files) if name.startswith("benchmark.")},
        **{name: table[name] for name in ("rows", "tasks", "ranks", "sentences", "notes")},
        "cells": answer["cells"],
        "failed": answer["failed"],
        "workspace": workspace.uri,
        **{name: answer[name] for name in ("mlflow_url", "mlflow_run_id", "flow_run_id") if name in answer},
    }


def describe(found: dict[str, Any]) -> str:
    """The table, the sentences, and where the page lies."""
    from bmfm_pipeline.evaluation.benchmark_words import benchmark_text

    failed = [{"name": name, "reason": reason} for name, reason in found["failed"].items()]
    lines = ["", benchmark_text({**found, "failed": failed}), "", *found["sentences"], ""]
    lines.append(f"page        {found['files']['benchmark.html']}")
    lines.append(f"tables      {found['files']['benchmark.md']}, {found['files']['benchmark.csv']}")
    return "\n".join(lines)


def _own_arguments(words: list[str]) -> tuple[dict[str, str], list[str]]:
    own = {}
    rest = []
    for word in words:
        name, _, value = word.partition("=")
        if name in OWN:
            own[name] = value
        else:
            rest.append(word)
    parallel = own.get("parallel", "1")
    if not parallel.isdecimal() or int(parallel) < 1:
        raise ConfigError(f"parallel={parallel}: must be a whole number from 1, of cells at the same time")
    return own, rest


def _show_plan(plan: BenchmarkPlan, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every job with the cells that need it, and whether it is there."""
    rows = []
    for job in plan.jobs:
        cells = [cell.name for cell in plan.cells if any(own.key == job.key for own in cell.jobs)]
        row = {"stage": job.title, "cached": job.cached, "reason": job.reason, "key": job.key, "uri": job.uri}
        rows.append({**row, "cells": cells})
    rows += [{"stage": "", "cell": name, "error": str(error)} for name, error in plan.unplanned.items()]
    if not arguments.json:
        for row in rows:
            if "error" in row:
                print(f"cannot run  {row['cell']}: {row['error']}")
                continue
            whose = row["cells"][0] if len(row["cells"]) == 1 else f"{len(row['cells'])} cells"
            print(
                f"{row['stage']:<11} {'reuse' if row['cached'] else 'run':<6} {row['key'][:8]}  {whose}  {row['reason']}"
            )
    return rows


def _list(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The suites that are known by name."""
    suites = list_suites()
    if not arguments.json:
        width = max(len(suite.name) for suite in suites)
        for suite in suites:
            size = f"{len(suite.datasets)} datasets, {len(suite.models)} models, {len(suite.seeds)} seeds"
            print(f"{suite.name:<{width}}  {suite.title} ({size})")
        print("\nbmfm benchmark NAME runs one; `--plan` says what it would do")
    return [suite.model_dump() for suite in suites]
