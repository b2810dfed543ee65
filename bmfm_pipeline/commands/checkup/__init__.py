"""What a run would meet on this machine, each thing as a finding: ok, warn or fail, and how to mend it."""

from collections.abc import Iterator

from bmfm_pipeline.commands.checkup.findings import FAIL, OK, WARN, Finding, guarded
from bmfm_pipeline.storage import Workspace

__all__ = ["FAIL", "OK", "WARN", "Finding", "check_all", "guarded"]


def check_all(workspace: Workspace) -> Iterator[Finding]:
    """Every finding, in the order in which a person would mend them; a check that breaks is a finding too."""
    from bmfm_pipeline.commands.checkup import libraries, machine, places, servers

    yield from guarded("libraries", libraries.check)
    yield from guarded("machine", machine.check)
    yield from guarded("workspace", lambda: places.check(workspace))
    yield from guarded("servers", lambda: servers.check(workspace))
