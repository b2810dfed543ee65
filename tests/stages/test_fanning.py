"""Independent work: in order, in processes, by a mapper; and what a broken piece takes along."""

import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from bmfm_pipeline.errors import DataError, PipelineError, Preempted, TrainingError
from bmfm_pipeline.stages.fanning import Work, attempt, carry_out, keeping_processes, map_jobs, spread_by
from bmfm_pipeline.stages.jobs import Job


def job(stage, key, *needs):
    inputs = {f"input{number}": {"id": need, "uri": need} for number, need in enumerate(needs)}
    return Job(stage, "cells", key, "workspace", {}, {}, inputs, "code")


def double(item):
    if item == 3:
        raise DataError("three")
    return 2 * item


def test_results_come_in_the_order_of_the_items_wherever_they_are_made():
    assert map_jobs(double, [2, 1]) == map_jobs(double, [2, 1], at_once=2) == [4, 2]
    with pytest.raises(DataError, match="three"):
        map_jobs(double, [2, 3, 1])
    seen = []

    def mapper(function, items, names):
        seen.append(names)
        return [function(item) for item in items]

    with spread_by(mapper):
        assert map_jobs(double, [5, 6], names=["five", "six"]) == [10, 12]
        assert map_jobs(double, [7]) == [14], "one item is not worth the way"
    assert seen == [["five", "six"]] and map_jobs(double, [5, 6]) == [10, 12]


def my_process(item):
    if item == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return os.getpid()


def test_processes_are_kept_while_a_stage_lasts_and_one_that_is_killed_is_named():
    with keeping_processes():
        first, second = (set(map_jobs(my_process, range(8), at_once=2)) for _ in range(2))
        assert first & second and os.getpid() not in first | second
    assert not any(psutil.pid_exists(pid) for pid in first | second)
    with pytest.raises(PipelineError, match=r"one of 2 processes was ended from outside.*num_workers"):
        map_jobs(my_process, [1, 13, 2], at_once=2)


@pytest.fixture
def points():
    """Two points that share data and a model, and one that shares the data alone."""
    data, model, own = job("preprocess", "d"), job("pretrain", "m", "d"), job("pretrain", "o", "d")
    made = []
    for name, start in (("a", model), ("b", model), ("c", own)):
        tuned = job("finetune", f"f{name}", "d", start.key)
        made.append(SimpleNamespace(name=name, jobs=(data, start, tuned, job("evaluate", f"e{name}", tuned.key))))
    keys = [one.key for point in made for one in point.jobs]
    return made, {key: keys.count(key) for key in keys}


def run_with(broken, log):
    def begin(one, point):
        log.append((one.key, point and point.name))
        if one.key in broken:
            raise broken[one.key]
        return {"uri": one.key}

    return lambda works: [attempt(begin, work) for work in works]


def test_what_is_shared_is_made_first_and_once(points):
    log = []
    results, failed = carry_out(*points, run_with({}, log))
    assert [key for key, _ in log] == ["d", "m", "fa", "ea", "fb", "eb", "o", "fc", "ec"]
    assert log[:3] == [("d", None), ("m", None), ("fa", "a")]
    assert len(results) == 9 and not failed


def test_a_broken_piece_takes_along_only_what_needs_it(points):
    log = []
    results, failed = carry_out(*points, run_with({"m": TrainingError("no card")}, log))
    assert {name: str(error) for name, error in failed.items()} == {"a": "no card", "b": "no card"}
    assert [key for key, _ in log] == ["d", "m", "o", "fc", "ec"] and "ec" in results
    _, failed = carry_out(*points, run_with({"fb": ValueError("odd")}, []))
    assert list(failed) == ["b"]


def test_what_all_need_ends_everything_and_a_stop_too(points):
    with pytest.raises(DataError, match="no cells"):
        carry_out(*points, run_with({"d": DataError("no cells")}, []))
    with pytest.raises(Preempted):
        carry_out(*points, run_with({"fa": Preempted("stop")}, []))


def test_shared_jobs_of_one_stage_wait_for_each_other():
    data = job("preprocess", "d")
    first, second = job("finetune", "x", "d"), job("finetune", "y", "d", "x")
    points = [SimpleNamespace(name=name, jobs=(data, first, second)) for name in "ab"]
    log = []
    carry_out(points, {"d": 2, "x": 2, "y": 2}, run_with({}, log))
    assert [key for key, _ in log] == ["d", "x", "y"]
    assert attempt(lambda one, point: {}, Work("w", (replace(data, key="z"),))).results == {"z": {}}
