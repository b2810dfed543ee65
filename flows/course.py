"""The course of a training, gathered from what it tells: its loss, its best validation, its speed. Plain values, as a line and as a page."""

import base64
import json
import math
from pathlib import Path
from typing import Any

from bmfm_pipeline.evaluation.pages.charts import curve_chart
from bmfm_pipeline.evaluation.pages.drawing import Drawing
from bmfm_pipeline.evaluation.pages.numbers import duration, number, percent

TRAIN, VALIDATION = "train/loss", "validation/loss"
BARS = "▁▂▃▄▅▆▇█"
SPARKS = 16  # characters of a sparkline
MOST_POINTS = 400
# Of the scores of the best validation, those that are shown: names end so.
SCORES = ("_accuracy", "_f1", "_pcc", "_mse")
MOST_SCORES = 6

Point = tuple[float, float]


class Points:
    """(step, value) in the order they come: all of them at first, then every second, fourth, ... so that days fit; and the last one."""

    def __init__(self):
        self._kept: list[Point] = []
        self._every, self._seen = 1, 0
        self._last: Point | None = None

    def add(self, step: float, value: float) -> None:
        self._last = (step, value)
        if self._seen % self._every == 0:
            self._kept.append(self._last)
        self._seen += 1
        if len(self._kept) > MOST_POINTS:
            self._kept, self._every = self._kept[::2], 2 * self._every

    def __len__(self) -> int:
        return self._seen

    @property
    def all(self) -> list[Point]:
        return self._kept if not self._kept or self._kept[-1] is self._last else [*self._kept, self._last]


