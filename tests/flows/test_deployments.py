"""deployments/prefect.yaml: generated from the catalogue, and what the documents promise about pools and schedules."""

import ast
from pathlib import Path

import pytest
import yaml

from bmfm_pipeline.config import list_entries
from bmfm_pipeline.config.suites import list_suites
from flows import deployments

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
DEPLOYED = {(entry["tags"][1], entry["name"]): entry for entry in DOCUMENT["deployments"]}
FLOWS = ("preprocess", "pretrain", "finetune", "evaluate", "reevaluate", "interpret", "pipeline")


def test_the_committed_file_is_what_the_catalogue_renders():
    committed = (ROOT / "deployments" / "prefect.yaml").read_text()
    assert committed == deployments.render(), "run `python -m flows.deployments`"


def test_every_flow_is_deployed_for_every_dataset_that_is_marked_for_it():
    marked = [entry.name for entry in list_entries() if entry.deployed]
    of_datasets = {(flow, name) for flow in FLOWS for name in marked}
    of_suites = {("benchmark", suite.name) for suite in list_suites() if suite.deployed}
    assert set(DEPLOYED) == of_datasets | of_suites | {("predict", "file")}
    assert "zheng68k" in marked and ("benchmark", "demo") in of_suites
    assert len(DEPLOYED) == len(DOCUMENT["deployments"])


@pytest.mark.parametrize("key", DEPLOYED, ids="/".join)
def test_a_deployment_names_a_flow_of_its_file_and_its_own_dataset(key):
    entry = DEPLOYED[key]
    file, _, function = entry["entrypoint"].partition(":")
    tree = ast.parse((ROOT / file).read_text())
    flow = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    assert any("flow" in ast.unparse(decorator) for decorator in flow.decorator_list)
    assert function == key[0]
    # What predicts the cells of any file has nothing to begin with: its form asks for model, file and folder.
    about = {"benchmark": "suite"}.get(key[0], "target")
    assert entry.get("parameters") == (None if key[0] == "predict" else {"parameters": {about: key[1]}})
    assert entry["enforce_parameter_schema"] is True
    assert entry["description"]


@pytest.mark.parametrize("key", DEPLOYED, ids="/".join)
def test_preprocessing_goes_to_the_cpu_pool_and_whatever_runs_a_model_to_the_gpu_pool(key):
    entry = DEPLOYED[key]
    # A pipeline only waits for its stages, and must not hold a GPU meanwhile.
    assert entry["work_pool"] == {"name": "cpu" if key[0] in ("preprocess", "pipeline") else "gpu"}
    # A limit of a deployment is a lease: a server that is away for minutes would end the training that holds it.
    assert "concurrency_limit" not in entry


def test_zheng68k_is_evaluated_again_every_monday_once_somebody_turns_the_schedule_on():
    scheduled = {key: entry["schedules"] for key, entry in DEPLOYED.items() if "schedules" in entry}
    assert scheduled == {("reevaluate", "zheng68k"): [{"cron": "0 3 * * 1", "timezone": "UTC", "active": False}]}


def test_the_file_is_of_the_version_of_prefect_that_the_project_installs():
    requirements = (ROOT / "pyproject.toml").read_text()
    assert f'"prefect=={DOCUMENT["prefect-version"]}"' in requirements


def test_a_worker_finds_the_flows_where_they_are_installed():
    assert deployments.locate_flows() == {"directory": str(ROOT)}


def test_a_worker_of_an_installed_wheel_is_told_to_name_a_workspace(monkeypatch, tmp_path):
    wheel = tmp_path / "site-packages"
    monkeypatch.setattr(deployments, "__file__", str(wheel / "flows" / "deployments.py"))
    assert deployments.locate_flows() == {"directory": str(wheel)}
    monkeypatch.delenv("BMFM_WORKSPACE")
    with pytest.raises(RuntimeError, match="BMFM_WORKSPACE is not set"):
        deployments.locate_flows()
