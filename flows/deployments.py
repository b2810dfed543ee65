"""deployments/prefect.yaml, generated from the dataset catalogue, and the step with which a worker finds the flows.

Run `python -m flows.deployments` after changing the catalogue; a test compares the committed file with `render()`.
"""

import os
import sys
from pathlib import Path
from typing import Any

FLOWS = {
    "preprocess": "Check, split and transform {title}",
    "pretrain": "Pretrain a model on {title}",
    "finetune": "Fine-tune a model on the labels of {title}",
    "evaluate": "Test the fine-tuned model of {title}, with confidence intervals and controls",
    "reevaluate": "Test the champion of {title} on the data as they are now, and a challenger beside it",
    "interpret": "Which genes the predictions of the model of {title} come from",
    "pipeline": "The whole chain on {title}",
}
# Flows whose input is no dataset of the catalogue: one deployment each, whose form says what it is about.
OF_ANY_FILE = {"predict": ("file", "Labels, probabilities and embeddings for the cells of any h5ad file")}
# How many runs a pool starts at once is a limit of the pool (`bmfm deploy --gpus`). A limit of a deployment is a lease that its run
# renews, and a run that cannot, because the server is away or has forgotten it, is ended by Prefect: no place for long trainings.
# A pipeline starts its stages on their pools, and only waits.
POOLS = {"preprocess": "cpu", "pipeline": "cpu"}  # everything else runs a model
DEFAULT_POOL = "gpu"
PREFECT_VERSION = "3.8.8"
# What a worker does before a run: it finds the flows where they are installed.
PULL_STEPS = [
    {"flows.deployments.locate_flows": {"id": "flows"}},
    {"prefect.deployments.steps.set_working_directory": {"directory": "{{ flows.directory }}"}},
]
HEADER = """\
# Run with: prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
# Generated from bmfm_pipeline/datasets by `python -m flows.deployments`; edit the catalogue, not this file.
# `bmfm deploy` registers the same from the catalogue, with limits, automations and your own datasets. With this file,
# from the top of the checkout:
#   prefect work-pool create cpu --type process
#   prefect work-pool create gpu --type process
#   prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
#   prefect worker start --pool cpu     (and another one: --pool gpu)
#   prefect deployment run pretrain/zheng68k
#   prefect deployment run benchmark/demo
#   prefect deployment run predict/file --param parameters='{"model": "latest", "input": "cells.h5ad", "output": "predictions"}'
# Set BMFM_WORKSPACE, MLFLOW_TRACKING_URI and the datasets' folders (BMFM_TARGETS_ZHENG68K_DATA) where the workers start.
"""
PATH = Path(__file__).resolve().parents[1] / "deployments" / "prefect.yaml"


def locate_flows() -> dict[str, str]:
    """Pull step: the folder that holds the `flows` package on the machine of the worker, a checkout or an installed wheel."""
    directory = Path(__file__).resolve().parents[1]
    if directory.name == "site-packages" and not os.environ.get("BMFM_WORKSPACE"):
        raise RuntimeError(
            "BMFM_WORKSPACE is not set, and this worker runs from an installed wheel, where ./workspace would lie inside the "
            "installation; set BMFM_WORKSPACE to a folder or s3://bucket/prefix before starting the worker"
        )
    return {"directory": str(directory)}


def deployments() -> list[dict[str, Any]]:
    """One deployment for each flow and each dataset that the catalogue marks as deployed, for each such suite, and those that take any
    file."""
    from bmfm_pipeline.config import list_entries
    from bmfm_pipeline.config.suites import list_suites

    of_datasets = [_deployment(flow, entry) for flow in FLOWS for entry in list_entries() if entry.deployed]
    of_suites = [_of_suite(suite) for suite in list_suites() if suite.deployed]
    return of_datasets + of_suites + [_of_any_file(flow, *said) for flow, said in OF_ANY_FILE.items()]


def _of_any_file(flow: str, name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "description": description,
        "tags": ["bmfm", flow],
        "entrypoint": f"flows/{flow}.py:{flow}",
        "enforce_parameter_schema": True,
        "work_pool": {"name": POOLS.get(flow, DEFAULT_POOL)},
    }


def _of_suite(suite: Any) -> dict[str, Any]:
    """Its trainings run one after the other in its own place, or wherever BMFM_DASK of the worker says."""
    return {
        "name": suite.name,
        "description": f"Benchmark: {suite.title or suite.name}",
        "tags": ["bmfm", "benchmark"],
        "entrypoint": "flows/benchmark.py:benchmark",
        "parameters": {"parameters": {"suite": suite.name}},
        "enforce_parameter_schema": True,
        "work_pool": {"name": POOLS.get("benchmark", DEFAULT_POOL)},
    }


def _deployment(flow: str, entry: Any) -> dict[str, Any]:
    pool = POOLS.get(flow, DEFAULT_POOL)
    made = {
        "name": entry.name,
        "description": FLOWS[flow].format(title=entry.title),
        "tags": ["bmfm", flow],
        "entrypoint": f"flows/{flow}.py:{flow}",
        "parameters": {"parameters": {"target": entry.name}},
        "enforce_parameter_schema": True,
        "work_pool": {"name": pool},
    }
    schedule = entry.evaluate_schedule
    if flow == "reevaluate" and schedule is not None:
        made["schedules"] = [{"cron": schedule.cron, "timezone": schedule.timezone, "active": schedule.active}]
    return made


def render() -> str:
    """The text of deployments/prefect.yaml."""
    import yaml

    document = {
        "name": "bmfm_pipeline",
        "prefect-version": PREFECT_VERSION,
        "pull": PULL_STEPS,
        "deployments": deployments(),
    }
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render(), encoding="utf-8")
    print(f"{PATH}: {len(deployments())} deployments", file=sys.stderr)
