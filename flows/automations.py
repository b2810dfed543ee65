"""What a Prefect server does by itself after a re-evaluation or a failed run, as the catalogue asks for it.

Plain values; flows.deploying turns them into automations and webhook blocks of a server.
"""

from dataclasses import dataclass
from typing import Any

RUN, NOTIFY, CRASH = "run", "notify", "crash"
MANAGED = "bmfm-managed"  # tag of every deployment and automation that `bmfm deploy` has made, and of their runs
HEARTBEAT = "prefect.flow-run.heartbeat"
# A run tells every three minutes that it lives. A server that was away for less than this takes no living run for a dead one.
SILENCE_SECONDS = 20 * 60
BLOCK_PREFIX = "bmfm-managed-"
FAILED_EVENTS = ("prefect.flow-run.Failed", "prefect.flow-run.Crashed")
# Rendered by the server when the automation fires; `text` is what Slack, Mattermost and Google Chat show.
RESULT_PAYLOAD = """\
{"text": {{ ("bmfm: " ~ event.resource.name ~ ": " ~ (event.payload.message or event.event)) | tojson }},
 "event": {{ event.event | tojson }}, "dataset": %s, "occurred": {{ event.occurred | string | tojson }},
 "details": {{ event.payload | tojson }}}"""
FAILURE_PAYLOAD = """\
{"text": {{ ("bmfm: " ~ flow_run.name ~ " ended " ~ flow_run.state.name ~ ": " ~ (flow_run.state.message or "")) | tojson }},
 "event": {{ event.event | tojson }}, "dataset": %s, "occurred": {{ event.occurred | string | tojson }},
 "flow_run": {{ flow_run | ui_url | tojson }}}"""


@dataclass(frozen=True)
class WantedAutomation:
    """One automation: `events` of `resource`, or of runs of the deployments `runs_of`, and what follows.

    With `silence`, in seconds, it is about runs of ours from which nothing comes for so long after one of the events.
    """

    name: str
    description: str
    events: tuple[str, ...]
    action: str  # RUN: the deployment `deployment`; NOTIFY: POST `payload` to the webhook block `block`; CRASH: the run itself
    resource: str = ""
    runs_of: tuple[str, ...] = ()
    deployment: str = ""
    block: str = ""
    payload: str = ""
    silence: int = 0


# A machine that lost its power says nothing: its run would hold a place of its pool for ever.
_END_DEAD_RUNS = WantedAutomation(
    name="bmfm: end runs whose process is gone",
    description=f"A run from which nothing has come for {SILENCE_SECONDS // 60} minutes is shown as Crashed, and its pool has a place again.",
    events=(HEARTBEAT,),
    action=CRASH,
    silence=SILENCE_SECONDS,
    payload=f"Nothing has come from this run for {SILENCE_SECONDS // 60} minutes. Start it again: it goes on from its last checkpoint.",
)


def dataset_resource(name: str) -> str:
    """The resource id that events about a dataset carry."""
    return f"bmfm.dataset.{name}"


def result_event(outcome: str) -> str:
    """The event with which a re-evaluation ends: held, improved, regressed or drifted."""
    return f"bmfm.reevaluate.{outcome}"


def block_name(variable: str) -> str:
    """The webhook block that keeps the address of environment variable `variable`."""
    return BLOCK_PREFIX + variable.lower().replace("_", "-")


def automations(entries: list[Any], deployed: list[str]) -> list[WantedAutomation]:
    """The automations of these entries of the catalogue; `deployed` names all deployments as flow/name."""
    return [_END_DEAD_RUNS, *(wanted for entry in entries if entry.deployed for wanted in _of(entry, deployed))]


def webhooks(entries: list[Any]) -> dict[str, str]:
    """{webhook block: environment variable with its address} of these entries."""
    used = [entry.automations.webhook_env for entry in entries if entry.deployed and entry.automations.notify_on]
    return {block_name(variable): variable for variable in used}


def _of(entry: Any, deployed: list[str]) -> list[WantedAutomation]:
    import json

    chosen, made = entry.automations, []
    if chosen.finetune_on:
        made.append(
            WantedAutomation(
                name=f"bmfm: fine-tune {entry.name} again",
                description=f"Starts finetune/{entry.name} once a re-evaluation ends {' or '.join(chosen.finetune_on)}.",
                events=tuple(map(result_event, sorted(chosen.finetune_on))),
                resource=dataset_resource(entry.name),
                action=RUN,
                deployment=f"finetune/{entry.name}",
            )
        )
    outcomes = sorted(set(chosen.notify_on) - {"failed"})
    block = block_name(chosen.webhook_env)
    if outcomes:
        made.append(
            WantedAutomation(
                name=f"bmfm: tell how {entry.name} does",
                description=f"A POST to the webhook {block} once a re-evaluation ends {' or '.join(outcomes)}.",
                events=tuple(map(result_event, outcomes)),
                resource=dataset_resource(entry.name),
                action=NOTIFY,
                block=block,
                payload=RESULT_PAYLOAD % json.dumps(entry.name),
            )
        )
    if "failed" in chosen.notify_on:
        made.append(
            WantedAutomation(
                name=f"bmfm: tell when a run of {entry.name} fails",
                description=f"A POST to the webhook {block} once a run of a deployment of {entry.name} fails or crashes.",
                events=FAILED_EVENTS,
                runs_of=tuple(name for name in deployed if name.partition("/")[2] == entry.name),
                action=NOTIFY,
                block=block,
                payload=FAILURE_PAYLOAD % json.dumps(entry.name),
            )
        )
    return made
