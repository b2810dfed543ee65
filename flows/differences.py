"""What a Prefect server has, against what the catalogue asks for: pools, limits, deployments, schedules, webhooks, automations.

Each function reads the server and yields changes; nothing is written before a change is carried out.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

from bmfm_pipeline import __version__
from bmfm_pipeline.errors import ConfigError
from flows.automations import MANAGED
from flows.deployments import PULL_STEPS

SCHEDULE = "bmfm-managed"  # slug of its schedules
PAGE_SIZE = 200
MADE, CHANGED, REMOVED, KEPT = "+", "~", "-", "="


@dataclass
class Change:
    """One line of the table: `sign` is MADE, CHANGED, REMOVED, or KEPT for what differs and is left to whoever set it."""

    sign: str
    kind: str
    name: str
    what: str
    act: Callable[[SyncPrefectClient], Any] | None = None

    def row(self) -> dict[str, str]:
        return {"change": self.sign, "kind": self.kind, "name": self.name, "what": self.what}


def pages(read: Callable[..., list[Any]], **filters: Any) -> list[Any]:
    """Everything that a reading method of the client has, page by page."""
    found: list[Any] = []
    while len(page := read(**filters, limit=PAGE_SIZE, offset=len(found))) == PAGE_SIZE:
        found += page
    return found + page


@dataclass(frozen=True)
class WantedPool:
    """A work pool: how many runs it lets run at once, and its job template with the file that this comes from."""

    name: str
    type: str | None  # None: what it is, and a process pool where it is not there yet
    limit: int | None  # None: as it is
    limit_at_first: int | None  # of a pool that has none yet; None: no limit
    why: str
    template: Callable[[str], tuple[dict[str, Any], str]]


def pool(client: SyncPrefectClient, wanted: WantedPool, reset: bool) -> Iterator[Change]:
    """A pool that is there keeps its job template, its pause and any limit that it has, unless another one is asked for."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

    name = wanted.name
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        kind = wanted.type or "process"
        template, source = wanted.template(kind)
        limit = wanted.limit or wanted.limit_at_first
        wish = WorkPoolCreate(
            name=name, type=kind, description=wanted.why, base_job_template=template, concurrency_limit=limit
        )
        words = [
            f"type {kind}",
            f"limit {limit}" if limit else "",
            f"jobs as in {source}" if source else "",
        ]
        yield Change(MADE, "pool", name, ", ".join(filter(None, words)), lambda to: to.create_work_pool(wish))
        return
    if wanted.type not in (None, found.type):
        raise ConfigError(
            f"pool '{name}' is of type {found.type}, and the type of a pool cannot be changed; "
            f"remove it first (prefect work-pool delete {name}) or leave out --pool {name}={wanted.type}"
        )
    limit = wanted.limit or found.concurrency_limit or wanted.limit_at_first
    if found.concurrency_limit != limit:
        update = WorkPoolUpdate(concurrency_limit=limit)
        what = f"limit {found.concurrency_limit} -> {limit}"
        yield Change(CHANGED, "pool", name, what, lambda to: to.update_work_pool(name, update))
    template, source = wanted.template(found.type)
    if source and found.base_job_template != template:
        if reset:
            renewed = WorkPoolUpdate(base_job_template=template)
            yield Change(CHANGED, "pool", name, f"jobs as in {source}", lambda to: to.update_work_pool(name, renewed))
        else:
            yield Change(KEPT, "pool", name, f"its job template is not that of {source} (--reset replaces it)")
    if found.is_paused:
        yield Change(KEPT, "pool", name, "paused by hand: its runs wait")


def deployment_fields(spec: dict[str, Any]) -> dict[str, Any]:
    """What an entry of flows.deployments says, in the server's own terms."""
    from prefect.utilities.callables import parameter_schema

    file, _, function = spec["entrypoint"].partition(":")
    flow = getattr(import_module(file.removesuffix(".py").replace("/", ".")), function)
    fields = {
        "description": spec["description"],
        "tags": [*spec["tags"], MANAGED],
        "entrypoint": spec["entrypoint"],
        "pull_steps": PULL_STEPS,
        "parameters": spec.get("parameters", {}),
        "parameter_openapi_schema": parameter_schema(flow).model_dump_for_openapi(),
        "enforce_parameter_schema": spec["enforce_parameter_schema"],
        "work_pool_name": spec["work_pool"]["name"],
        "concurrency_limit": spec.get("concurrency_limit"),
        "version": __version__,
    }
    return json.loads(json.dumps(fields))


WORDS = {"parameter_openapi_schema": "form", "work_pool_name": "pool", "concurrency_limit": "runs at a time"}
SHOWN = ("work_pool_name", "concurrency_limit", "entrypoint", "version", "enforce_parameter_schema", "parameters")


