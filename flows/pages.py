"""What the page of a run shows: progress, tables and links, and a name a person can read."""

import re
import time
from typing import Any
from uuid import UUID

from prefect import get_client, runtime
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.logging import get_run_logger

UPDATE_SECONDS = 5.0


def artifact_key(*parts: str) -> str:
    """Artifact keys take lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def label_run(*tags: str, name: str | None = None) -> None:
    """Add tags to the current flow run, and rename it, once it is known what it makes."""
    if runtime.flow_run.id is None:
        return
    run = UUID(str(runtime.flow_run.id))
    with get_client(sync_client=True) as client:
        known = client.read_flow_run(run).tags  # what this process knows of its run dates from its start
        client.update_flow_run(run, name=name, tags=sorted({*known, *tags}))


def show_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    if rows:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = [{name: _cell(row.get(name)) for name in columns} for row in rows]
        create_table_artifact(table=table, key=key, description=description)


def show_links(key: str, links: dict[str, str]) -> None:
    """One link artifact each, such as the MLflow run and the report."""
    for text, address in links.items():
        if address:
            create_link_artifact(
                link=_address(address), link_text=text, key=artifact_key(key, text), description=address
            )


def _address(place: str) -> str:
    return f"file://{place}" if place.startswith("/") else place


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return "" if value is None else value if isinstance(value, int | str) else str(value)


class ProgressPage:
    """Relays the events of a step: a progress artifact, updated every few seconds, and lines in the run's log.

    An event is a plain dictionary; `fraction`, or `step` with `max_steps` or `total`, moves the bar, `message` is logged.
    """

    def __init__(self, key: str, listener=None):
        self._key = key
        self._listener = listener
        self._artifact: UUID | None = None
        self._updated = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if self._listener is not None:
            self._listener(event)
        if message := event.get("message") or event.get("text"):
            level = str(event.get("level", "info")).lower()
            log = get_run_logger()
            (log.warning if level.startswith("warn") else log.error if level == "error" else log.info)("%s", message)
        done = _fraction(event)
        if done is None:
            return
        if time.monotonic() - self._updated < UPDATE_SECONDS and done < 1.0:
            return
        percent, text = min(100.0, max(0.0, 100 * done)), _describe(event)
        try:
            self._show(percent, text)
        except Exception as error:  # a server that is away for a while must not end a training of days
            get_run_logger().warning("Prefect's server does not take the progress (%s); the work goes on", error)
        self._updated = time.monotonic()
        get_run_logger().info("%3.0f %%  %s", percent, text)

    def _show(self, percent: float, text: str) -> None:
        if self._artifact is None:
            self._artifact = create_progress_artifact(progress=percent, key=self._key, description=text)
        else:
            update_progress_artifact(self._artifact, progress=percent, description=text)


def _fraction(event: dict[str, Any]) -> float | None:
    if event.get("fraction") is not None:
        return float(event["fraction"])
    total = event.get("max_steps") or event.get("total_steps") or event.get("total")
    done = event.get("step", event.get("done"))
    if not total or not isinstance(done, int | float) or not isinstance(total, int | float) or total <= 0:
        return None
    return done / total


def _describe(event: dict[str, Any]) -> str:
    shown = (
        "epoch",
        "step",
        "max_steps",
        "total",
        "loss",
        "val_loss",
        "train/loss",
        "validation/loss",
        "cells_per_s",
        "eta_s",
    )
    return ", ".join(f"{name} {_cell(event[name])}" for name in shown if event.get(name) is not None) or "working"
