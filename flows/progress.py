"""What the page of a run shows while a step works: a bar, the course of a training, and lines of log."""

import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client, runtime
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, ArtifactFilterTaskRunId
from prefect.logging import get_run_logger

from flows.course import Course

UPDATE_SECONDS = 5.0
# Lines of log: the first after a quarter of a minute, and the rarer the longer it takes (a twentieth of the time so far).
LOG_SECONDS, LOG_SHARE = 15.0, 0.05


class ProgressPage:
    """Relays the events of a step: a progress artifact, for a training also a page with its curve, and lines in the run's log.

    Both artifacts are updated in place every few seconds, also by a retry of their task. An event is a plain dictionary: `message` is
    logged at its `level`; `fraction`, or `step` with `max_steps` or `total`, moves the bar. `before` is the history of a training that
    may go on from there; `links` a function that gives addresses by name once they are known.
    """

    def __init__(self, key: str, listener=None, *, title: str = "", before: Path | None = None, links=dict):
        self._key, self._title, self._links = key, title or key, links
        self._listener = listener
        self._course = Course(before)
        self._artifacts: dict[str, UUID] = {}
        self._began = time.monotonic()
        self._updated = self._logged = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if self._listener is not None:
            self._listener(event)
        if event.get("kind") != "error" and (message := event.get("message") or event.get("text")):
            get_run_logger().log(level_of(event), "%s", message)
        self._course.add(event)
        share = self._course.share
        now = time.monotonic()
        last = share == 1.0 or self._course.ended
        if share is None or (now - self._updated < UPDATE_SECONDS and not last):
            return
        self._updated = now
        try:
            self._show(round(100 * share, 1))
        except Exception as error:  # a server that is away for a while must not end a training of days
            get_run_logger().warning("Prefect's server does not take the progress (%s); the work goes on", error)
        if last or now - self._logged > max(LOG_SECONDS, LOG_SHARE * (now - self._began)):
            self._logged = now
            get_run_logger().info("%3.0f %%  %s", 100 * share, self._course.line(spark=False))

    def _show(self, percent: float) -> None:
        self._write(f"{self._key}-progress", "progress", percent, self._course.line())
        if self._course.is_training:
            when = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            page = self._course.page(self._title, self._links(), f"Updated {when}, every few seconds while it trains.")
            self._write(f"{self._key}-course", "markdown", page, f"{self._title}: {self._course.line()}")

    def _write(self, key: str, kind: str, data: Any, description: str) -> None:
        with get_client(sync_client=True) as client:
            known = self._artifacts.get(key) or _of_this_task(client, key)
            if known is None:
                made = ArtifactCreate(
                    key=key, type=kind, data=data, description=description,
                    flow_run_id=runtime.flow_run.id, task_run_id=runtime.task_run.id,
                )  # fmt: skip
                known = client.create_artifact(made).id
            else:
                client.update_artifact(known, ArtifactUpdate(data=data, description=description))
            self._artifacts[key] = known


def _of_this_task(client: Any, key: str) -> UUID | None:
    """The artifact that an earlier try of this task has made."""
    if runtime.task_run.id is None:
        return None
    mine = ArtifactFilterTaskRunId(any_=[runtime.task_run.id])
    found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]), task_run_id=mine))
    return found[0].id if found else None


def level_of(event: dict[str, Any]) -> int:
    """The level of an event's message, as the logging module counts; INFO where it has none."""
    found = logging.getLevelNamesMapping().get(str(event.get("level", "info")).upper(), logging.INFO)
    return found or logging.INFO