def deployment(spec: dict[str, Any], found: Any | None, reset: bool) -> Iterator[Change]:
    """The deployment of one entry, then its schedules. `found` is what the server has under this name."""
    from prefect.client.schemas.actions import DeploymentUpdate

    name = deployment_name(spec)
    fields = deployment_fields(spec)
    if found is None:
        schedules = [_schedule(wanted) for wanted in spec.get("schedules", [])]
        flow_name = name.partition("/")[0]

        def create(to: SyncPrefectClient) -> None:
            flow_id = to.create_flow_from_name(flow_name)
            to.create_deployment(flow_id, spec["name"], schedules=schedules, **fields)

        yield Change(MADE, "deployment", name, f"pool {fields['work_pool_name']}", create)
        for wanted in spec.get("schedules", []):
            yield Change(MADE, "schedule", name, f"{_when(wanted)}, {_on_off(wanted['active'])}")
        return
    has = found.model_dump(mode="json")
    has["concurrency_limit"] = (has["global_concurrency_limit"] or {}).get("limit")
    different = [field for field in fields if not _same(field, fields[field], has[field])]
    if different:
        words = [
            f"{WORDS.get(field, field)} {has[field]} -> {fields[field]}" if field in SHOWN else WORDS.get(field, field)
            for field in different
        ]
        update = DeploymentUpdate(**{field: fields[field] for field in different})
        if MANAGED not in has["tags"]:
            words.insert(0, "taken over")
        yield Change(CHANGED, "deployment", name, ", ".join(words), lambda to: to.update_deployment(found.id, update))
    if found.paused:
        if reset:
            yield Change(CHANGED, "deployment", name, "paused -> on", lambda to: to.resume_deployment(found.id))
        else:
            yield Change(
                KEPT, "deployment", name, "paused by hand: its schedules start nothing (--reset switches it on)"
            )
    yield from _schedules(name, found, spec.get("schedules", []), reset)


def deployment_name(spec: dict[str, Any]) -> str:
    """flow/deployment, as `prefect deployment run` takes it."""
    return f"{spec['entrypoint'].partition(':')[2]}/{spec['name']}"


def _same(field: str, wanted: Any, has: Any) -> bool:
    return set(wanted) == set(has or ()) if field == "tags" else wanted == has


def _schedule(wanted: dict[str, Any]) -> Any:
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    return DeploymentScheduleCreate(schedule=_cron(wanted), active=wanted["active"], slug=SCHEDULE)


def _cron(wanted: dict[str, Any]) -> Any:
    from prefect.client.schemas.schedules import CronSchedule

    return CronSchedule(cron=wanted["cron"], timezone=wanted["timezone"])


def _when(wanted: dict[str, Any]) -> str:
    return f"{wanted['cron']} {wanted['timezone']}"


def _on_off(active: bool) -> str:
    return "on" if active else "off"


def _schedules(name: str, found: Any, wanted: list[dict[str, Any]], reset: bool) -> Iterator[Change]:
    """One schedule of ours at most; whether it is on is the business of whoever switched it, unless `reset`."""
    wish = wanted[0] if wanted else None
    ours = next((entry for entry in found.schedules if entry.slug == SCHEDULE), None)
    if ours is None and wish is not None:  # `prefect deploy` registers the same schedule without a slug
        ours = next((entry for entry in found.schedules if not entry.slug and _is_at(entry, wish)), None)
    others = [entry for entry in found.schedules if entry is not ours]
    if others:
        yield Change(KEPT, "schedule", name, f"{len(others)} added by hand")
    if ours is None:
        if wish is not None:
            create = [_schedule(wish)]
            what = f"{_when(wish)}, {_on_off(wish['active'])}"
            act = lambda to: to.create_deployment_schedules(found.id, create)  # noqa: E731
            yield Change(MADE, "schedule", name, what, act)
        return
    if wish is None:
        what = _when_of(ours)
        act = lambda to: to.delete_deployment_schedule(found.id, ours.id)  # noqa: E731
        yield Change(REMOVED, "schedule", name, what, act)
        return
    switch = reset and ours.active != wish["active"]
    words = [] if _is_at(ours, wish) else [f"{_when_of(ours)} -> {_when(wish)}"]
    if switch:
        words.append(f"{_on_off(ours.active)} -> {_on_off(wish['active'])}")
    elif ours.active != wish["active"]:
        what = f"{_on_off(ours.active)}, though the catalogue says {_on_off(wish['active'])} (--reset switches it)"
        yield Change(KEPT, "schedule", name, what)
    if words or ours.slug != SCHEDULE:
        settings = {"schedule": _cron(wish), "slug": SCHEDULE, **({"active": wish["active"]} if switch else {})}
        act = lambda to: to.update_deployment_schedule(found.id, ours.id, **settings)  # noqa: E731
        yield Change(CHANGED, "schedule", name, ", ".join(words or ["taken over"]), act)


def _is_at(entry: Any, wish: dict[str, Any]) -> bool:
    schedule = entry.schedule
    return (getattr(schedule, "cron", None), getattr(schedule, "timezone", None)) == (wish["cron"], wish["timezone"])


def _when_of(entry: Any) -> str:
    cron = getattr(entry.schedule, "cron", None)
    return f"{cron} {entry.schedule.timezone}" if cron else "no cron schedule"
