"""`bmfm deploy`: a Prefect server is made to have what the catalogue asks for, and loses what it no longer does.

A second run finds nothing to do. Only what carries the mark of an earlier run is removed, and switches that a person turned on
the server's pages stay as they are.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from bmfm_pipeline.config import list_entries
from bmfm_pipeline.errors import ConfigError, PipelineError, did_you_mean
from flows import automations as catalogue_automations
from flows import deployments as catalogue_deployments
from flows.automations import MANAGED
from flows.differences import (
    KEPT,
    REMOVED,
    Change,
    WantedPool,
    deployment,
    deployment_name,
    pages,
    pool,
)
from flows.reactions import automation, webhook, webhook_documents

START = (
    "start one in another terminal with `bmfm ui` (or `prefect server start`), then\n"
    "  export PREFECT_API_URL=http://127.0.0.1:4200/api"
)
# Runs that only read and transform data have no limit of their own; their workers' --limit is what holds them.
WHY_POOLS = {
    "cpu": "bmfm: checking, splitting and transforming data",
    "gpu": "bmfm: whatever trains or uses a model, one run a GPU",
}


def deploy(
    names: Sequence[str] = (), *, dry_run: bool = False, gpus: int | None = None, pool_types: dict[str, str] | None = None,
    reset: bool = False, keep: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare the server with the catalogue and, unless `dry_run`, carry out the difference.

    `gpus` is how many runs the pool `gpu` starts at once (default: as it is, at first 1), `pool_types` the
    type of pools that are not there yet, {name: process | docker | kubernetes}. `reset` also overwrites what people switch on the
    pages; `keep` leaves what is gone from the catalogue. With `names` of datasets or suites only what is of these is looked at, and
    nothing is removed. Returns {server, dry_run, changed, rows: [{change, kind, name, what}]}.
    """
    address = PREFECT_API_URL.value()
    if not address:
        raise ConfigError(f"deployments live on a Prefect server, and none is named; {START}")
    reach_loopback_directly(address)
    try:
        with get_client(sync_client=True) as client:
            changes = list(_changes(client, names, gpus, pool_types or {}, reset, keep or bool(names), dry_run))
            todo = [change for change in changes if change.sign != KEPT]
            for change in todo if not dry_run else ():
                if change.act is not None:
                    change.act(client)
    except PrefectHTTPStatusError as error:
        raise PipelineError(refused(address, error)) from error
    except (httpx.TransportError, OSError) as error:
        raise PipelineError(
            f"no Prefect server answers at {address} ({error or type(error).__name__}); {START}"
        ) from error
    return {"server": address, "dry_run": dry_run, "changed": len(todo), "rows": [change.row() for change in changes]}


def reach_loopback_directly(address: str) -> None:
    """A proxy has no way to this machine's loopback."""
    host = urlsplit(address).hostname
    named = [word for word in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",") if word]
    if host in ("127.0.0.1", "localhost", "::1") and host not in named:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join([*named, host])


def refused(address: str, error: PrefectHTTPStatusError) -> str:
    """What a server's refusal means, and what to set."""
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"the Prefect server at {address} refuses access ({status}); set PREFECT_API_KEY or PREFECT_API_AUTH_STRING"
        )
    try:
        said = error.response.json()
        said = said.get("detail") or said.get("exception_detail") or said
        if isinstance(said, list):  # of a form that does not fit; what was sent stands beside each and may be secret
            said = "; ".join(f"{'.'.join(map(str, one.get('loc', ())))}: {one.get('msg')}" for one in said)
    except ValueError:
        said = error.response.text
    if status == 404:
        said = "no such address; PREFECT_API_URL ends in /api"
    return (
        f"the Prefect server at {address} answered {status} to {error.request.method} {error.request.url.path}: {said}"
    )


