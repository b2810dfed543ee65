"""Which artefacts the deployments of a Prefect server name in their parameters."""

import os
import sys
from typing import Any

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.tracking import Reference
from flows import local

_PAGE = 200


def references_of_deployments(state_dir: str | os.PathLike) -> list[Reference] | None:
    """One for each deployment that has parameters, with every text in them; None where no server is named.

    Raises StorageError when the server that is named cannot be asked.
    """
    if not local.user_has_a_server():
        return None
    if "prefect" not in sys.modules:
        local.prepare(state_dir)
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, temporary_settings

    # Settings were read when Prefect was imported; what the environment names now goes before them.
    address = os.environ.get("PREFECT_API_URL") or PREFECT_API_URL.value()
    if not address:
        return None
    found: list[Reference] = []
    try:
        with temporary_settings({PREFECT_API_URL: address}), get_client(sync_client=True) as client:
            flows = _all(client.read_flows)
            names = {flow.id: flow.name for flow in flows}
            for deployment in _all(client.read_deployments):
                schedules = [schedule.parameters for schedule in deployment.schedules]
                texts = tuple(_texts([deployment.parameters, schedules]))
                found.append(Reference(f"deployment {names.get(deployment.flow_id, '?')}/{deployment.name}", texts))
    except (PrefectHTTPStatusError, httpx.TransportError, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(
            f"the Prefect server at {address} cannot be asked what its deployments use ({said})"
        ) from error
    return found


def _all(read: Any) -> list[Any]:
    """Every page of what `read(limit=, offset=)` gives."""
    found: list[Any] = []
    while True:
        page = read(limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            return found


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for entry in value for text in _texts(entry)] if isinstance(value, list | tuple) else []
