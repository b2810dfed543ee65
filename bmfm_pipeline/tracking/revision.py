"""Which revision of the code runs, when it runs from a git checkout."""

import subprocess
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def git_revision() -> dict[str, str]:
    """{"commit": 40 hex digits, "branch": name, "dirty": "true" or "false"}; empty for an installed wheel or without git.

    A package that merely lies inside someone's checkout (a virtual environment in it, say) is not that checkout's code.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {}
    branch = _git("rev-parse", "--abbrev-ref", "HEAD") or ""
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit, "branch": branch, "dirty": str(dirty).lower()}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
