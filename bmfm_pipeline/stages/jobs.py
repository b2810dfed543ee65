"""One stage to run: its resolved config, its inputs, and the key that names what it will make."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmfm_pipeline.storage import (
    Artefact,
    Workspace,
    code_version,
    find_artefact,
    hash_json,
    list_artefacts,
    read_json,
    write_json_atomic,
)

STAGES = ("preprocess", "pretrain", "finetune", "evaluate")
STEPS: dict[str, tuple[str, ...]] = {
    "preprocess": ("check", "split", "label_dictionary", "vocabulary", "transform", "publish"),
    "pretrain": ("prepare", "train", "publish"),
    "finetune": ("prepare", "train", "publish"),
    "evaluate": ("predict", "controls", "metrics", "calibration", "embedding_map", "report", "publish"),
    "interpret": ("attribute", "table", "report", "publish"),
    "study": ("summarise", "publish"),
    "benchmark": ("summarise", "publish"),
}
# Stages that are not part of the chain: they read what it has made, when asked.
ASIDE = ("interpret",)
# The module that does the work of a stage: its transitive imports are the stage's code version.
STAGE_MODULES = {
    "preprocess": "bmfm_pipeline.stages.preprocess",
    "pretrain": "bmfm_pipeline.stages.train",
    "finetune": "bmfm_pipeline.stages.train",
    "evaluate": "bmfm_pipeline.stages.evaluate",
    "interpret": "bmfm_pipeline.stages.interpret",
    "study": "bmfm_pipeline.stages.study",
    "benchmark": "bmfm_pipeline.stages.benchmark",
}
SEQUENCES = "bmfm_pipeline.stages.sequences.preprocess"  # of nucleotides, with the steps of cells
KEY_LENGTH = 32
SHOWN = 5


def module_of(stage: str, view: dict[str, Any]) -> str:
    """The module with the steps of a stage, for the part of a config that enters its key."""
    return SEQUENCES if stage == "preprocess" and "sequences" in view else STAGE_MODULES[stage]


@dataclass(frozen=True)
class Job:
    """A planned stage. `inputs` maps a role to {"id": hash or key, "uri": where it lies}; ids enter the key, addresses do not.

    `config` is the whole resolved configuration, `view` the part of it that enters the key. `cached` tells whether a valid
    artefact of this key exists; `reason` says in words why the stage would run, or that it would not.
    `context` (MLflow parent run, Prefect run) is carried along and never enters the key; nor does `variant`, which names a second job of
    a stage that runs beside the chain's.
    """

    stage: str
    name: str
    key: str
    workspace: str
    config: dict[str, Any]
    view: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    code: str
    cached: bool = False
    reason: str = ""
    context: dict[str, str] = field(default_factory=dict)
    variant: str = ""

    @property
    def title(self) -> str:
        """The stage, with the variant behind it: what results of several jobs are told apart by."""
        return f"{self.stage}_{self.variant}" if self.variant else self.stage

    @property
    def place(self) -> Workspace:
        return Workspace(self.workspace)

    @property
    def uri(self) -> str:
        return self.place.artefact_uri(self.stage, self.key)

    @property
    def run_dir(self) -> Path:
        return self.place.run_dir(self.key)

    @property
    def job_file(self) -> str:
        return str(self.run_dir / "job.json")

    @property
    def staging(self) -> Path:
        """Where the files of the artefact gather before they are published."""
        return self.run_dir / "artefact"

    def artefact(self) -> Artefact | None:
        return find_artefact(self.place, self.stage, self.key)

    def as_input(self) -> dict[str, Any]:
        return {"id": self.key, "uri": self.uri, "stage": self.stage}

    def write(self, context: dict[str, str] | None = None) -> str:
        """Store the job beside its run, so that its steps can be started from its address alone.

        Raises StorageError when the workspace cannot be written: before work starts, not after hours of it.
        """
        from dataclasses import asdict

        self.place.check_writable()
        write_json_atomic(Path(self.job_file), {**asdict(self), "context": {**self.context, **(context or {})}})
        return self.job_file

    @classmethod
    def read(cls, job_file: str) -> "Job":
        return cls(**read_json(job_file))


def make_job(
    stage: str,
    name: str,
    workspace: Workspace,
    config: dict[str, Any],
    view: dict[str, Any],
    inputs: dict[str, dict[str, Any]],
    variant: str = "",
) -> Job:
    """The job whose key is the hash of its inputs' ids, the config that matters and the code that would run."""
    code = code_version(module_of(stage, view))
    ids = {role: entry["id"] for role, entry in inputs.items()}
    key = hash_json({"stage": stage, "inputs": ids, "config": view, "code": code})[:KEY_LENGTH]
    job = Job(stage, name, key, workspace.uri, config, view, inputs, code, variant=variant)
    cached = job.artefact() is not None
    reason = "a valid artefact exists" if cached else _why_it_runs(job, workspace)
    return Job(**{**job.__dict__, "cached": cached, "reason": reason})


def _why_it_runs(job: Job, workspace: Workspace) -> str:
    """Compare with the newest artefact of the same stage and name: which input, config line or code made it differ."""
    earlier = [
        artefact
        for artefact in list_artefacts(workspace, job.stage)
        if artefact.summary.get("name") == job.name and artefact.summary.get("variant", "") == job.variant
    ]
    if not earlier:
        return f"no {job.title} artefact of {job.name} yet"
    if any(artefact.key == job.key for artefact in earlier):
        return "its artefact is incomplete or damaged and will be rebuilt"
    newest = earlier[0]
    reasons = []
    for role in sorted(set(job.inputs) | set(newest.inputs)):
        before, now = (entry.get(role, {}).get("id") for entry in (newest.inputs, job.inputs))
        if before != now:
            what = "is new" if before is None else "is gone" if now is None else "changed"
            reasons.append(f"input {role} {what}{_which_files(newest.inputs.get(role, {}), job.inputs.get(role, {}))}")
    before, now = flatten(newest.config), flatten(job.view)
    changed = [name for name in sorted(set(before) | set(now)) if before.get(name) != now.get(name)]
    reasons += [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in changed[:5]]
    if len(changed) > 5:
        reasons.append(f"and {len(changed) - 5} more config lines")
    if newest.code_version != job.code:
        reasons.append("the code of the stage or a numeric library changed")
    return "; ".join(reasons) or "no reusable artefact"


def _which_files(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Of an input of several files those that differ, in words."""
    old, new = before.get("files"), now.get("files")
    if not old or not new:
        return ""
    words = [f"{name} is new" for name in new if name not in old]
    words += [f"{name} is gone" for name in old if name not in new]
    words += [f"{name} changed" for name in new if name in old and old[name]["id"] != new[name]["id"]]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return f" ({', '.join(words[:SHOWN])}{more})"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all leaves of nested dictionaries and lists."""
    if isinstance(value, dict):
        pairs = ((str(name), entry) for name, entry in value.items())
    elif isinstance(value, list):
        pairs = ((str(index), entry) for index, entry in enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, entry in pairs:
        flat.update(flatten(entry, f"{prefix}.{name}" if prefix else name))
    return flat
