"""A champion that is tested again by a schedule on a real server: the run's end, its event, and the fine-tuning that an automation starts."""

import datetime
import shutil
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# When the first run is due, and when the next one would be on a machine that was too busy to make it in time.
SOON, AGAIN = datetime.timedelta(seconds=6), datetime.timedelta(minutes=1)


@pytest.fixture(scope="module")
def client(server):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: f"{server.page}/api"}), get_client(sync_client=True) as found:
        yield found


@pytest.fixture
def cells(server, mini_h5ad, tmp_path, tiny_model) -> Path:
    """A file whose champion was tested, and to which cells with fewer counts were appended since."""
    from bmfm_pipeline.stages import plan_stage, run_stage
    from bmfm_pipeline.stages.reevaluate import plan_promotion
    from bmfm_pipeline.stages.reevaluate_decision import conclude

    file = tmp_path / "cells.h5ad"
    shutil.copy(mini_h5ad, file)
    named = {"label": "celltype", "workspace": str(server.machine.workspace)}
    for job in plan_stage("finetune", str(file), overrides=[*tiny_model, "task.max_steps=4"], **named):
        run_stage(job)
    plan = plan_promotion(str(file), overrides=["evaluation.controls=[majority]"], triggered_by="a test", **named)
    for job in plan.jobs:
        run_stage(job)
    assert conclude(plan, {"triggered_by": "a test"})["promotion"]["decision"] == "first"
    append_shallow(file, 60)
    return file


def append_shallow(file: Path, count: int) -> None:
    import anndata
    from scipy import sparse

    old = anndata.read_h5ad(file)
    generator = np.random.default_rng(0)
    rows = generator.choice(old.n_obs, count, replace=False)
    counts = old.X[rows].toarray() if sparse.issparse(old.X) else np.asarray(old.X)[rows]
    thinned = sparse.csr_matrix(generator.binomial(counts.astype(int), 0.3).astype("float32"))
    new = anndata.AnnData(thinned, var=old.var[[]])
    new.obs_names = [f"new{number}" for number in range(count)]
    new.obs["celltype"] = old.obs["celltype"].astype(str).to_numpy()[rows]
    whole = anndata.AnnData(sparse.csr_matrix(old.X), var=old.var[[]])
    whole.obs_names, whole.obs["celltype"] = old.obs_names, old.obs["celltype"].astype(str)
    both = anndata.concat([whole, new])
    file.unlink()
    both.write_h5ad(file)


def test_a_schedule_finds_that_the_data_drifted_and_the_event_starts_a_fine_tuning(server, client, cells, wait_for):
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.schedules import IntervalSchedule

    from bmfm_pipeline.tracking import Registry, tracking_uri
    from flows.automations import RUN, WantedAutomation, dataset_resource, result_event
    from flows.reactions import _core

    deployed = client.read_deployment_by_name("reevaluate/zheng68k-mini")
    # Without a pool its runs are made, and never begun.
    finetuning = client.create_deployment(client.read_flow_by_name("finetune").id, "cells")
    wish = WantedAutomation(
        name="bmfm: fine-tune cells again",
        description="As of a dataset of the catalogue.",
        events=(result_event("drifted"), result_event("regressed")),
        action=RUN,
        resource=dataset_resource("cells"),
        deployment="finetune/cells",
    )
    automation = client.create_automation(_core(client, wish))
    anchor = datetime.datetime.now(datetime.UTC) + SOON
    schedule = IntervalSchedule(interval=AGAIN, anchor_date=anchor, timezone="UTC")
    form = {
        "target": str(cells), "label": "celltype",
        "overrides": ["evaluation.controls=[majority]", "promotion.resamples=400"],
    }  # fmt: skip
    again = client.create_deployment(
        deployed.flow_id, "cells", schedules=[{"schedule": schedule, "active": True}], parameters={"parameters": form},
        work_pool_name=deployed.work_pool_name, entrypoint=deployed.entrypoint, pull_steps=deployed.pull_steps,
    )  # fmt: skip
    try:

        def runs(deployment) -> list:
            wanted = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
            return client.read_flow_runs(deployment_filter=wanted)

        def begun():
            return [run for run in runs(again) if run.state_type not in (None, "SCHEDULED")]

        run, *_ = wait_for(begun, 240, "the schedule to start a run", every=0.5)
        client.pause_deployment(again)
        ended = server.wait_until_final(str(run.id), 240)
        assert (ended["state_type"], ended["state_name"]) == ("COMPLETED", "Drifted"), ended["state"]["message"]
        assert "library size -" in ended["state"]["message"]
        assert run.auto_scheduled and {"dataset:cells", "stage:reevaluate"} <= set(ended["tags"])
        tables = {artifact["key"] for artifact in server.artifacts(str(run.id))}
        assert {"reevaluate-scores", "reevaluate-data"} <= tables

        started, *_ = wait_for(lambda: runs(finetuning), 60, "the fine-tuning that the automation starts", every=0.5)
        assert started.created_by.type == "AUTOMATION"
        champion = Registry(tracking_uri(server.machine.state)).at("bmfm-cells", "champion")
        assert champion.tags["bmfm.reevaluation.outcome"] == "drifted"
        assert champion.tags["bmfm.reevaluation.triggered_by"] == "schedule of reevaluate/cells"
        assert champion.tags["bmfm.promotion.triggered_by"] == "a test"
    finally:
        client.delete_deployment(again)
        client.delete_deployment(finetuning)
        client.delete_automation(automation)
