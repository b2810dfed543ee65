"""A table on the page of a run that is filled in while the run goes on."""

import json
from typing import Any
from uuid import UUID

from prefect import get_client, runtime
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.logging import get_run_logger


class LiveTable:
    """One table artifact under `key`, replaced by each `show`."""

    def __init__(self, key: str, description: str):
        self._key, self._description = key, description
        self._artifact: UUID | None = None

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Put `rows` into the table; a server that is away for a while is waited for by the next one."""
        data = json.dumps(rows)
        try:
            with get_client(sync_client=True) as client:
                if self._artifact is None:
                    made = ArtifactCreate(
                        key=self._key,
                        type="table",
                        data=data,
                        description=self._description,
                        flow_run_id=runtime.flow_run.id,
                    )
                    self._artifact = client.create_artifact(made).id
                else:
                    client.update_artifact(self._artifact, ArtifactUpdate(data=data))
        except Exception as error:
            get_run_logger().warning("Prefect's server does not take the table (%s); the work goes on", error)
