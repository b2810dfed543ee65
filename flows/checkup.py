"""What `bmfm doctor` asks a Prefect server: whether it answers, fits this Prefect, sends nothing out, and has pools with workers."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import prefect
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from bmfm_pipeline.storage import strip_userinfo
from flows import deployments
from flows.deploying import START, reach_loopback_directly, refused

# name, status ("ok", "warn", "fail"), what was found, how to mend it
Row = tuple[str, str, str, str]
ONLINE = "ONLINE"
LATE = "Late"


def check() -> Iterator[Row]:
    """Everything about the server that the environment or the profile names."""
    address = PREFECT_API_URL.value()
    if not address:
        yield "Prefect", "ok", "a profile is there, and names no server: each run starts its own", ""
        return
    shown = strip_userinfo(address)
    reach_loopback_directly(address)
    began = time.monotonic()
    try:
        with get_client(sync_client=True, httpx_settings={"timeout": 10}) as client:
            theirs = client.api_version()
            yield "Prefect", "ok", f"{shown}: answers in {time.monotonic() - began:.1f} s", ""
            yield _version(theirs)
            yield from _telemetry(client)
            yield from _pools(client)
            yield from _late(client)
    except PrefectHTTPStatusError as error:
        yield "Prefect", "fail", refused(shown, error), "correct PREFECT_API_URL, or the key or password"
    except (httpx.TransportError, OSError) as error:
        yield "Prefect", "fail", f"no server answers at {shown} ({error or type(error).__name__})", START


def _version(theirs: str) -> Row:
    ours = prefect.__version__
    if theirs == ours:
        return "Prefect server", "ok", theirs, ""
    near = theirs.split(".")[:2] == ours.split(".")[:2]
    mend = f"run the same version on both: pip install 'prefect=={ours}' where the server runs"
    return "Prefect server", "warn" if near else "fail", f"{theirs}, where {ours} is installed here", mend


def _telemetry(client: Any) -> Iterator[Row]:
    answer = client.request("GET", "/admin/settings").json()
    if answer.get("server", {}).get("analytics_enabled"):
        mend = "start the server with PREFECT_SERVER_ANALYTICS_ENABLED=false, or by `bmfm ui`"
        yield "Prefect telemetry", "warn", "the server sends statistics of its use to Prefect", mend


def _pools(client: Any) -> Iterator[Row]:
    """Pools that deployments of the catalogue go to, and who works there."""
    names = sorted({spec["work_pool"]["name"] for spec in deployments.deployments()})
    found = {pool.name: pool for pool in client.read_work_pools()}
    if not any(name in found for name in names):
        yield "pools", "warn", f"the server has none of {', '.join(names)}", "bmfm deploy"
        return
    for name in names:
        pool = found.get(name)
        if pool is None:
            yield f"pool {name}", "fail", "the server does not have it", "bmfm deploy"
            continue
        answer = client.request("POST", "/work_pools/{name}/workers/filter", path_params={"name": name}, json={})
        online = [worker["name"] for worker in answer.json() if worker["status"] == ONLINE]
        limit = "no limit" if pool.concurrency_limit is None else f"{pool.concurrency_limit} at once"
        said = f"type {pool.type}, {limit}, {len(online)} worker{'' if len(online) == 1 else 's'} online"
        if pool.is_paused:
            yield f"pool {name}", "warn", f"{said}; it is paused", f"prefect work-pool resume {name}"
        elif pool.concurrency_limit == 0:
            yield (
                f"pool {name}",
                "warn",
                f"{said}; nothing can start",
                f"prefect work-pool update {name} --concurrency-limit 1",
            )
        elif not online and not pool.is_push_pool and not pool.is_managed_pool:
            yield f"pool {name}", "warn", f"{said}: its runs wait", f"prefect worker start --pool {name}"
        else:
            yield f"pool {name}", "ok", said, ""


def _late(client: Any) -> Iterator[Row]:
    asked = {"flow_runs": {"state": {"name": {"any_": [LATE]}}}}
    count = client.request("POST", "/flow_runs/count", json=asked).json()
    if count:
        yield (
            "late runs",
            "warn",
            f"{count} runs are late: nobody has taken them",
            "start workers, or delete the runs on the server's page",
        )
