"""`bmfm workspace ls | verify | gc`: what a workspace holds, whether it is whole, and what may go."""

import argparse
import time
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from bmfm_pipeline.commands.datasets import Meter
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.stages.jobs import STAGES
from bmfm_pipeline.storage import Workspace, life, strip_userinfo
from bmfm_pipeline.storage.cache import cache_dir, cache_limit, entries, in_words
from bmfm_pipeline.storage.quarantine import quarantined

SHOWN_OF_A_KEY = 12
MOST_LINES = 40
# Words in the parameters of a deployment that stand for the newest model.
NEWEST = {"latest", "best", "last"}


class Answer(dict):
    """What a command found; `exit_code` is 1 when a person must act."""

    exit_code = 0


def workspace(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"ls": _list, "verify": _verify, "gc": _collect}[arguments.what](arguments)


def _list(arguments: argparse.Namespace) -> dict[str, Any]:
    place = Workspace()
    inventory = life.take_inventory(place)
    runs = [*life.scratch_of(inventory), *life.shared_runs(inventory)]
    copies, aside = entries(cache_dir()), quarantined(place)
    stored = _in_order(inventory)
    stages = {
        stage: [item for item in stored if item.stage == stage]
        for stage in dict.fromkeys(item.stage for item in stored)
    }
    totals = {
        "artefacts": sum(item.size for item in stored),
        "runs": sum(run.size for run in runs),
        "cache": sum(entry.size for entry in copies),
        "quarantine": sum(file.size for _, files in aside for file in files),
    }
    found = {
        "workspace": strip_userinfo(place.uri),
        "artefacts": [_row(inventory, item) for item in stored],
        "stages": {
            stage: {"artefacts": len(items), "bytes": sum(item.size for item in items)}
            for stage, items in stages.items()
        },
        "runs": [
            {
                "folder": strip_userinfo(str(run.path)),
                "stage": run.stage,
                "name": run.name,
                "state": run.state,
                "bytes": run.size,
                "touched": run.touched,
            }
            for run in runs
        ],
        "cache": {
            "folder": str(cache_dir()),
            "limit": cache_limit(),
            "entries": [
                {"source": entry.source, "bytes": entry.size, "used": entry.used, "folder": str(entry.folder)}
                for entry in copies
            ],
        },
        "quarantine": [{"uri": strip_userinfo(uri), "bytes": sum(file.size for file in files)} for uri, files in aside],
        "bytes": totals,
    }
    if not arguments.json:
        print("\n".join(_listing(inventory, stages, runs, copies, totals, arguments.all)))
    return found


def _in_order(inventory: life.Inventory) -> list[life.Stored]:
    """By stage in the order of the chain, the newest first."""
    rank = {stage: number for number, stage in enumerate(STAGES)}
    return sorted(
        inventory.stored.values(), key=lambda item: (rank.get(item.stage, len(rank)), item.stage, -item.made, item.key)
    )


def _row(inventory: life.Inventory, item: life.Stored) -> dict[str, Any]:
    def addresses(names: Any) -> list[str]:
        return sorted(strip_userinfo(inventory.stored[name].uri) for name in names)

    return {
        "stage": item.stage, "name": item.name, "variant": item.variant, "key": item.key, "uri": strip_userinfo(item.uri),
        "bytes": item.size, "files": len(item.files), "made": item.made, "problem": item.problem,
        "references": addresses(inventory.references[item.id]),
        "referenced_by": addresses(inventory.referenced_by.get(item.id, ())),
        "missing": [f"{role}: {stage}/{key}" for role, (stage, key) in inventory.missing_inputs(item)],
    }  # fmt: skip


