"""`bmfm deploy` on a real server: made, changed, kept, removed, and what its automations do when an event comes."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from bmfm_pipeline.config import catalogue
from bmfm_pipeline.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

GPUS = 8  # other tests of this server run several trainings at the same time
LAB = {
    "name": "lab",
    "title": "cells of our own",
    "source": {"builder": "zheng68k_mini"},
    "label_columns": [{"label_column_name": "celltype", "is_stratification_label": True}],
    "transforms": [],
    "deployed": True,
    "evaluate_schedule": {"cron": "0 4 * * *", "timezone": "Europe/Berlin", "active": True},
    "automations": {"finetune_on": ["regressed"], "notify_on": ["regressed", "failed"]},
}
FLOWS = ("preprocess", "pretrain", "finetune", "evaluate", "reevaluate", "interpret", "pipeline")


@pytest.fixture(scope="module", autouse=True)
def few_datasets(tmp_path_factory):
    """A packaged catalogue of two datasets: each is seven deployments, and every call compares all of them with the server's."""
    folder = tmp_path_factory.mktemp("datasets")
    for name in ("zheng68k-mini", "zheng68k"):
        shutil.copy(catalogue.FOLDER / f"{name}.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "FOLDER", folder)
        yield


@pytest.fixture(scope="module")
def client(server):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: f"{server.page}/api"}), get_client(sync_client=True) as found:
        yield found


