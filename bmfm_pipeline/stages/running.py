"""Run one step of a job, or a whole stage without Prefect: the same functions either way."""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.stages.costs import measured
from bmfm_pipeline.stages.fanning import keeping_processes
from bmfm_pipeline.stages.jobs import STEPS, Job, module_of
from bmfm_pipeline.stages.tracked import fail_tracking, run_links
from bmfm_pipeline.storage import Artefact, disk_errors, exclusive, read_json, write_json_atomic

logger = logging.getLogger(__name__)
Progress = Callable[[dict[str, Any]], None]
# Run folders that this process holds for a whole stage.
_held: set[Path] = set()


@contextlib.contextmanager
def one_at_a_time(job: Job) -> Iterator[Artefact | None]:
    """Hold the run folder from the first step of a stage to its last: steps of two processes would take each other's files away.

    Gives the artefact where another process has made it while this one waited.
    """
    with exclusive(job.run_dir, on_wait=logger.warning), keeping_processes():
        _held.add(job.run_dir)
        try:
            yield job.artefact()
        finally:
            _held.discard(job.run_dir)


def run_step(job_file: str, step: str, on_progress: Progress | None = None) -> dict[str, Any]:
    """Run one step of the job stored at `job_file` and return its result: strings and numbers only.

    {"uri": what it made, "hash": its content, "summary": numbers for a person, "table": rows, "links": {text: address}}.
    Steps run in the order of STEPS; each leaves its result in the run folder, where the later ones find it.
    """
    job = Job.read(job_file)
    if step not in STEPS[job.stage]:
        raise ConfigError(f"stage {job.stage} has no step '{step}'; its steps are {', '.join(STEPS[job.stage])}")
    with contextlib.nullcontext() if job.run_dir in _held else exclusive(job.run_dir, on_wait=logger.warning):
        finished = job.artefact()
        if finished is not None:  # another process was faster, or a retry came after publishing
            return {"uri": finished.uri, "hash": finished.hash, "summary": finished.summary, "table": [], "links": {}}
        function = getattr(importlib.import_module(module_of(job.stage, job.view)), step)
        result = {"uri": "", "hash": "", "summary": {}, "table": [], "links": {}}
        try:
            with disk_errors(job.run_dir), measured(job, step):
                result.update(function(job, on_progress or (lambda event: None)))
            result["links"] = {**run_links(job), **result["links"]}
        except BaseException as error:
            fail_tracking(job, error)
            raise
        if job.run_dir.exists():
            write_json_atomic(job.run_dir / "steps" / f"{step}.json", result)
    return result


def step_result(job: Job, step: str) -> dict[str, Any]:
    """What an earlier step of the same job returned."""
    path = Path(job.run_dir) / "steps" / f"{step}.json"
    if not path.exists():
        raise ConfigError(
            f"{job.stage}: step '{step}' has not run yet; run the steps in order: {', '.join(STEPS[job.stage])}"
        )
    return read_json(path)


def restore_copies(job: Job) -> None:
    """Put the copies that a config asks for in their places when the stage is reused: another place does not change the artefact."""
    module = job.config["data_module"] if job.stage == "preprocess" else {}
    named = [module.get(part, {}).get("processed_data_source") for part in ("transform_kwargs", "dataset_kwargs")]
    if module.get("transform_datasets") and (any(named) or module.get("dataset_kwargs", {}).get("label_dict_path")):
        from bmfm_pipeline.config import RunConfig
        from bmfm_pipeline.stages.preprocess import place_copies
        from bmfm_pipeline.storage import load_artefact

        place_copies(RunConfig.model_validate(job.config), load_artefact(job.uri).local())


def run_stage(job: Job, on_progress: Progress | None = None) -> dict[str, Any]:
    """All steps of a stage, without Prefect; returns the result of the last one. A cached stage returns at once."""
    finished = job.artefact()
    if finished is None:
        with one_at_a_time(job) as finished:
            if finished is None:
                return {**_run_steps(job, on_progress), "cached": False}
    restore_copies(job)
    return {
        "uri": finished.uri,
        "hash": finished.hash,
        "summary": finished.summary,
        "cached": True,
        "links": {},
        "table": [],
    }


def _run_steps(job: Job, on_progress: Progress | None) -> dict[str, Any]:
    job_file = job.write()
    result: dict[str, Any] = {}
    for step in STEPS[job.stage]:
        if on_progress:
            on_progress({"kind": "step", "stage": job.stage, "step_name": step})
        result = run_step(job_file, step, on_progress)
    return result
