"""The flows as Prefect loads them, in a process of its own: the schemas of their forms, and what is tried again."""

import json
import os
import subprocess
import sys

import pytest

FLOWS = ("preprocess", "pretrain", "finetune", "evaluate", "reevaluate", "interpret", "pipeline")
QUESTION = """
import importlib, json, logging, sys
from flows import deployments, local, parameters
light = "prefect" not in sys.modules
local.prepare(sys.argv[1])
from prefect.utilities.callables import parameter_schema
from flows.running import RETRIES, _was_preempted, step_task
from bmfm_pipeline.errors import Preempted, TrainingError
from bmfm_pipeline.stages import STEPS
from prefect.states import Failed
from prefect.settings import get_current_settings
answer = {"light": light, "flows": {}, "retries": {}, "again": {}, "tags": {}}
for name in sys.argv[2:]:
    flow = getattr(importlib.import_module(f"flows.{name}"), name)
    schema = parameter_schema(flow).model_dump()
    answer["flows"][name] = {"name": flow.name, "description": flow.description, "schema": schema}
for stage, steps in STEPS.items():
    answer["retries"] |= {f"{stage}: {step}": step_task(stage, step).retries for step in steps}
    answer["tags"] |= {f"{stage}: {step}": sorted(step_task(stage, step).tags) for step in steps}
answer["heartbeat"] = [get_current_settings().flows.heartbeat_frequency]
with local._unwatched():
    answer["heartbeat"].append(get_current_settings().flows.heartbeat_frequency)
for error in (Preempted("stopped"), TrainingError("broken"), OSError("full")):
    answer["again"][type(error).__name__] = _was_preempted(None, None, Failed(data=error))

def away(**how):
    raise OSError("server away")

from flows import progress
said, relayed = [], []
progress.get_client = away
log = logging.getLogger("run")
log.addFilter(lambda record: said.append([record.levelname, record.getMessage()]))
log.setLevel(logging.INFO)
progress.get_run_logger = lambda: log
page = progress.ProgressPage("pretrain-train", relayed.append)
for event in (
    {"kind": "note", "message": "begun"},
    {"kind": "log", "level": "warning", "message": "look"},
    {"kind": "progress", "step": 3, "max_steps": 4, "loss": 0.5},
    {"kind": "error", "message": "what the state of the run says already"},
):
    page(event)
answer["away"] = {"said": said, "relayed": [event["kind"] for event in relayed]}
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp("home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-c", QUESTION, str(home / "state"), *FLOWS, "predict"]
    done = subprocess.run(
        command, env={**environment, "HOME": str(home)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FLOWS)
def test_the_page_of_a_flow_shows_its_form_under_a_name_of_its_own(seen, name):
    flow = seen["flows"][name]
    assert flow["name"] == name
    assert flow["description"]
    group = flow["schema"]["properties"]["parameters"]
    assert group["title"].lower() != "parameters"
    assert group["default"] == {}
    assert flow["schema"]["required"] == []
    form = flow["schema"]["definitions"][group["$ref"].rsplit("/", 1)[-1]]
    assert form["additionalProperties"] is False
    assert form["description"]
    assert form["properties"]["target"]["title"] == "Dataset"


def test_the_page_of_predict_asks_for_a_model_a_file_and_a_folder(seen):
    schema = seen["flows"]["predict"]["schema"]
    group = schema["properties"]["parameters"]
    form = schema["definitions"][group["$ref"].rsplit("/", 1)[-1]]
    assert group["title"] == "Prediction" and schema["required"] == ["parameters"]
    assert form["required"] == ["model", "input", "output"] and form["additionalProperties"] is False


def test_only_training_is_tried_again(seen):
    tried = {step for step, retries in seen["retries"].items() if retries}
    assert tried == {"pretrain: train", "finetune: train"}


def test_training_is_tried_again_after_a_stop_and_not_after_an_error(seen):
    assert seen["again"] == {"Preempted": True, "TrainingError": False, "OSError": False}


def test_a_server_that_is_away_does_not_end_the_work_whose_progress_it_should_show(seen):
    assert seen["away"]["relayed"] == ["note", "log", "progress", "error"]
    begun, look, warned, line = seen["away"]["said"][:4]
    assert begun == ["INFO", "begun"] and look == ["WARNING", "look"], "levels are kept"
    assert warned == ["WARNING", "Prefect's server does not take the progress (server away); the work goes on"]
    assert line == ["INFO", " 75 %  step 3 of 4, loss 0.500"]


def test_forms_and_deployments_are_imported_without_prefect(seen):
    assert seen["light"]


def test_no_task_asks_the_server_for_a_place_that_nobody_limits(seen):
    assert set(map(tuple, seen["tags"].values())) == {()}


def test_runs_send_heartbeats_except_on_a_server_that_ends_with_them(seen):
    watched, unwatched = seen["heartbeat"]
    assert watched > 0 and unwatched is None
