"""Independent pieces of work: one after the other here, or wherever a flow spreads them."""

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bmfm_pipeline.errors import PipelineError, Preempted
from bmfm_pipeline.stages.jobs import STAGES, Job

logger = logging.getLogger(__name__)
Item, Value = TypeVar("Item"), TypeVar("Value")
# (function, items, their names) -> what the function returned of each, in the order of the items.
Mapper = Callable[[Callable[[Any], Any], Sequence[Any], Sequence[str]], list[Any]]
_mapper: ContextVar[Mapper | None] = ContextVar("mapper", default=None)
# Processes that wait for work, by how many work at the same time.
_kept: ContextVar[dict[int, Any] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def spread_by(mapper: Mapper | None) -> Iterator[None]:
    """While inside, map_jobs hands its work to `mapper`."""
    token = _mapper.set(mapper)
    try:
        yield
    finally:
        _mapper.reset(token)


def map_jobs(
    function: Callable[[Item], Value], items: Sequence[Item], *, names: Sequence[str] = (), at_once: int = 1
) -> list[Value]:
    """[function(item) for item in items], wherever a flow spreads them, else here: in order, or in `at_once` processes.

    The function and the items must be picklable: a function of a module, or functools.partial of one, and plain values. What it returns
    comes back in the order of the items; the first error in that order is raised. `names` are what people see of each item.
    """
    items = list(items)
    mapper = _mapper.get()
    if mapper is not None and len(items) > 1:
        return mapper(function, items, [str(name) for name in names] or [str(at + 1) for at in range(len(items))])
    if at_once > 1 and len(items) > 1:
        with contextlib.nullcontext() if _kept.get() is not None else keeping_processes():
            return _in_processes(function, items, at_once)
    return [function(item) for item in items]


@contextlib.contextmanager
def keeping_processes() -> Iterator[None]:
    """While inside, the processes of one map_jobs serve the next, for each takes seconds to start; they end with it."""
    pools: dict[int, Any] = {}
    token = _kept.set(pools)
    try:
        yield
    finally:
        _kept.reset(token)
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


def _in_processes(function: Callable[[Item], Value], items: Sequence[Item], at_once: int) -> list[Value]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    pools = _kept.get()
    assert pools is not None
    if at_once not in pools:
        # Not forked: threads of numerical libraries do not survive it.
        pools[at_once] = ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn"))
    try:
        return list(pools[at_once].map(function, items))
    except BrokenProcessPool:
        raise PipelineError(
            f"one of {at_once} processes was ended from outside; if nobody did it, the memory of the machine did not suffice: let fewer work "
            "at the same time (data_module.transform_kwargs.num_workers), and run the same command again"
        ) from None


def group_name(names: Sequence[str]) -> str:
    """What a person reads of some files."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@dataclass(frozen=True)
class Work:
    """Jobs to carry out one after the other. `point` is what they belong to, None where several need them."""

    name: str
    jobs: tuple[Job, ...]
    point: Any = None


@dataclass
class Ended:
    """What came of a piece of work: results by the keys of its jobs, and the error that it stopped at."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: Exception | None = None


# Carries out one job for a point (None: for several) and returns the result of its stage.
Begin = Callable[[Job, Any], dict[str, Any]]
# Applies a function to all pieces of work and returns what it returned, in their order.
Each = Callable[[Callable[[Work], Ended], list[Work]], Iterable[Ended]]


def attempt(begin: Begin, work: Work) -> Ended:
    """Carry out a piece of work; an error ends it and is kept, so that the others go on. Preempted is raised: then all of them stop."""
    ended = Ended()
    for job in work.jobs:
        try:
            ended.results[job.key] = begin(job, work.point)
        except Preempted:
            raise
        except Exception as error:
            logger.error("%s failed: %s", work.name, error)
            if not isinstance(error, PipelineError):
                logger.error("%s", traceback.format_exc())
            ended.error = error
            break
    return ended


def carry_out(
    points: Sequence[Any], uses: Mapping[str, int], run: Callable[[list[Work]], Iterable[Ended]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Exception]]:
    """Carry out the jobs of all points: (results by the key of a job, the error of each point that failed, by its name).

    A point has a `name` and `jobs` in order; `uses` counts by the key of a job how many points need it. What several need is made first,
    stage by stage. A point fails with the first of its jobs that did; a job that all points need raises its error.
    """
    results: dict[str, dict[str, Any]] = {}
    broken: dict[str, Exception] = {}
    every = {job.key: job for point in points for job in point.jobs}
    for stage in STAGES:
        shared = [job for job in every.values() if job.stage == stage and uses[job.key] > 1]
        for wave in _waves(shared):
            ready = [job for job in wave if not _needs(job, broken)]
            broken |= {job.key: _needs(job, broken) for job in wave if _needs(job, broken)}
            works = [Work(f"{job.title} of {job.name}", (job,)) for job in ready]
            for job, ended in zip(ready, run(works) if works else (), strict=True):
                results |= ended.results
                if ended.error is not None:
                    if uses[job.key] == len(points):
                        raise ended.error
                    broken[job.key] = ended.error
    failed = {}
    left = []
    for point in points:
        reason = next((broken[job.key] for job in point.jobs if job.key in broken), None)
        if reason is not None:
            failed[point.name] = reason
        else:
            left.append(Work(point.name, tuple(job for job in point.jobs if uses[job.key] == 1), point))
    for work, ended in zip(left, run(left) if left else (), strict=True):
        results |= ended.results
        if ended.error is not None:
            failed[work.name] = ended.error
    return results, {point.name: failed[point.name] for point in points if point.name in failed}


def _waves(jobs: list[Job]) -> list[list[Job]]:
    """Jobs of one stage in groups, none of which needs a job of its own or a later group."""
    waves: list[list[Job]] = []
    left = list(jobs)
    while left:
        keys = {job.key for job in left}
        now = [job for job in left if not any(entry["id"] in keys for entry in job.inputs.values())]
        waves.append(now or left)
        left = [job for job in left if job not in waves[-1]]
    return waves


def _needs(job: Job, broken: Mapping[str, Exception]) -> Exception | None:
    return next((broken[entry["id"]] for entry in job.inputs.values() if entry["id"] in broken), None)
