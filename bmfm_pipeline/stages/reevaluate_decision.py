"""What a re-evaluation found: how the champion does now, whether the data drifted, whether the challenger takes over; all of it recorded."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.errors import DataError, StorageError
from bmfm_pipeline.evaluation.drift import Drift, measure_drift
from bmfm_pipeline.evaluation.promotion import (
    DRIFTED,
    HELD,
    IMPROVED,
    REGRESSED,
    Decision,
    Judgement,
    compare_with_record,
    decide,
    outcome_of,
)
from bmfm_pipeline.stages.comparing import contender
from bmfm_pipeline.stages.reevaluate import NO_CHAMPION, Contestant, Reevaluation, recorded_evaluation
from bmfm_pipeline.stages.reevaluate_cells import TestedCells, cells_that_count, labels_without_class, side_of
from bmfm_pipeline.stages.registering import (
    RECORD,
    first_champion,
    make_champion,
    now_text,
    record_tags,
    register_model,
    write_decision,
)
from bmfm_pipeline.storage import Artefact, load_artefact, strip_userinfo, write_json_atomic, write_text_atomic
from bmfm_pipeline.tracking import EXPERIMENT, ModelVersion, StageTracker, redact, tracking_uri

# What a page calls a run that has ended so.
STATES = {HELD: "Held", IMPROVED: "Improved", REGRESSED: "Regressed", DRIFTED: "Drifted", NO_CHAMPION: "NoChampion"}
UNCHANGED = "model, data and code are those of its recorded evaluation"


def conclude(plan: Reevaluation, context: Mapping[str, str]) -> dict[str, Any]:
    """Compare what the finished jobs of `plan` have stored, decide, and write it on the model versions and into a run of MLflow.

    `context` holds `triggered_by`, and `prefect_flow_run_id` and `prefect_flow_run_url` where there are any. Returns {"dataset", "model",
    "outcome" (held, improved, regressed, drifted, or no champion), "state", "message", "champion", "judgements", "drift", "notes",
    "promotion" (None, or the decision), "triggered_by", "at", "mlflow_run_id", "mlflow_url"}.
    """
    found: dict[str, Any] = {
        "dataset": plan.dataset,
        "model": plan.model,
        "outcome": NO_CHAMPION,
        "message": "",
        "champion": None,
        "judgements": [],
        "drift": [],
        "notes": [],
        "promotion": None,
        "triggered_by": context.get("triggered_by", "unknown"),
        "at": now_text(),
    }
    champion = _counted(plan.champion) if plan.champion else None
    if plan.champion is not None:
        found["champion"] = _facts(plan.champion)
        if not plan.only_promotion:
            _judge_champion(plan, champion, found)
    decision = None
    if plan.challenger is not None:
        decision = _decision(plan, champion, _counted(plan.challenger), found)
    found["message"] = _message(plan, found)
    found["state"] = STATES[found["outcome"]]
    _record(plan, found, decision, context)
    return found


def _counted(side: Contestant) -> tuple[TestedCells, list[str]]:
    if side.evaluation.artefact() is None:
        raise StorageError(f"{side.evaluation.uri}: the evaluation is gone; run the same command again")
    return cells_that_count(side.evaluation, side.prepared_folder() if side.held_out else None)


def _facts(side: Contestant) -> dict[str, Any]:
    return {
        "version": side.version.version if side.version else None,
        "model": strip_userinfo(side.model.uri),
        "evaluation": strip_userinfo(side.evaluation.uri),
        "data_changed": side.held_out,
        "labels_without_class": side.left,
    }


def _judge_champion(plan: Reevaluation, counted: tuple[TestedCells, list[str]], found: dict[str, Any]) -> None:
    side, (tested, notes) = plan.champion, counted
    recorded = recorded_evaluation(side, plan.place)
    judgements: list[Judgement] = []
    drifts: list[Drift] = []
    if recorded is None:
        notes = [*notes, "its recorded evaluation is not there; this one is its record from now on"]
        found["champion"][RECORD] = strip_userinfo(side.evaluation.uri)
    else:
        found["champion"]["recorded"] = strip_userinfo(recorded.uri)
        if recorded.key == side.evaluation.key:
            notes = [*notes, UNCHANGED]
        else:
            judgements, more = compare_with_record(contender(recorded), tested.side, plan.settings, plan.seed)
            notes += more
        if side.held_out and recorded.key != side.evaluation.key:
            drifts, more = _drift(plan, side, tested, recorded)
            notes += more
    for labels in side.left.values():
        said = ", ".join(f"{label} ({count:,} cells)" for label, count in labels.items())
        notes.append(f"the model has no class for {said}; these cells are not scored")
    if not side.held_out:
        notes.append("the data are those that the model was trained on, so nothing can have drifted")
    found["outcome"] = outcome_of(judgements, drifts)
    found["judgements"] = [one.to_dict() for one in judgements]
    found["drift"] = [one.to_dict() for one in drifts]
    found["notes"] += notes


def _drift(
    plan: Reevaluation, side: Contestant, tested: TestedCells, recorded: Artefact
) -> tuple[list[Drift], list[str]]:
    """Numbers on the cells that were not tested before; on all of them where too few are new."""
    try:
        data = load_artefact(recorded.inputs["data"]["uri"]).local()
    except StorageError:
        return [], ["the data of the recorded evaluation are gone, so no drift can be measured"]
    before = TestedCells.of(recorded, data)
    known = set(before.cells)
    new = np.array([cell not in known for cell in tested.cells], dtype=bool)
    fewest = plan.settings.min_cells
    current = tested.only(new) if new.sum() >= fewest else tested
    which = "new cells" if new.sum() >= fewest else "cells, of which too few are new to be looked at alone,"
    if len(current.cells) < fewest:
        return [], [f"{len(current.cells)} cells are too few to measure drift (promotion.min_cells {fewest})"]
    run = RunConfig.model_validate(side.evaluation.config)
    more: list[str] = []
    for column, labels in side.left.items():
        own = (run.evaluation.label_from or {}).get(column, column)
        more = labels_without_class(side.evaluation, own, labels, side.prepared_folder())
    ours = side_of(current, run, more)
    found = measure_drift(side_of(before, run), ours, plan.settings.drift, plan.seed)
    return found, [
        f"drift is measured of {len(current.cells):,} {which} against the {len(before.cells):,} recorded ones"
    ]


def _decision(
    plan: Reevaluation, champion: tuple[TestedCells, list[str]] | None, counted: tuple[TestedCells, list[str]],
    found: dict[str, Any],
) -> Decision | None:  # fmt: skip
    """The challenger beside the champion; None where there is no champion. Aliases and versions are written with the rest."""
    if champion is None:
        return None
    try:
        decision = decide(champion[0].side, counted[0].side, plan.settings, plan.seed)
    except DataError as error:
        decision = Decision(promoted=False, reasons=[str(error)])
    found["promotion"] = _described(plan, decision, found)
    return decision


def _described(plan: Reevaluation, decision: Decision, found: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"margin": plan.settings.margin}
    if decision.judgements:
        first = decision.judgements[0]
        numbers |= {
            "metric": first.metric,
            "cells": first.n[0],
            "of_challenger": first.a["value"],
            "of_champion": first.b["value"],
            "difference": first.difference.value,
            "ci_low": first.difference.low,
            "ci_high": first.difference.high,
            "least_gain": first.gain[1],
            "p": first.p,
        }
    for target, rare in list(decision.rare.items())[:1]:
        numbers |= {"rare_of": target, "rare_f1_of_challenger": rare["a"], "rare_f1_of_champion": rare["b"]}
    return {
        "decision": "promoted" if decision.promoted else "kept",
        **decision.to_dict(),
        "numbers": numbers,
        "champion": plan.champion.version.version,
        "challenger": plan.challenger.version.version,
        "evaluations": {
            "champion": strip_userinfo(plan.champion.evaluation.uri),
            "challenger": strip_userinfo(plan.challenger.evaluation.uri),
        },
        "triggered_by": found["triggered_by"],
        "at": found["at"],
    }


def _message(plan: Reevaluation, found: dict[str, Any]) -> str:
    """The state's message: what decided, then the rest that a person should know."""
    parts = []
    if plan.champion is not None and not plan.only_promotion:
        kind = {REGRESSED: "worse", IMPROVED: "better"}.get(found["outcome"])
        told = [one["sentence"] for one in found["judgements"] if kind is None or one["kind"] == kind]
        beyond = [one["sentence"] for one in found["drift"] if one["drifted"]]
        parts += [*beyond, *told] if found["outcome"] == DRIFTED else [*told, *beyond]
        if found["drift"] and not beyond:
            parts.append("no number of the data is beyond its limit")
        wanted = ("has no class for", UNCHANGED, "its recorded evaluation")
        parts += [note for note in found["notes"] if any(word in note for word in wanted)]
        parts = [f"{plan.champion.version.title}: {'; '.join(parts)}"]
    decision = found["promotion"]
    if decision is not None:
        who = f"version {decision['challenger']}"
        said = f"{who} is champion now" if decision["promoted"] else f"{who} stays challenger"
        parts.append(f"{said}: {'; '.join(decision['reasons'])}")
    elif plan.champion is None:
        parts.append(_without_champion(plan))
    elif plan.only_promotion:
        parts.append(f"{plan.champion.version.title} is champion already")
    return ". ".join(parts)