def _changes(
    client: SyncPrefectClient, chosen: Sequence[str], gpus: int | None, pool_types: dict[str, str], reset: bool, keep: bool,
    dry_run: bool,
) -> Iterator[Change]:  # fmt: skip
    """In the order in which they are carried out: what is needed by others first, removals from the other end."""
    entries, specs = list_entries(), catalogue_deployments.deployments()
    if chosen:
        known = list(dict.fromkeys(spec["name"] for spec in specs))
        if stranger := next((name for name in chosen if name not in known), None):
            hint = did_you_mean(stranger, known, before="; ")
            raise ConfigError(f"{stranger}: nothing of this name is deployed; there are {', '.join(known)}{hint}")
        entries = [entry for entry in entries if entry.name in chosen]
        specs = [spec for spec in specs if spec["name"] in chosen]
    by_name = {deployment_name(spec): spec for spec in specs}
    yield from _pools(client, specs, gpus, pool_types, reset)

    flows = {flow.id: flow.name for flow in pages(client.read_flows)}
    found = {f"{flows.get(entry.flow_id)}/{entry.name}": entry for entry in pages(client.read_deployments)}
    for name, spec in by_name.items():
        yield from deployment(spec, found.get(name), reset)

    webhooks = catalogue_automations.webhooks(entries)
    for block, variable in webhooks.items():
        yield from webhook(client, block, variable, dry_run)
    blocks = {document.name: document for document in webhook_documents(client)}
    wanted = catalogue_automations.automations(entries, list(by_name))
    ours = [entry for entry in pages(client.read_automations) if MANAGED in entry.tags]
    for wish in wanted:
        has = next((entry for entry in ours if entry.name == wish.name), None)
        yield from automation(wish, has, found, blocks, reset)

    if keep:
        return
    names = {wish.name for wish in wanted}
    for entry in ours:
        if entry.name not in names:
            yield _removal("automation", entry.name, lambda to, gone=entry.id: to.delete_automation(gone))
    for name, document in blocks.items():
        if name.startswith(catalogue_automations.BLOCK_PREFIX) and name not in webhooks:
            yield _removal("webhook", name, lambda to, gone=document.id: to.delete_block_document(gone))
    for name, entry in found.items():
        if MANAGED in entry.tags and name not in by_name:
            yield _removal("deployment", name, lambda to, gone=entry.id: to.delete_deployment(gone))


def _removal(kind: str, name: str, act: Any) -> Change:
    return Change(REMOVED, kind, name, "no longer in the catalogue", act)


def _pools(
    client: SyncPrefectClient, specs: list[dict[str, Any]], gpus: int | None, types: dict[str, str], reset: bool
) -> Iterator[Change]:
    names = sorted({spec["work_pool"]["name"] for spec in specs} | {catalogue_deployments.DEFAULT_POOL})
    if strangers := set(types) - set(names):
        raise ConfigError(f"--pool {strangers.pop()}: no deployment uses such a pool; pools are {', '.join(names)}")
    for name in names:
        models = name == catalogue_deployments.DEFAULT_POOL
        yield from pool(
            client,
            WantedPool(
                name,
                type=types.get(name),
                limit=gpus if models else None,
                limit_at_first=1 if models else None,
                why=WHY_POOLS.get(name, "bmfm"),
                template=lambda kind, of=name: _template(of, kind),
            ),
            reset,
        )


def _template(name: str, kind: str) -> tuple[dict[str, Any], str]:
    """The job template of a pool, and the file it comes from; Prefect's own and no file where there is none of ours."""
    file = catalogue_deployments.PATH.parent / "pools" / f"{kind}-{name}.json"
    if file.exists():
        return json.loads(file.read_text()), str(file.relative_to(catalogue_deployments.PATH.parents[1]))
    import asyncio

    from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

    template = asyncio.run(get_default_base_job_template_for_infrastructure_type(kind))
    if template is None:
        raise ConfigError(
            f"--pool {name}={kind}: this Prefect knows no such type; known are process, docker and kubernetes "
            "(the latter two with their extras: pip install 'bmfm_pipeline[docker]')"
        )
    return template, ""
