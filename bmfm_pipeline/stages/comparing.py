"""Which evaluations two names stand for, and their comparison as files."""

from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import ConfigError, StorageError
from bmfm_pipeline.evaluation.comparing import Contender, compare_predictions
from bmfm_pipeline.evaluation.field_predictions import read_field_predictions
from bmfm_pipeline.evaluation.groups import read_groups
from bmfm_pipeline.evaluation.predictions import read_predictions
from bmfm_pipeline.stages.remote_output import written_to
from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    disk_errors,
    is_remote,
    list_artefacts,
    load_artefact,
    read_json,
    strip_userinfo,
    write_json_atomic,
    write_text_atomic,
)

PREDICTIONS = "predictions.parquet"
# How many evaluations back the words for one of this workspace lie.
NEWEST = {"latest": 0, "previous": 1}


def compare_runs(
    a: str,
    b: str,
    *,
    workspace: str | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Compare two evaluations, each named as find_evaluation takes it; A minus B throughout.

    Returns what a Comparison holds with "a" and "b", facts on the two sides; with `output` also "files", written into that folder:
    comparison.json, .md and .html. Raises ConfigError for a name that stands for nothing and DataError for what cannot be compared.
    """
    if not 0 < level < 1:
        raise ConfigError(f"--level must lie between 0 and 1, found {level:g}")
    if resamples < 100:
        raise ConfigError(f"--resamples must be at least 100, found {resamples}")
    place = Workspace(workspace)
    sides = [find_evaluation(name, place) for name in (a, b)]
    if sides[0].uri == sides[1].uri:
        raise ConfigError(
            f"{a} and {b} are the same evaluation ({strip_userinfo(sides[0].uri)}); name two: `latest` and `previous` are the two newest"
        )
    result = compare_predictions(*(contender(side) for side in sides), level=level, resamples=resamples, seed=seed)
    about = [facts_of(side) for side in sides]
    found = {"a": about[0], "b": about[1], **result.to_dict()}
    splits = [facts["split"] for facts in about]
    if splits[0] != splits[1]:
        found["notes"] = [*found["notes"], f"A and B were tested on different splits ({splits[0]} and {splits[1]})"]
    if output is not None:
        found |= written_to(output, place, lambda folder: {"files": write_comparison(folder, found)})
    return found


def find_evaluation(name: str, workspace: Workspace) -> Artefact:
    """The evaluation that `name` stands for: the address of one, a model (its newest one), `latest`, `previous`, or a dataset of this
    workspace (its newest one)."""
    tests = _evaluations(workspace)
    if name in NEWEST:
        if len(tests) <= NEWEST[name]:
            raise ConfigError(
                f"{name}: {workspace.uri} has {len(tests)} evaluation{'' if len(tests) == 1 else 's'}; run `bmfm evaluate` "
                "first, or name another --workspace"
            )
        return tests[NEWEST[name]]
    looks_like_a_place = is_remote(name) or "/" in name or Path(name).exists()
    if not looks_like_a_place:
        own = next((test for test in tests if test.summary.get("name") == name), None)
        if own is None:
            known = ", ".join(dict.fromkeys(str(test.summary.get("name")) for test in tests)) or "none"
            raise ConfigError(
                f"{name}: neither an address nor a dataset that was evaluated in {workspace.uri} ({known}); name an evaluation, a model, a "
                "dataset, `latest` or `previous`"
            )
        return own
    try:
        artefact = load_artefact(name.rstrip("/"))
    except StorageError as error:
        raise ConfigError(f"{strip_userinfo(name)}: no artefact of an evaluation or a model ({error})") from error
    if PREDICTIONS in artefact.files:
        return artefact
    if "config.json" not in artefact.files:
        raise ConfigError(
            f"{strip_userinfo(name)}: is a {artefact.stage} artefact; name an evaluation, or the model that was tested"
        )
    own = next((test for test in tests if test.inputs.get("model", {}).get("id") == artefact.key), None)
    if own is None:
        raise ConfigError(
            f"{strip_userinfo(name)}: no evaluation of this model in {workspace.uri}; run `bmfm evaluate task.checkpoint={name}`, or name the "
            "workspace that has one with --workspace"
        )
    return own


def _evaluations(workspace: Workspace) -> list[Artefact]:
    """Evaluations, newest first."""
    return [test for test in list_artefacts(workspace, "evaluate") if PREDICTIONS in test.files]


def contender(artefact: Artefact) -> Contender:
    """What an evaluation stored of its test cells."""
    folder = artefact.local()
    column, groups = read_groups(folder)
    return Contender(read_predictions(folder / PREDICTIONS), groups, column, read_field_predictions(folder))


def facts_of(artefact: Artefact) -> dict[str, Any]:
    """What a side is, for people."""
    model = artefact.inputs.get("model", {})
    rows = read_json(artefact.local_file("metrics.json")) if "metrics.json" in artefact.files else []
    split = next((row["split_hash"] for row in rows if row.get("split_hash")), "")
    name = artefact.summary.get("name", "unnamed")
    uri = strip_userinfo(artefact.uri)
    return {
        "what": f"{name}, model {str(model.get('id', ''))[:12]}, evaluated {artefact.created.replace('T', ' ')[:16]}: {uri}",
        "dataset": name,
        "model": strip_userinfo(str(model.get("uri", ""))),
        "evaluation": uri,
        "evaluated": artefact.created,
        "split": split[:16],
    }


def write_comparison(folder: Path, found: dict[str, Any]) -> list[str]:
    """comparison.json, comparison.md and comparison.html; what was there under these names is replaced."""
    from bmfm_pipeline.evaluation.pages.comparison import comparison_html, comparison_markdown

    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder}: is a file; name a folder with --output")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "comparison.json", found)
        write_text_atomic(folder / "comparison.md", comparison_markdown(found))
        write_text_atomic(folder / "comparison.html", comparison_html(found))
    return [str(folder / f"comparison.{ending}") for ending in ("json", "md", "html")]
