"""When to stop: signals, a parent that is gone, and agreement on it between the processes of one training. Light to import."""

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time

IS_FIRST = int(os.environ.get("RANK", "0")) == 0
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Set by SIGTERM or SIGINT, or when the parent's end of the pipe on stdin closes because the parent is gone."""

    asked: float | None = None  # when, by time.monotonic()

    def __init__(self):
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """Ask to stop; the first reason is the one that is told."""
        if self.reason is None:
            self.asked = time.monotonic()
        self.reason = self.reason or reason

    def watch(self) -> None:
        """Take over SIGTERM and SIGINT; to be repeated after something else has taken them."""

        def on_signal(number, frame):
            self.ask(signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    def watch_parent(self) -> None:
        def read():
            # The descriptor itself: a buffered reader would hold a lock that aborts the interpreter when it shuts down.
            with contextlib.suppress(OSError):  # no stdin at all is no parent either
                while os.read(0, 4096):
                    pass
            self.ask("the parent process is gone")

        threading.Thread(target=read, daemon=True, name="parent-watch").start()
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # torchrun stands between: the pipe stays open when only torchrun dies.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Agreement:
    """A yes or no that holds for all processes of a training: where one says yes, all do, at the same step."""

    def any(self, *wishes: bool) -> tuple[bool, ...]:
        """Each of `wishes`, or what another process wishes. Every process must ask equally often."""
        import torch
        from torch import distributed

        from bmfm_pipeline.training.together import host_group, several_processes

        if not several_processes():
            return wishes
        flags = torch.tensor([float(wish) for wish in wishes])
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=host_group())
        return tuple(bool(flag) for flag in flags)


def emit(event: dict, every_process: bool = False) -> None:
    """One line to the parent, from the first process only unless said otherwise; a parent that is gone is noticed elsewhere."""
    if not (IS_FIRST or every_process):
        return
    try:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    emit({"kind": "note", "message": text})


class EventLog(logging.Handler):
    """Log records as events, so that the parent has each at its level in the log of its run; stderr has them too."""

    def emit(self, record: logging.LogRecord) -> None:
        emit({"kind": "log", "level": record.levelname.lower(), "message": record.getMessage()})
