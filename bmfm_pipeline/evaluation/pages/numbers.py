"""Numbers as pages show them, and what they count."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def number(value: float | None) -> str:
    """Three decimals, four digits for what they would not show; a dash for what is not defined."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.4g}"


def with_interval(entry: dict[str, Any] | None) -> str:
    """'0.812 [0.790, 0.834]' of {value, ci_low, ci_high}, without the bounds where there are none; '-' where it is not defined."""
    if entry is None:
        return ""
    if entry.get("value") is None:
        return "-"
    if entry.get("ci_low") is None or entry.get("ci_high") is None:
        return number(entry["value"])
    return f"{number(entry['value'])} [{number(entry['ci_low'])}, {number(entry['ci_high'])}]"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def size(bytes_taken: float | None) -> str:
    if not bytes_taken:
        return "–"
    unit, name = next(((unit, name) for unit, name in UNITS if bytes_taken >= unit), (1, "B"))
    return f"{bytes_taken / unit:.3g} {name}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def counted(rows: list[dict[str, Any]]) -> str:
    """What the n of a target's rows counts."""
    notes = {row.get("note") or "" for row in rows}
    usual = next((row["of"] for row in rows if row.get("of")), "cells")
    return next((word for word in ("positions", "perturbations") if any(word in note for note in notes)), usual)


_OBSERVED: ContextVar[str] = ContextVar("observed", default="cells")


def observed() -> str:
    """What is evaluated, as pages call it: cells, unless `observing` says otherwise."""
    return _OBSERVED.get()


@contextmanager
def observing(what: str) -> Iterator[None]:
    """Pages and charts made within speak of `what`."""
    token = _OBSERVED.set(what)
    try:
        yield
    finally:
        _OBSERVED.reset(token)
