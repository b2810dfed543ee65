"""Where independent work is done: in this process, on a Dask cluster of this machine, or on one at an address.

The files of a preprocessing, the points of a study and the cells of a benchmark go through here. One training has a device to itself:
on GPUs as many run at the same time as there are GPUs, on CPUs as the cores allow, and they share the cores.
"""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from bmfm_pipeline.errors import ConfigError, PipelineError, Preempted, TrainingError
from bmfm_pipeline.stages.fanning import Ended, Work, spread_by
from flows import local
from flows.running import relayed_logs

HERE, DASK = "here", "dask"
VARIABLE = "BMFM_DASK"
CORES_OF_A_TRAINING = 4
# What a training child is started with, by the names that a job's context gives them.
_place: ContextVar[dict[str, str] | None] = ContextVar("place", default=None)
# Of a Dask worker that may run several tasks at once: one of them has the device.
_device = threading.Lock()


def place_of_work(asked: str | None = None) -> str:
    """here, dask (a cluster of this machine) or the address of a scheduler, from a form's word or from BMFM_DASK; ConfigError for others."""
    word = (asked or os.environ.get(VARIABLE) or HERE).strip()
    if word.lower() in (HERE, "none", "off"):
        return HERE
    if word.lower() in (DASK, "local"):
        return DASK
    if "://" in word:
        return word
    raise ConfigError(
        f"{'fan_out' if asked else VARIABLE}={word}: write here, dask (a cluster of this machine; {VARIABLE}=local) or the address of a "
        "scheduler, such as tcp://scheduler:8786"
    )


def context_of_place() -> dict[str, str]:
    """What the context of a job carries to its training: the GPU and the number of threads that this piece of work has to itself."""
    return dict(_place.get() or {})


def cores() -> int:
    return len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    from bmfm_pipeline.training.launch import visible_gpus

    return visible_gpus()