def _without_champion(plan: Reevaluation) -> str:
    if plan.challenger is None:
        return (
            f"{plan.model} has no champion yet, and this workspace has no evaluated model of {plan.dataset}: make one with `bmfm run "
            f"{plan.dataset}`, then `bmfm promote {plan.dataset}`"
        )
    if plan.settings.first == "champion":
        return f"{plan.model} had no champion; the first evaluated model, {strip_userinfo(plan.challenger.model.uri)}, is champion now"
    return (
        f"{plan.model} has no champion yet, and promotion.first is challenger: accept the challenger with `bmfm promote {plan.dataset} "
        "promotion.first=champion`"
    )


def _record(plan: Reevaluation, found: dict[str, Any], decision: Decision | None, context: Mapping[str, str]) -> None:
    """One run of MLflow with numbers and files; tags and a copy on every version that it is about; then the aliases."""
    state_dir = plan.place.state_dir
    tags = {
        "bmfm.stage": "reevaluate",
        "bmfm.dataset": plan.dataset,
        "bmfm.triggered_by": found["triggered_by"],
        "prefect.flow_run_id": context.get("prefect_flow_run_id"),
        "prefect.flow_run_url": context.get("prefect_flow_run_url"),
    }
    with StageTracker(
        tracking_uri(state_dir), EXPERIMENT, f"reevaluate-{plan.dataset}",
        tags={name: value for name, value in tags.items() if value}, state_dir=state_dir,
    ) as tracker:  # fmt: skip
        found |= {"mlflow_run_id": tracker.run_id, "mlflow_url": tracker.url}
        versions = _write_versions(plan, found)
        tracker.set_tags({"bmfm.outcome": found["outcome"], "bmfm.message": found["message"][:4000]})
        tracker.log_params({"promotion": plan.settings.model_dump(mode="json"), "data": plan.data or "as they are now"})
        tracker.log_metrics(_numbers(found))
        with tempfile.TemporaryDirectory() as folder:
            write_json_atomic(Path(folder) / "reevaluation.json", found)
            write_text_atomic(Path(folder) / "reevaluation.md", page(found))
            for name in ("reevaluation.json", "reevaluation.md"):
                tracker.log_artifact(Path(folder) / name)
    if not plan.only_promotion:
        text = json.dumps(redact(found), indent=2, default=str)
        for version in versions:
            plan.registry.attach(version, f"reevaluation/{found['at'].replace(':', '')}.json", text)


