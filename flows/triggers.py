"""Who or what started the run that this process carries out, in words for records."""

from typing import Any
from uuid import UUID


def triggered_by() -> str:
    """A schedule, an automation, a pipeline, or a person, with the name of what it was."""
    from prefect import get_client, runtime

    run = runtime.flow_run.id
    if run is None:
        return "person"
    with get_client(sync_client=True) as client:
        return in_words(client.read_flow_run(UUID(str(run))), runtime.flow_run.flow_name, runtime.deployment.name)


def in_words(run: Any, flow: str | None, deployment: str | None) -> str:
    """As `triggered_by`, of a flow run as the server knows it."""
    made_by = getattr(run, "created_by", None)
    kind, shown = getattr(made_by, "type", None) or "", getattr(made_by, "display_value", None) or ""
    name = f"{flow}/{deployment}" if deployment else str(flow)
    if run.auto_scheduled or kind == "SCHEDULE":
        return f"schedule of {name}"
    if kind == "AUTOMATION":
        return f"automation{f' ({shown})' if shown else ''}"
    if run.parent_task_run_id is not None:
        return f"another flow, as part of {name}"
    return f"person{f' ({shown})' if shown else ''}, by hand at {name}"
