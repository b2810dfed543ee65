"""What a run says while it works: a progress bar on a terminal, plain lines elsewhere; and the table at its end. All on stderr."""

import logging
import sys
import time
from typing import Any

LINE_EVERY = 15.0  # seconds between plain progress lines


class Terminal(logging.Handler):
    """Receives the events of stages and the log records of the library. Use as a context manager."""

    def __init__(self, stream=None):
        super().__init__(logging.INFO)
        self._stream = stream or sys.stderr
        self._bars = None
        self._bar = None
        self._stage, self._began = "", 0.0
        self._said_at = 0.0
        self._said: set[str] = set()

    def __enter__(self) -> "Terminal":
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = [TextColumn("{task.description:<22}"), BarColumn(30), TextColumn("{task.fields[said]}")]
            self._bars = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._bars.start()
        logger = logging.getLogger("bmfm_pipeline")
        logger.addHandler(self)
        logger.propagate = False
        return self

    def __exit__(self, *error) -> None:
        self._finish_bar()
        if self._bars is not None:
            self._bars.stop()
        logger = logging.getLogger("bmfm_pipeline")
        logger.removeHandler(self)
        logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        self._once(record.getMessage(), "warning: " if record.levelno >= logging.WARNING else "")

    def say(self, text: str) -> None:
        """One line, above the progress bar when there is one."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _once(self, text: str, before: str = "") -> None:
        """What the log and an event both say is shown once."""
        if text not in self._said:
            self._said.add(text)
            self.say(f"  {before}{text}")

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event of a stage: its begin, a step, progress, a validation, a note."""
        kind = event.get("kind")
        with self.lock:  # several trainings may tell at the same time
            if kind == "stage":
                self._begin_stage(event)
            elif kind == "step":
                self._begin_step(event["stage"], event["step_name"], event.get("of", ""))
            elif kind == "progress":
                self._progress(event)
            elif kind == "note":
                self._once(event["message"])
            elif kind == "log":
                grave = event.get("level") not in ("debug", "info")
                self._once(event["message"], "warning: " if grave else "")

    def _begin_stage(self, event: dict[str, Any]) -> None:
        self._finish_stage()
        of, name = event.get("of", ""), event["stage"]
        self._stage, self._began = name, time.monotonic()
        if of or event["cached"]:  # of several at the same time nobody knows which one has ended
            self._stage = ""
        name = f"{name} ({of})" if of else name
        self.say(f"{name}: reused ({event['reason']})" if event["cached"] else f"{name}: {event['reason']}")

    def _begin_step(self, stage: str, step: str, of: str = "") -> None:
        self._finish_bar()
        self._said_at = time.monotonic()
        if self._bars is not None:
            self._bar = self._bars.add_task(f"{stage}: {step}", total=None, said="")
        else:
            self.say(f"  {of}: {step}" if of else f"  {step}")

    def _progress(self, event: dict[str, Any]) -> None:
        done, total = event["step"], event.get("max_steps")
        words = [f"{done}/{total}" if total else str(done)]
        if event.get("loss") is not None:
            words.append(f"loss {event['loss']:.4g}")
        if event.get("cells_per_s"):
            words.append(f"{event['cells_per_s']:.0f} {event.get('observed', 'cells')}/s")
        if event.get("eta_s") is not None:
            words.append(f"{event['eta_s']:.0f} s left")
        said = ", ".join(words)
        now = time.monotonic()
        if self._bar is not None:
            self._bars.update(self._bar, completed=done, total=total, said=said)
        elif self._bars is None and now - self._said_at > LINE_EVERY:
            self._said_at = now
            self.say(f"    {said}")

    def _finish_bar(self) -> None:
        if self._bars is not None and self._bar is not None:
            self._bars.remove_task(self._bar)
        self._bar = None

    def _finish_stage(self) -> None:
        self._finish_bar()
        if self._stage:
            self.say(f"  {self._stage} done in {time.monotonic() - self._began:.0f} s")
        self._stage = ""

    def finish(self) -> None:
        """Call when the last stage has ended well."""
        self._finish_stage()
