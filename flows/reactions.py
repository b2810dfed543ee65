"""Automations of a Prefect server and the webhook blocks that they call, against what flows.automations asks for."""

import json
import os
from collections.abc import Iterator
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

from bmfm_pipeline.errors import ConfigError
from flows.automations import CRASH, MANAGED, RUN, WantedAutomation
from flows.differences import CHANGED, KEPT, MADE, Change, pages

HEADERS = {"Content-Type": "application/json"}


def webhook_documents(client: SyncPrefectClient) -> list[Any]:
    """All webhook blocks of the server; their addresses are masked."""
    return pages(client.read_block_documents_by_type, block_type_slug="webhook", include_secrets=False)


def webhook(client: SyncPrefectClient, name: str, variable: str, dry_run: bool) -> Iterator[Change]:
    """The block that keeps the address in `variable`; one that is there stays as it is where the variable is not set."""
    address = os.environ.get(variable)
    try:
        found = client.read_block_document_by_name(name, "webhook", include_secrets=True)
    except ObjectNotFound:
        found = None
    if not address:
        if found is not None:
            return
        if dry_run:
            yield Change(MADE, "webhook", name, f"the address in {variable}, which must be set for that")
            return
        raise ConfigError(
            f"{variable} is not set, and the catalogue asks for notifications (automations.notify_on); set it to the address "
            "that they are sent to, or empty notify_on"
        )
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"{variable}: notifications go to an http:// or https:// address")
    if found is not None and found.data.get("url") == address:
        return

    def save(_: SyncPrefectClient) -> None:
        from prefect.blocks.webhook import Webhook

        Webhook(method="POST", url=address, headers=HEADERS).save(name, overwrite=True)

    sign, what = (CHANGED, f"another address, from {variable}") if found else (MADE, f"the address in {variable}")
    yield Change(sign, "webhook", name, what, save)


def automation(
    wish: WantedAutomation, found: Any | None, deployed: dict[str, Any], blocks: dict[str, Any], reset: bool
) -> Iterator[Change]:
    """One automation. `deployed` is {flow/name: deployment} and `blocks` {name: webhook block} that the server has by now."""
    if found is None:
        yield Change(MADE, "automation", wish.name, wish.description, lambda to: to.create_automation(_core(to, wish)))
        return
    needed = [wish.deployment] if wish.action == RUN else list(wish.runs_of)
    missing = [name for name in needed if name not in deployed] + [wish.block] * (wish.block not in (*blocks, ""))

    def replace(to: SyncPrefectClient) -> None:
        core = _core(to, wish)
        core.enabled = found.enabled or reset
        to.update_automation(found.id, core)

    switch = reset and not found.enabled
    different = [f"with {', '.join(missing)} made anew"] if missing else _different(wish, found, deployed, blocks)
    words = different + (["off -> on"] if switch else [])
    if words:
        yield Change(CHANGED, "automation", wish.name, ", ".join(words), replace)
    if not found.enabled and not switch:
        yield Change(KEPT, "automation", wish.name, "switched off by hand (--reset switches it on)")


def _different(wish: WantedAutomation, found: Any, deployed: dict[str, Any], blocks: dict[str, Any]) -> list[str]:
    ids = {name: entry.id for name, entry in deployed.items()}
    trigger = found.trigger.model_dump(mode="json")
    wanted = _trigger(wish, ids).model_dump(mode="json")
    words = []
    if any(_plain(trigger.get(part)) != _plain(value) for part, value in wanted.items() if part != "id"):
        words.append("trigger")
    action = found.actions[0].model_dump(mode="json") if len(found.actions) == 1 else {}
    if wish.action == RUN:
        same = (action.get("type"), action.get("deployment_id")) == ("run-deployment", str(ids[wish.deployment]))
    elif wish.action == CRASH:
        same = (action.get("type"), action.get("message")) == ("change-flow-run-state", wish.payload)
    else:
        named = [action.get(part) for part in ("type", "block_document_id", "payload")]
        same = named == ["call-webhook", str(blocks[wish.block].id), wish.payload]
    if not same:
        words.append("action")
    if found.description != wish.description:
        words.append("description")
    return words


def _plain(value: Any) -> Any:
    """Sets come back from the server as lists in any order."""
    return sorted(value, key=json.dumps) if isinstance(value, list) else value


def _trigger(wish: WantedAutomation, ids: dict[str, Any]) -> Any:
    from datetime import timedelta

    from prefect.events.schemas.automations import EventTrigger, Posture

    if wish.silence:
        return EventTrigger(
            posture=Posture.Proactive,
            after=set(wish.events),
            expect={"prefect.flow-run.*"},
            within=timedelta(seconds=wish.silence),
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.id": f"prefect.tag.{MANAGED}", "prefect.resource.role": "tag"},
            for_each={"prefect.resource.id"},
        )
    if wish.runs_of:
        runs = sorted(f"prefect.deployment.{ids[name]}" for name in wish.runs_of)
        match = {"prefect.resource.id": "prefect.flow-run.*"}
        return EventTrigger(
            posture=Posture.Reactive, expect=set(wish.events), match=match,
            match_related={"prefect.resource.id": runs, "prefect.resource.role": "deployment"},
            for_each={"prefect.resource.id"},
        )  # fmt: skip
    return EventTrigger(posture=Posture.Reactive, expect=set(wish.events), match={"prefect.resource.id": wish.resource})


def _core(client: SyncPrefectClient, wish: WantedAutomation) -> Any:
    """The automation as it is sent; deployments and blocks that it names must be there by now."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import CallWebhook, ChangeFlowRunState, RunDeployment
    from prefect.events.schemas.automations import AutomationCore

    names = [wish.deployment] if wish.action == RUN else wish.runs_of
    ids = {name: client.read_deployment_by_name(name).id for name in names}
    if wish.action == RUN:
        action = RunDeployment(source="selected", deployment_id=ids[wish.deployment])
    elif wish.action == CRASH:
        action = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=wish.payload)
    else:
        block = client.read_block_document_by_name(wish.block, "webhook")
        action = CallWebhook(block_document_id=block.id, payload=wish.payload)
    return AutomationCore(
        name=wish.name, description=wish.description, enabled=True, tags=["bmfm", MANAGED], trigger=_trigger(wish, ids),
        actions=[action],
    )  # fmt: skip