class Course:
    """Takes the events of a training (bmfm_pipeline.training.callbacks), and those of any step that counts `step` of `max_steps`."""

    def __init__(self, before: Path | None = None):
        self._before = before
        self._series = {TRAIN: Points(), VALIDATION: Points()}
        self._best: tuple[float, float, dict[str, float]] | None = None
        self._validations = 0
        self._latest: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._ended = ""
        self.resumed_at: float | None = None

    @property
    def is_training(self) -> bool:
        """Whether there is a loss to show."""
        return len(self._series[TRAIN]) > 0

    @property
    def ended(self) -> bool:
        return bool(self._ended)

    def add(self, event: dict[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "start":
            self._facts |= {name: event[name] for name in ("parameters", "trained_parameters") if event.get(name)}
            self._read_before()
        elif kind == "validation":
            self._validated(event["step"], event["metrics"])
        elif kind == "done":
            self._ended = "finished"
            self._facts |= {name: event["summary"].get(name) for name in ("steps", "epochs", "cells_per_s")}
        elif kind == "preempted":
            self._ended = (
                f"stopped ({event.get('reason', 'no reason given')}) and saved; it goes on from there when tried again"
            )
        elif kind == "error":
            self._ended = f"ended by an error: {event.get('message', '')}"
        else:
            self._latest |= {name: value for name, value in event.items() if value is not None}
            if is_number(event.get("loss")) and is_number(event.get("step")):
                self._series[TRAIN].add(event["step"], event["loss"])

    def _read_before(self) -> None:
        """What was trained before this process began: the child has cut it to the checkpoint that it goes on from."""
        if self._before is None or not self._before.exists():
            return
        self._series = {name: Points() for name in self._series}
        self._best, self._validations = None, 0
        for line in self._before.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            step = entry.get("step")
            self.resumed_at = step if is_number(step) else self.resumed_at
            if is_number(entry.get(TRAIN)):
                self._series[TRAIN].add(step, entry[TRAIN])
            if VALIDATION in entry:
                self._validated(step, entry)

    def _validated(self, step: float, metrics: dict[str, Any]) -> None:
        self._validations += 1
        loss = metrics.get(VALIDATION)
        if not is_number(loss):
            return
        self._series[VALIDATION].add(step, loss)
        if self._best is None or loss < self._best[0]:
            scores = {
                name.removeprefix("validation/"): value
                for name, value in metrics.items()
                if name.startswith("validation/") and name.endswith(SCORES) and is_number(value)
            }
            self._best = (loss, step, dict(list(scores.items())[:MOST_SCORES]))

    @property
    def share(self) -> float | None:
        """How much is done, 0 to 1; None while nobody knows."""
        if self._ended == "finished":
            return 1.0
        if is_number(self._latest.get("fraction")):
            return min(1.0, max(0.0, self._latest["fraction"]))
        done, total = self._place()
        return min(1.0, max(0.0, done / total)) if is_number(done) and is_number(total) and total > 0 else None

    def _place(self) -> tuple[Any, Any]:
        latest = self._latest
        total = latest.get("max_steps") or latest.get("total_steps") or latest.get("total")
        return latest.get("step", latest.get("done")), total

    def _words(self) -> list[str]:
        done, total = self._place()
        latest, words = self._latest, []
        if is_number(done):
            words.append(f"step {done:,} of {total:,}" if is_number(total) else f"step {done:,}")
        if is_number(latest.get("epoch")):
            words.append(f"epoch {latest['epoch'] + 1}")
        if is_number(latest.get("cells_per_s")):
            words.append(f"{latest['cells_per_s']:,.4g} {latest.get('observed', 'cells')}/s")
        if is_number(latest.get("eta_s")) and not self._ended:
            words.append(f"about {duration(latest['eta_s'])} left")
        return words

    def line(self, spark: bool = True) -> str:
        """The course in one line; `spark` draws the loss with eight heights of a letter."""
        words = self._words()
        if points := self._series[TRAIN].all:
            drawn = f" {sparkline(points)}" if spark and len(points) > 2 else ""
            words.insert(min(2, len(words)), f"loss {number(points[-1][1])}{drawn}")
        if self._best is not None:
            words.append(f"best validation loss {number(self._best[0])} at step {self._best[1]:,}")
        if self._ended:
            words.append(self._ended)
        return ", ".join(words) or "working"

    def page(self, title: str, links: dict[str, str], updated: str) -> str:
        """Markdown: where the training is, the curve of its loss, numbers, and links by name."""
        series = {name: points.all for name, points in self._series.items() if len(points) > 1}
        parts = [f"### {title}", " · ".join(self._words()) or "working"]
        if self._ended:
            parts.append(f"**{self._ended[0].upper()}{self._ended[1:]}**")
        if TRAIN in series:
            parts.append(picture(curve_chart(list(series), series)))
        rows = "\n".join(f"| {name} | {_in_cell(value)} |" for name, value in self._rows())
        if rows:
            parts.append(f"| what | value |\n|---|---|\n{rows}")
        if links:
            parts.append(" · ".join(f"[{text}]({address})" for text, address in links.items()))
        return "\n\n".join([*parts, f"*{updated}*"]) + "\n"

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        if points := self._series[TRAIN].all:
            rows.append(("training loss", f"{number(points[-1][1])}; {number(points[0][1])} at step {points[0][0]:,}"))
        if self._best is not None:
            loss, step, scores = self._best
            rows.append(("best validation loss", f"{number(loss)} at step {step:,}; {self._validations} validations"))
            rows += [(f"{name} there", number(value)) for name, value in scores.items()]
        latest = self._latest
        if is_number(latest.get("cells_per_s")):
            waited = latest.get("loader_wait_share")
            said = f"; {percent(waited)} of the time waiting for data" if is_number(waited) else ""
            rows.append(("speed", f"{latest['cells_per_s']:,.4g} {latest.get('observed', 'cells')}/s{said}"))
        if parameters := self._facts.get("parameters"):
            trained = self._facts.get("trained_parameters", parameters)
            rows.append(
                ("parameters", f"{parameters:,}" + (f", {trained:,} of them trained" if trained != parameters else ""))
            )
        if self.resumed_at is not None:
            rows.append(("resumed", f"at step {self.resumed_at:,}"))
        return rows


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def sparkline(points: list[Point], width: int = SPARKS) -> str:
    """Values by step as at most `width` letters of eight heights, each the mean of its share of the steps."""
    width = min(width, len(points))
    first, span = points[0][0], (points[-1][0] - points[0][0]) or 1
    shares: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        shares[max(0, min(width - 1, int(width * (step - first) / span)))].append(value)
    means = [sum(share) / len(share) for share in shares if share]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def picture(drawing: Drawing) -> str:
    """A drawing as an image of markdown that carries its bytes: a page of Prefect shows it and asks nobody for it."""
    return embedded(drawing.about, drawing.svg(alone=True).encode())


def embedded(about: str, svg: bytes) -> str:
    words = about.replace("[", "(").replace("]", ")").replace("\n", " ")
    return f"![{words}](data:image/svg+xml;base64,{base64.b64encode(svg).decode()})"


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
