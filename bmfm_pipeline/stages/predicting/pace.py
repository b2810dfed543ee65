"""How fast a prediction goes, and how long it still takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Pace:
    """Turns counts of cells, or of what `observed` says, into progress with cells per second and the time that is left."""

    total: int
    tell: Callable[[dict[str, Any]], None]
    first: int = 0
    observed: str = "cells"
    began: float = field(default_factory=time.monotonic)

    def __call__(self, done: int) -> None:
        event = {"kind": "progress", "stage": "predict", "step": done, "max_steps": self.total}
        spent = time.monotonic() - self.began
        if done > self.first and spent > 0:
            rate = (done - self.first) / spent
            event |= {"cells_per_s": rate, "observed": self.observed, "eta_s": (self.total - done) / rate}
        self.tell(event)