def _write_versions(plan: Reevaluation, found: dict[str, Any]) -> list[ModelVersion]:
    registry, versions = plan.registry, []
    if plan.champion is not None:
        version = plan.champion.version
        versions.append(version)
        test = plan.champion.evaluation.artefact()
        if RECORD not in version.tags:
            registry.tag(version, record_tags(recorded_evaluation(plan.champion, plan.place) or test))
        elif RECORD in found["champion"]:
            registry.tag(version, record_tags(test))
        if not plan.only_promotion:
            registry.tag(version, _outcome_tags(found, strip_userinfo(test.uri)))
    if plan.challenger is None:
        return versions
    side, test = plan.challenger, plan.challenger.evaluation.artefact()
    own = recorded_evaluation(side, plan.place) or test
    if side.version is None:
        side.version = register_model(registry, plan.dataset, side.model, own, found["triggered_by"])
    elif RECORD not in side.version.tags:
        registry.tag(side.version, record_tags(own))
    versions.append(side.version)
    decision = found["promotion"]
    if decision is None and plan.settings.first == "champion":
        decision = found["promotion"] = first_champion(side.version, found["triggered_by"])
    if decision is not None:
        write_decision(registry, versions, decision)
        if decision["promoted"]:
            make_champion(registry, side.version)
    return versions


