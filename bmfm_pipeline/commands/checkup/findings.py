"""One line of a check-up."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """`name`: what was looked at; `found`: what was there; `mend`: what to do about it, where something is wrong."""

    name: str
    status: str
    found: str
    mend: str = ""


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; what it raises is one more, so that the others are still made."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(name, FAIL, f"could not be checked: {type(error).__name__}: {error}", "see what it says")
