"""Run a benchmark: what its cells share once, then every cell, then the table; a cell that fails takes no other along."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bmfm_pipeline.errors import TrainingError
from bmfm_pipeline.stages.benchmark_plan import BenchmarkPlan, lines_of
from bmfm_pipeline.stages.fanning import Begin, Each, Ended, Work, attempt, carry_out
from bmfm_pipeline.stages.running import Progress, run_stage


@dataclass
class BenchmarkOutcome:
    """What came of a benchmark: results of jobs by key, that of the table, and by name of a cell the error it ended with."""

    plan: BenchmarkPlan
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    table: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, BaseException] = field(default_factory=dict)

    def answer(self) -> dict[str, Any]:
        """What a run returns of it: the address of the table, its cells' tests, and the errors of those that failed."""
        return {
            "uri": self.table.get("uri", ""),
            "cells": {cell.name: cell.evaluation.uri for cell in self.plan.cells if cell.name not in self.failed},
            "failed": {name: str(error) for name, error in self.failed.items()},
        }

    def check(self) -> None:
        """Raise IncompleteBenchmark when a cell failed."""
        if self.failed:
            raise IncompleteBenchmark(self.answer())


class IncompleteBenchmark(TrainingError):
    """Some cells of a benchmark failed; the table of the others is there, and `answer` says where."""

    def __init__(self, answer: dict[str, Any]):
        self.answer = answer
        failed, cells = answer["failed"], answer["cells"]
        reasons = "\n".join(lines_of(failed))
        super().__init__(
            f"{len(failed)} of {len(failed) + len(cells)} cells of the benchmark failed:\n{reasons}\nThe others are kept and in the table: "
            "when the cause is removed, the same command completes what is missing"
        )

    def __reduce__(self):
        return IncompleteBenchmark, (self.answer,)


def run_benchmark(
    plan: BenchmarkPlan,
    on_progress: Progress | None = None,
    *,
    start: Begin | None = None,
    each: Each | None = None,
) -> BenchmarkOutcome:
    """Carry out a benchmark; jobs whose artefacts exist are reused.

    `start` carries out one job (default: run_stage in this process), `each` applies a function to all pieces of work (default: one after
    the other). Returns the outcome, in which failed cells are named; raises Preempted when a training was stopped, and the first cell's
    error when every cell failed.
    """
    outcome = BenchmarkOutcome(plan, failed=dict(plan.unplanned))
    begin = start or (lambda job, cell: run_stage(job, on_progress))

    def run(works: list[Work]) -> list[Ended]:
        return list((each or map)(partial(attempt, begin), works))

    outcome.results, failed = carry_out(plan.cells, plan.uses, run)
    outcome.failed |= failed
    if all(cell.name in outcome.failed for cell in plan.cells):
        raise next(iter(failed.values()))
    outcome.failed = {name: outcome.failed[name] for name in plan.names if name in outcome.failed}
    outcome.table = begin(plan.table_job(outcome.failed), None)
    return outcome