def _listing(inventory, stages, runs, copies, totals, whole: bool) -> list[str]:
    now, lines = time.time(), [strip_userinfo(inventory.workspace.uri)]
    for stage, items in stages.items():
        size = in_words(sum(item.size for item in items))
        lines += ["", f"{stage}: {len(items)}, {size}"]
        for item in items if whole else items[:MOST_LINES]:
            name = f"{item.name}{f' ({item.variant})' if item.variant else ''}" or item.problem
            made_from = _titles(inventory, inventory.references[item.id])
            used_by = _titles(inventory, inventory.referenced_by.get(item.id, ()))
            lines.append(
                f"  {item.key[:SHOWN_OF_A_KEY]}  {name:<24} {in_words(item.size):>11} {_age(now - item.made):>5}  "
                f"{'from ' + made_from if made_from else ''}{'  used by ' + used_by if used_by else ''}".rstrip()
            )
        if not whole and len(items) > MOST_LINES:
            lines.append(f"  and {len(items) - MOST_LINES} more (--all shows them)")
    lines.append("")
    states: dict[str, list] = defaultdict(list)
    for run in runs:
        states[run.state].append(run)
    counts = ", ".join(f"{len(some)} {state}" for state, some in states.items()) or "none"
    lines += [
        f"artefacts   {len(inventory.stored):>5}  {in_words(totals['artefacts']):>11}",
        f"run folders {len(runs):>5}  {in_words(totals['runs']):>11}  {counts}",
        f"copies      {len(copies):>5}  {in_words(totals['cache']):>11}  of at most {in_words(cache_limit())}, in {cache_dir()}",
    ]
    if totals["quarantine"]:
        lines.append(f"set aside          {in_words(totals['quarantine']):>11}  `bmfm workspace verify` lists them")
    return lines


def _titles(inventory: life.Inventory, names: Any) -> str:
    """'finetune 1a2b3c4d5e6f, 3 control'."""
    by_stage: dict[str, list[str]] = defaultdict(list)
    for stage, key in sorted(names):
        by_stage[stage].append(key)
    return ", ".join(
        f"{stage} {keys[0][:SHOWN_OF_A_KEY]}" if len(keys) == 1 else f"{len(keys)} {stage}"
        for stage, keys in by_stage.items()
    )


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or unit == "min":
            return f"{max(0, seconds) / length:.0f} {unit}"
    raise AssertionError  # pragma: no cover


def _verify(arguments: argparse.Namespace) -> dict[str, Any]:
    place = Workspace()
    inventory = life.take_inventory(place)
    meter = Meter()
    findings = life.verify(inventory, quick=arguments.quick, tell=lambda done, total: meter("verify", done, total))
    meter.end()
    moved = life.repair(inventory, findings) if arguments.repair else []
    open_problems = [
        finding for finding in findings if finding.is_problem and not (arguments.repair and finding.kind == "damaged")
    ]
    found = Answer(
        workspace=strip_userinfo(place.uri),
        artefacts=len(inventory.stored),
        bytes=sum(item.size for item in inventory.stored.values()),
        findings=[asdict(finding) | {"uri": strip_userinfo(finding.uri)} for finding in findings],
        repaired=moved,
    )
    found.exit_code = 1 if open_problems else 0
    if not arguments.json:
        how = "sizes and versions of" if arguments.quick else "every byte of"
        print(
            f"{strip_userinfo(place.uri)}: {how} {found['artefacts']} artefacts ({in_words(found['bytes'])}) compared"
        )
        targets = {(entry["stage"], entry["key"]): entry["quarantine"] for entry in moved}
        for finding in findings:
            target = targets.get((finding.stage, finding.key)) if finding.kind == "damaged" else None
            print(f"{finding.kind}: {strip_userinfo(finding.uri)}\n    {finding.what}")
            print(
                f"    {f'set aside as {strip_userinfo(target)}; the next run makes it again' if target else finding.cure}"
            )
        if not findings:
            print("nothing is wrong")
    return found


