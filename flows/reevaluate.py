"""The reevaluate flow: the champion on the data as they are now, a challenger beside it, an end that says how it went, an event of it."""

from typing import Annotated, Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from bmfm_pipeline.errors import ConfigError, PipelineError
from bmfm_pipeline.stages.reevaluate import NO_CHAMPION, Reevaluation, plan_reevaluation
from flows.automations import dataset_resource, result_event
from flows.pages import label_run, show_links, show_table
from flows.parameters import ReevaluateParameters, shown_as
from flows.running import readable_name, relayed_logs, run_context, run_job, with_target
from flows.triggers import triggered_by


@flow(name="reevaluate", flow_run_name=readable_name)
def reevaluate(
    parameters: Annotated[ReevaluateParameters, shown_as("Re-evaluation")] = ReevaluateParameters(),  # noqa: B008 - defaults of the form
) -> Any:
    """Test the champion of a dataset on the data as they are now; promote a challenger on evidence alone."""
    with relayed_logs():
        try:
            parameters = with_target(parameters)
            if not parameters.target:
                raise ConfigError(
                    "reevaluate: name a dataset (see `bmfm datasets`), or the file that the model is about"
                )
            plan = plan_reevaluation(
                parameters.target,
                label=parameters.label,
                data=parameters.data,
                overrides=parameters.to_overrides(),
                workspace=parameters.workspace,
            )
            label_run("stage:reevaluate", f"dataset:{plan.dataset}", name=f"reevaluate-{plan.dataset}")
            results = {job.key: run_job(job) for job in plan.jobs}
            found = _decide_task(plan)()
        except PipelineError as error:
            return Failed(message=str(error), data=error)
    _show(found, [result for result in results.values()])
    _tell(found)
    return Completed(name=found["state"], message=found["message"], data=found)


def _decide_task(plan: Reevaluation) -> Any:
    """Compare, decide and record, as one task that the page shows."""

    def decide() -> Any:
        from bmfm_pipeline.stages.reevaluate_decision import conclude

        found = conclude(plan, {**run_context({}), "triggered_by": triggered_by()})
        get_run_logger().info("%s: %s", found["state"], found["message"])
        for note in found["notes"]:
            get_run_logger().info("%s", note)
        return found

    return task(
        decide, name="decide", task_run_name="reevaluate: decide", tags=["reevaluate"], cache_policy=NO_CACHE,
        persist_result=False,
    )  # fmt: skip


def _show(found: dict[str, Any], results: list[dict[str, Any]]) -> None:
    from bmfm_pipeline.stages.reevaluate_decision import drift_rows, score_rows

    show_table("reevaluate-scores", score_rows(found), f"{found['dataset']}: {found['state']}")
    show_table("reevaluate-data", drift_rows(found), f"{found['dataset']}: how far the data are from those of before")
    reports = [result["links"]["Report"] for result in results if result.get("links", {}).get("Report")]
    show_links("reevaluate", {"MLflow run": found["mlflow_url"], "Report": reports[0] if reports else ""})


def _tell(found: dict[str, Any]) -> None:
    """The event that automations wait for; none where there is no champion that could have done anything."""
    if found["outcome"] == NO_CHAMPION:
        return
    name = found["dataset"]
    decision = found["promotion"] or {}
    emit_event(
        event=result_event(found["outcome"]),
        resource={"prefect.resource.id": dataset_resource(name), "prefect.resource.name": name},
        payload={
            "message": found["message"],
            "state": found["state"],
            "promoted": bool(decision.get("promoted")),
            "model": found["model"],
            "mlflow_run_id": found["mlflow_run_id"],
            "triggered_by": found["triggered_by"],
            "flow_run_id": str(runtime.flow_run.id),
        },
    )