def _outcome_tags(found: dict[str, Any], evaluation: str) -> dict[str, Any]:
    return {
        "bmfm.reevaluation.outcome": found["outcome"],
        "bmfm.reevaluation.message": found["message"],
        "bmfm.reevaluation.evaluation": evaluation,
        "bmfm.reevaluation.at": found["at"],
        "bmfm.reevaluation.run": found["mlflow_run_id"],
        "bmfm.reevaluation.triggered_by": found["triggered_by"],
    }


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    numbers = {f"drift/{one['name']}": one["value"] for one in found["drift"]}
    for one in found["judgements"]:
        place = f"{one['target']}/{one['metric']}/{one['cells'].replace(' ', '_')}"
        numbers |= {f"{place}/now": one["a"]["value"], f"{place}/recorded": one["b"]["value"]}
        numbers[f"{place}/difference"] = one["difference"]["value"]
    decision = found["promotion"] or {}
    numbers |= {f"promotion/{name}": value for name, value in (decision.get("numbers") or {}).items()}
    return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}


def score_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons as rows of a table."""
    judged = [("recorded", one) for one in found["judgements"]]
    judged += [("champion", one) for one in (found["promotion"] or {}).get("judgements", [])]
    return [
        {
            "target": one["target"],
            "cells": f"{one['cells']} ({one['n'][0]:,})",
            "test": "paired" if one["paired"] else "unpaired",
            "metric": one["metric"],
            "now": one["a"]["value"],
            "against": f"{other} {one['b']['value']:.4g}",
            "difference": one["difference"]["value"],
            "low": one["difference"]["ci_low"],
            "high": one["difference"]["ci_high"],
            "verdict": one["kind"],
        }
        for other, one in judged
    ]


def drift_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers of the data as rows of a table."""
    return [
        {
            "what": one["name"].replace("_", " "),
            "value": one["value"],
            "limit": one["limit"],
            "by chance below": one["chance"],
            "drifted": "yes" if one["drifted"] else "no",
        }
        for one in found["drift"]
    ]


def page(found: dict[str, Any]) -> str:
    """The whole as markdown."""
    lines = [f"# {found['dataset']}: {found['state']}", "", found["message"], ""]
    for title, rows in (("Scores", score_rows(found)), ("The data", drift_rows(found))):
        if rows:
            lines += [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
            lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
            lines.append("")
    if found["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in found["notes"]), ""]
    lines.append(f"Triggered by {found['triggered_by']}, {found['at']}.")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
