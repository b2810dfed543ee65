"""Run a study: what its points share once, then every point, then the summary; a point that fails takes no other along."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.stages.fanning import Each, attempt, carry_out
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.stages.running import Progress, run_stage
from bmfm_pipeline.stages.study_plan import Point, StudyPlan

# Carries out a job for a point, or for several when there is none, and returns the result of its stage.
Start = Callable[[Job, Point | None], dict[str, Any]]


@dataclass
class StudyOutcome:
    """What came of a study: results of jobs by key, of its summary, and by name of a point the error it ended with."""

    plan: StudyPlan
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, BaseException] = field(default_factory=dict)

    @property
    def main(self) -> dict[str, dict[str, Any]]:
        """Results of the stages of the point that stands for the chain, else of the largest share that has all of them."""
        whole = [point for point in self.plan.points if all(job.key in self.results for job in point.jobs)]
        if not whole:
            return {}
        point = self.plan.main if self.plan.main in whole else max(whole, key=lambda point: point.fraction)
        return {job.title: self.results[job.key] for job in point.jobs}

    def check(self) -> None:
        """Raise IncompleteStudy when a point failed."""
        if self.failed:
            raise IncompleteStudy(self)


class IncompleteStudy(TrainingError):
    """Some points of a study failed; the others are kept, and `outcome` holds them. `answer` is what the run would have returned."""

    def __init__(self, outcome: StudyOutcome, answer: dict[str, Any] | None = None):
        self.outcome, self.answer = outcome, answer or {}
        reasons = "; ".join(f"{name}: {error}" for name, error in outcome.failed.items())
        super().__init__(
            f"{len(outcome.failed)} of {len(outcome.plan.points)} points of the study failed ({reasons}). The others are kept: when the "
            "cause is removed, the same command completes what is missing"
        )


def run_study(
    plan: StudyPlan,
    on_progress: Progress | None = None,
    *,
    start: Start | None = None,
    each: Each | None = None,
) -> StudyOutcome:
    """Carry out a study; jobs whose artefacts exist are reused.

    `start` carries out one job (default: run_stage in this process), `each` applies a function to all pieces of work (default: one after
    the other). Returns the outcome, in which failed points are named; raises what ended a job that all points need, Preempted when a
    training was stopped, and the first point's error when every point failed.
    """
    outcome = StudyOutcome(plan)
    begin = start or (lambda job, point: run_stage(job, on_progress))
    each = each or map
    outcome.results, outcome.failed = carry_out(
        plan.points, plan.uses, lambda works: each(partial(attempt, begin), works)
    )
    done = [point for point in plan.points if point.name not in outcome.failed]
    if not done:
        raise next(iter(outcome.failed.values()))
    outcome.study = begin(plan.study_job(done), None)
    return outcome