@pytest.fixture(scope="module")
def deploy(client):
    """flows.deploying.deploy on the server; the deployments that `prefect deploy` has made there are taken over first."""
    from flows import deploying

    first = deploying.deploy(gpus=GPUS)
    assert all(
        "taken over" in row["what"] for row in first["rows"] if row["kind"] == "deployment" and row["change"] == "~"
    )
    return deploying.deploy


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Write the YAML of one more dataset, changed as said."""
    folder = tmp_path / "catalogue"
    folder.mkdir()
    monkeypatch.setenv("BMFM_DATASETS", str(folder))

    def write(**changed) -> Path:
        catalogue._read.cache_clear()
        (folder / "lab.yaml").write_text(yaml.safe_dump(LAB | changed))
        return folder / "lab.yaml"

    yield write
    catalogue._read.cache_clear()


@pytest.fixture
def hook(monkeypatch):
    """A web server on loopback that keeps what is posted to it, as (path, text)."""
    posted: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("BMFM_NOTIFY_URL", f"http://127.0.0.1:{listening.server_port}/planted-secret")
    yield posted
    listening.shutdown()
    listening.server_close()


def signs(found: dict, *kinds: str) -> dict[str, str]:
    return {row["name"]: row["change"] for row in found["rows"] if not kinds or row["kind"] in kinds}


def automation_of(client, name: str):
    (found,) = client.read_automations_by_name(name)
    return found


def regress(client, finetuning, hook, wait_for):
    """A re-evaluation that regressed, and not one that held, starts the fine-tuning and is told to the webhook."""
    from prefect.client.schemas.actions import WorkPoolUpdate
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.events import Event

    from flows.automations import dataset_resource, result_event

    selected = DeploymentFilter(id=DeploymentFilterId(any_=[finetuning.id]))
    client.update_work_pool("gpu", WorkPoolUpdate(is_paused=True))  # the run is not to begin
    try:
        of_lab = {"prefect.resource.id": dataset_resource("lab"), "prefect.resource.name": "lab"}
        for outcome, payload in (("held", {}), ("regressed", {"message": 'accuracy fell by "0.1"'})):
            # Sent by hand: the thread of emit_event would stay, and processes that later tests fork would not end well.
            event = Event(event=result_event(outcome), resource=of_lab, payload=payload)
            client._client.post("/events", json=[event.model_dump(mode="json")]).raise_for_status()
        (run,) = wait_for(lambda: client.read_flow_runs(deployment_filter=selected), 60, "the fine-tuning")
        assert run.created_by.type == "AUTOMATION"
        wait_for(lambda: hook, 60, "the notification")
        client.delete_flow_run(run.id)
    finally:
        client.update_work_pool("gpu", WorkPoolUpdate(is_paused=False))
    ((path, text),) = hook
    said = json.loads(text)
    assert path == "/planted-secret"
    assert said["text"] == 'bmfm: lab: accuracy fell by "0.1"'
    assert (said["event"], said["dataset"]) == ("bmfm.reevaluate.regressed", "lab")


def fail(server, client, hook, wait_for):
    """A run of a deployment that fails is told to the webhook, with the reason and where to look."""
    hook.clear()
    wrong = {"parameters": {"target": "lab", "overrides": ["data_module.max_lenght=1"]}}
    made = client.read_deployment_by_name("preprocess/lab")
    run = client.create_flow_run_from_deployment(made.id, parameters=wrong)
    wait_for(lambda: hook, 90, "the notification of a failed run")
    ended = client.read_flow_run(run.id)
    ((path, text),) = hook
    said = json.loads(text)
    assert path == "/planted-secret" and (said["event"], said["dataset"]) == ("prefect.flow-run.Failed", "lab")
    assert said["text"] == f"bmfm: {ended.name} ended Failed: {ended.state.message}"
    assert said["flow_run"].startswith(server.page) and str(run.id) in said["flow_run"]


def test_names_choose_what_is_looked_at(deploy):
    assert not deploy(["zheng68k", "file"], dry_run=True)["changed"]
    with pytest.raises(
        ConfigError, match=r"zheng68k_mini: nothing of this name is deployed.*did you mean 'zheng68k-mini'"
    ):
        deploy(["zheng68k_mini"], dry_run=True)


def test_the_doctor_sees_pools_workers_and_a_pause(client):
    from prefect.client.schemas.actions import WorkPoolUpdate

    from flows import checkup

    found = {name: (status, said, mend) for name, status, said, mend in checkup.check()}
    assert found["Prefect"][0] == found["Prefect server"][0] == found["pool cpu"][0] == "ok"
    assert found["pool cpu"][1].endswith("1 worker online") and "Prefect telemetry" not in found
    client.update_work_pool("cpu", WorkPoolUpdate(is_paused=True))
    try:
        paused = next(row for row in checkup.check() if row[0] == "pool cpu")
    finally:
        client.update_work_pool("cpu", WorkPoolUpdate(is_paused=False))
    assert paused[1] == "warn" and paused[3] == "prefect work-pool resume cpu"


def test_a_second_run_changes_nothing_and_says_so(deploy):
    found = deploy()
    assert not found["changed"] and {row["change"] for row in found["rows"]} <= {"="}


def test_a_dry_run_shows_what_is_missing_and_leaves_it_missing(deploy, lab, client):
    lab()
    for _ in range(2):
        shown = deploy(dry_run=True)
        assert shown["dry_run"] and shown["changed"] == sum(row["change"] != "=" for row in shown["rows"])
        new = {name for name, sign in signs(shown, "deployment").items() if sign == "+"}
        assert new == {f"{flow}/lab" for flow in FLOWS} | {name for name in new if name.startswith("reevaluate/")}
    assert "which must be set" in next(row["what"] for row in shown["rows"] if row["kind"] == "webhook")
    with pytest.raises(ConfigError, match="BMFM_NOTIFY_URL is not set"):
        deploy()
    assert not [entry for entry in client.read_deployments() if entry.name == "lab"]


def test_a_dataset_of_the_catalogue_gets_deployments_and_automations_that_work_and_loses_them_with_its_yaml(
    server, deploy, lab, hook, client, monkeypatch, wait_for
):
    lab()
    made = deploy()
    assert {f"{flow}/lab" for flow in FLOWS} <= set(signs(made, "deployment"))
    assert deploy()["changed"] == 0
    found = client.read_deployment_by_name("finetune/lab")
    assert (found.work_pool_name, found.parameters) == ("gpu", {"parameters": {"target": "lab"}})
    assert "bmfm-managed" in found.tags
    assert "planted-secret" not in json.dumps(made)
    regress(client, found, hook, wait_for)
    fail(server, client, hook, wait_for)

    flow = client.create_flow_from_name("finetune")
    by_hand = client.create_deployment(flow, "by-hand", entrypoint="flows/finetune.py:finetune")
    monkeypatch.delenv("BMFM_DATASETS")
    assert deploy(dry_run=True, keep=True)["changed"] == 0
    gone = deploy()
    assert {sign for name, sign in signs(gone).items() if "lab" in name} == {"-"}
    assert {row["kind"] for row in gone["rows"] if row["change"] == "-"} == {"deployment", "automation", "webhook"}
    assert [entry.name for entry in client.read_deployments() if entry.name == "lab"] == []
    assert client.read_deployment(by_hand).name == "by-hand"
    assert deploy()["changed"] == 0
    client.delete_deployment(by_hand)


def test_what_was_switched_on_the_pages_stays_and_what_else_was_edited_there_is_mended(
    deploy, lab, hook, client, monkeypatch
):
    from prefect.client.schemas.actions import DeploymentUpdate

    lab()
    scheduled = next(row["name"] for row in deploy()["rows"] if row["kind"] == "schedule" and row["change"] == "+")
    name = "bmfm: fine-tune lab again"
    before = client.read_deployment_by_name(scheduled)
    client.update_deployment_schedule(before.id, before.schedules[0].id, active=False)
    client.pause_automation(automation_of(client, name).id)
    client.update_deployment(before.id, DeploymentUpdate(description="edited"))

    lab(evaluate_schedule={**LAB["evaluate_schedule"], "cron": "30 5 * * *"})
    found = deploy()
    words = [(row["change"], row["kind"], row["what"]) for row in found["rows"] if row["name"] in (scheduled, name)]
    assert ("~", "deployment", "description") in words
    assert ("~", "schedule", "0 4 * * * Europe/Berlin -> 30 5 * * * Europe/Berlin") in words
    assert ("=", "schedule", "off, though the catalogue says on (--reset switches it)") in words
    assert ("=", "automation", "switched off by hand (--reset switches it on)") in words

    (schedule,) = client.read_deployment_by_name(scheduled).schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone, schedule.active) == (
        "30 5 * * *",
        "Europe/Berlin",
        False,
    )
    assert automation_of(client, name).enabled is False
    assert deploy()["changed"] == 0

    assert set(signs(deploy(reset=True), "schedule", "automation").values()) == {"~"}
    assert client.read_deployment_by_name(scheduled).schedules[0].active
    assert automation_of(client, name).enabled
    monkeypatch.delenv("BMFM_DATASETS")
    deploy()


def test_a_pool_has_a_limit_of_its_own_and_a_type_that_stays(deploy, client):
    try:
        (row,) = [row for row in deploy(gpus=GPUS + 1)["rows"] if row["change"] == "~"]
        assert (row["name"], row["what"]) == ("gpu", f"limit {GPUS} -> {GPUS + 1}")
        assert client.read_work_pool("gpu").concurrency_limit == GPUS + 1
        assert deploy()["changed"] == 0  # nobody asked for another one
    finally:
        deploy(gpus=GPUS)
    with pytest.raises(ConfigError, match="pool 'gpu' is of type process, and the type of a pool cannot be changed"):
        deploy(pool_types={"gpu": "docker"}, dry_run=True)
    with pytest.raises(ConfigError, match="no deployment uses such a pool; pools are cpu, gpu"):
        deploy(pool_types={"gqu": "docker"}, dry_run=True)


def test_a_pipeline_waits_in_the_pool_cpu_and_takes_no_second_place_of_its_own_pool(deploy, client):
    from prefect.context import FlowRunContext
    from prefect.exceptions import ObjectNotFound

    from flows.parameters import PipelineParameters
    from flows.pipeline import _pool_of, _runs_in_own_place, _uses_pools

    deployed = client.read_deployment_by_name("pipeline/zheng68k")
    pipeline = client.create_flow_run_from_deployment(deployed.id)
    try:
        assert pipeline.work_pool_name == "cpu"
        with FlowRunContext.model_construct(flow_run=client.read_flow_run(pipeline.id)):
            assert _runs_in_own_place("preprocess/zheng68k")
            assert not _runs_in_own_place("pretrain/zheng68k")
            assert _uses_pools(PipelineParameters(pools=True)) and not _uses_pools(PipelineParameters(pools=False))
        assert not _uses_pools(PipelineParameters()), "a run that no worker has started trains by itself"
        with pytest.raises(ObjectNotFound):
            _pool_of("pretrain/nobodys")
    finally:
        client.delete_flow_run(pipeline.id)