def _collect(arguments: argparse.Namespace) -> dict[str, Any]:
    place = Workspace()
    older_than = life.read_age(arguments.older_than)
    inventory = life.take_inventory(place)
    protected, keep_models, keep_latest, notes = _protected(place, inventory, arguments)
    plan = life.plan_removals(
        inventory, older_than, protected=protected, keep_models=keep_models, keep_latest=keep_latest
    )
    done = plan.removals if arguments.dry_run else life.carry_out(inventory, plan)
    gone = [entry for entry in done if arguments.dry_run or entry.outcome == life.REMOVED]
    kept = [(inventory.stored[id], why) for id, why in plan.kept.items()]
    found = Answer(
        workspace=strip_userinfo(place.uri),
        dry_run=arguments.dry_run,
        removals=[
            {
                "kind": entry.kind,
                "uri": strip_userinfo(entry.uri),
                "what": entry.what,
                "why": entry.why,
                "bytes": entry.size,
                "outcome": entry.outcome,
            }
            for entry in done
        ],
        kept=[{"uri": strip_userinfo(item.uri), "why": why, "bytes": item.size} for item, why in kept],
        bytes=sum(entry.size for entry in gone),
        notes=notes,
    )
    if not arguments.json:
        print("\n".join(_collected(found, arguments)))
    return found


def _protected(
    place: Workspace, inventory: life.Inventory, arguments: argparse.Namespace
) -> tuple[dict[life.Name, str], str, bool, list[str]]:
    """({artefact: what points to it}, why all models stay, whether what `latest` stands for stays, notes for a person)."""
    from bmfm_pipeline.tracking import references_in_store, tracking_uri

    references, refused, notes = [], [], []
    try:
        references += references_in_store(tracking_uri(place.state_dir))
    except StorageError as error:
        (notes if arguments.without_registry else refused).append(_refusal(error, "--without-registry"))
    try:
        from flows.references import references_of_deployments

        deployed = references_of_deployments(place.state_dir)
        if deployed is None:
            notes.append("no Prefect server is named (PREFECT_API_URL): no deployment was asked which models it uses")
        references += deployed or []
    except StorageError as error:
        (notes if arguments.without_deployments else refused).append(_refusal(error, "--without-deployments"))
    protected = {}
    for reference in references:
        for name in sorted(life.artefacts_named_in(reference.texts)):
            if name in inventory.stored:
                protected.setdefault(name, f"{reference.what} points to it")
    keep_latest = not arguments.even_latest
    said = [reference.what for reference in references if NEWEST & set(reference.texts)]
    if said and not keep_latest:
        keep_latest = True
        notes.append(f"what `latest` stands for stays all the same: {said[0]} uses it")
    return protected, "it is not known whether something points to it" if refused else "", keep_latest, refused + notes


def _refusal(error: StorageError, option: str) -> str:
    return f"{error}; no model is deleted then, unless {option} says that nothing there points to one"


def _collected(found: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    lines = []
    copies = [entry for entry in found["removals"] if entry["kind"] == "cache"]
    for entry in found["removals"]:
        if entry["kind"] == "cache" and entry["outcome"] in ("", life.REMOVED):
            continue
        doing = "would go" if arguments.dry_run else entry["outcome"]
        lines.append(f"{doing}: {entry['kind']} {entry['what']} ({in_words(entry['bytes'])}; {entry['why']})")
    if copies:
        doing = "would go" if arguments.dry_run else "of them removed"
        size = in_words(sum(entry["bytes"] for entry in copies if entry["outcome"] in ("", life.REMOVED)))
        lines.append(
            f"{len(copies)} copies of remote files in {cache_dir()}: {size} {doing} (not used for {arguments.older_than})"
        )
    if arguments.dry_run and found["kept"]:
        lines += ["", "stays:"]
        lines += [f"  {entry['uri'].rsplit('/artefacts/', 1)[-1]}: {entry['why']}" for entry in found["kept"]]
        lines.append("")
    lines += found["notes"]
    word = "would be freed" if arguments.dry_run else "freed"
    gone, stay = len(found["removals"]), len(found["kept"])
    lines.append(
        f"{in_words(found['bytes'])} {word}, {gone} thing{'s' * (gone != 1)}; {stay} artefact{'s' * (stay != 1)} stay{'s' * (stay == 1)}"
    )
    return lines