def most_at_once() -> int:
    """How many trainings this machine takes at the same time."""
    return len(gpus()) or max(1, cores() // CORES_OF_A_TRAINING)


@dataclass
class Fan:
    """Spreads pieces of work. `where` as place_of_work gives it; `at_once`: how many at the same time on this machine (default: one here,
    as many as the machine takes on a cluster of its own). A scheduler at an address decides that by its workers. A context manager: its
    cluster lives until it is left."""

    where: str = HERE
    at_once: int | None = None
    tags: tuple[str, ...] = ()
    trains: bool = True
    _devices: "queue.Queue[str]" = field(default_factory=queue.Queue)
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _cluster: TaskRunner | None = None

    def __enter__(self) -> "Fan":
        return self

    def __exit__(self, *error: Any) -> None:
        """Close the cluster, if one was needed."""
        self._cluster = None
        self._open.close()

    def __post_init__(self) -> None:
        self.width = self.at_once or (1 if self.where == HERE else most_at_once())
        found = gpus() if self.trains and (self.width > 1 or self.where == DASK) else []
        self.pinned = len(found) > 1
        if found:
            self.width = min(self.width, len(found))
        for device in found:
            self._devices.put(device)

    def map(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        names: Sequence[str],
        kind: str,
        on_end: Callable[[str, Any], None] | None = None,
    ) -> list[Any]:
        """What `function` returned of each item, in their order, each in a task of its own called by its name.

        Function, items and what is returned must be picklable where a cluster does the work. An Ended with an error is returned like
        any value, and its task shown as failed; an error that is raised is raised here when all have ended, Preempted first. `on_end` is
        called with the name and what came of it (or the error) as each ends.
        """
        body = _Body(function, self._place_here if self.where == HERE else _OnWorker(self), self.where == HERE)

        def carry_out(item: Any, name: str) -> Any:
            return body(item)

        one = task(
            carry_out,
            name=kind,
            task_run_name="{name}",
            tags=list(self.tags),
            cache_policy=NO_CACHE,
            persist_result=False,
        )
        # One after the other in the thread of the flow, where Ctrl-C and SIGTERM are noticed at once.
        alone = self.where == HERE and self.width == 1
        values = (self._one_by_one if alone else self._submit)(one, items, names, on_end or (lambda name, found: None))
        errors = [value for value in values if isinstance(value, BaseException)]
        for error in sorted(errors, key=lambda error: not isinstance(error, Preempted)):
            raise error
        return values

    def _one_by_one(self, one: Any, items: Sequence[Any], names: Sequence[str], on_end: Any) -> list[Any]:
        values: list[Any] = []
        for item, name in zip(items, names, strict=True):
            values.append(_value(one(item, name, return_state=True)))
            on_end(name, values[-1])
            if isinstance(values[-1], Preempted):
                break
        return values

    @contextlib.contextmanager
    def _runner(self) -> Iterator[TaskRunner]:
        """Threads for these pieces of work alone, or the cluster, which stays for the next ones."""
        if self.where == HERE:
            with ThreadPoolTaskRunner(max_workers=self.width) as runner:
                yield runner
            return
        if self._cluster is None:
            self._cluster = self._open.enter_context(self._connect())
            try:
                self._cluster.client  # noqa: B018 - connects
            except (OSError, TimeoutError) as error:
                raise ConfigError(
                    f"no Dask cluster at {self.where} ({error}); start one with `dask scheduler` and `dask worker`, or leave fan_out empty"
                ) from error
        yield self._cluster

    def _submit(self, one: Any, items: Sequence[Any], names: Sequence[str], on_end: Any) -> list[Any]:
        with self._runner() as runner:
            futures = [
                runner.submit(one, {"item": item, "name": name}) for item, name in zip(items, names, strict=True)
            ]
            values: dict[int, Any] = {}
            try:
                for future in as_completed(futures):
                    at = futures.index(future)
                    values[at] = _end_of(future, items[at])
                    if self.where != HERE:  # events of other processes do not come here
                        local.tell({"kind": "note", "message": f"{names[at]}: {_said(values[at])}"})
                    on_end(names[at], values[at])
            except BaseException:
                local.stop_all()  # before the runner waits for its threads
                if self.where != HERE:
                    runner.client.cancel([future.wrapped_future for future in futures])
                raise
            return [values[at] for at in range(len(futures))]

    def _connect(self) -> TaskRunner:
        # Workers that are told to end while they say that they live would fill the terminal with it.
        os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")
        try:
            from prefect_dask import DaskTaskRunner
        except ImportError:
            raise ConfigError(
                f"fan-out over Dask needs prefect-dask: pip install 'bmfm_pipeline[dask]', or unset {VARIABLE} and leave fan_out empty"
            ) from None
        if self.where != DASK:
            return DaskTaskRunner(address=self.where, client_kwargs={"timeout": 30})
        cluster = {
            "n_workers": self.width,
            "threads_per_worker": 1,
            "host": "127.0.0.1",
            "dashboard_address": None,
            # A worker is never killed for its memory, nor told to spill: what a training takes it has a reason for.
            "memory_limit": 0,
            "silence_logs": logging.ERROR,
        }
        return DaskTaskRunner(cluster_kwargs=cluster)

    def _own_threads(self) -> dict[str, str]:
        if self.width < 2 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"omp_num_threads": str(max(1, cores() // self.width))}

    @contextlib.contextmanager
    def _place_here(self) -> Iterator[None]:
        """A GPU of its own for a piece of work of a thread of this process, waited for where all are taken, and its share of the cores."""
        device = self._devices.get() if self.pinned and self.width > 1 else None
        place = self._own_threads() | ({} if device is None else {"cuda_visible_devices": device})
        token = _place.set(place)
        try:
            yield
        finally:
            _place.reset(token)
            if device is not None:
                self._devices.put(device)


@contextlib.contextmanager
def spread_files() -> Iterator[None]:
    """While inside, what a stage maps over files is done where BMFM_DASK says; within a piece of work that is spread already, here."""
    where = place_of_work() if _place.get() is None else HERE
    if where == HERE:
        yield
        return
    with Fan(where, cores(), ("files",), trains=False) as fan:

        def mapper(function: Callable[[Any], Any], items: Sequence[Any], names: Sequence[str]) -> list[Any]:
            return fan.map(function, items, names, "file")

        with spread_by(mapper):
            yield


class _OnWorker:
    """The same in a process of a Dask cluster: one piece of work at a time, on a cluster of this machine on the GPU of the worker's number."""

    def __init__(self, fan: Fan):
        self.devices = gpus() if fan.where == DASK and fan.pinned else []
        self.place = fan._own_threads() if fan.where == DASK else {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        from distributed import get_worker

        number = get_worker().name
        # That of the flow's process, which is watched over already.
        os.environ.pop("PREFECT__WORKER_NAME", None)
        with _device:
            if self.devices and isinstance(number, int):
                # For all that this process does: nothing but this worker uses it.
                os.environ["CUDA_VISIBLE_DEVICES"] = self.devices[number % len(self.devices)]
            token = _place.set(self.place)
            try:
                yield
            finally:
                _place.reset(token)


class _Body:
    """The body of a task: one item, at its place, with the library's log lines on the page of the run."""

    def __init__(self, function: Callable[[Any], Any], place: Any, here: bool):
        self.function, self.place, self.here = function, place, here

    def __call__(self, item: Any) -> Any:
        with self.place(), relayed_logs():
            try:
                found = self.function(item)
            except Exception as error:
                return Failed(message=str(error), data=error if self.here else _sendable(error))
        if isinstance(found, Ended):
            if found.error is not None:
                found = found if self.here else Ended(found.results, _sendable(found.error))
                return Failed(message=str(found.error), data=found)
            last = next(reversed(found.results.values()), {})
            return Completed(name="Completed", message=str(last.get("uri", "")), data=found)
        return found


def _sendable(error: Exception) -> Exception:
    """The error as another process can read it."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        words = str(error) or type(error).__name__
        return (
            PipelineError(words)
            if isinstance(error, PipelineError)
            else TrainingError(f"{type(error).__name__}: {words}")
        )


def _end_of(future: Any, item: Any) -> Any:
    """What came of a task: what it returned, or its error. A worker that is lost fails only the work that it had."""
    future.wait()
    if future.state.is_final():
        return _value(future.state)
    lost = future.wrapped_future.exception()
    error = TrainingError(
        f"its Dask worker was lost ({type(lost).__name__}: {lost}); the same command goes on from what was saved"
    )
    return Ended(error=error) if isinstance(item, Work) else error


def _value(state: Any) -> Any:
    """What the task of a final state returned, or the error that it raised."""
    value = state.data
    value = getattr(value, "result", value)
    if value is None and not state.is_completed():
        return state.result(raise_on_failure=False)
    return value


def _said(value: Any) -> str:
    error = value if isinstance(value, BaseException) else getattr(value, "error", None)
    return "done" if error is None else f"failed: {error}"
