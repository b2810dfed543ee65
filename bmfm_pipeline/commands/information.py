"""`bmfm doctor`: what a run would meet on this machine, and how to mend it."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from bmfm_pipeline.commands.checkup import FAIL, OK, WARN, Finding, check_all
from bmfm_pipeline.storage import Workspace

MARKS = {OK: "ok  ", WARN: "WARN", FAIL: "FAIL"}


class Diagnosis(dict):
    """{"status": the worst of all, "checks": [{name, status, found, mend}]}; `exit_code` is 1 when something must be mended."""

    exit_code = 0


def doctor(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check versions, machine, workspace and servers; a line each as soon as it is known."""
    found: list[Finding] = []
    with _answering_now():
        for finding in check_all(Workspace()):
            found.append(finding)
            if not arguments.json:
                print(f"{MARKS[finding.status]}  {finding.name:<22} {finding.found}", flush=True)
                if finding.mend:
                    print(f"      {'':<22} -> {finding.mend}", flush=True)
    worst = next((status for status in (FAIL, WARN) if any(one.status == status for one in found)), OK)
    if not arguments.json:
        counts = {status: sum(one.status == status for one in found) for status in (FAIL, WARN)}
        print(_verdict(counts), flush=True)
    diagnosis = Diagnosis(status=worst, checks=[vars(one) for one in found])
    diagnosis.exit_code = 1 if worst == FAIL else 0
    return diagnosis


@contextlib.contextmanager
def _answering_now() -> Iterator[None]:
    """A store that is away is not waited for, unless somebody says how often it is tried."""
    if "BMFM_RETRIES" in os.environ:
        yield
        return
    os.environ["BMFM_RETRIES"] = "1"
    try:
        yield
    finally:
        del os.environ["BMFM_RETRIES"]


def _verdict(counts: dict[str, int]) -> str:
    if counts[FAIL]:
        return f"{counts[FAIL]} to mend before a run" + (f", {counts[WARN]} to look at" if counts[WARN] else "")
    return f"ready; {counts[WARN]} to look at" if counts[WARN] else "ready"
