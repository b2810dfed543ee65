"""Write the lock files from what is installed in this environment, with the hashes of every file of each release.

Run by `make lock`. Versions come from the environment, not from a new resolution, so that what was run together is what is locked; the
hashes come from the package index by `uv`, for all platforms. torch is left out: its CPU and CUDA builds are different files.
"""

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parents[1]
# In each file: the extras whose requirements it adds to those of the files before it.
RUNTIME, TEST, IMAGE = TOP / "requirements.lock", TOP / "requirements-test.lock", TOP / "docker" / "requirements.lock"
BUILD = TOP / "requirements-build.lock"
# Build backends of this package and of dependencies that are published as source only.
BUILD_TOOLS = ("setuptools",)
EXTRAS = {RUNTIME: ("hvg", "interpret"), TEST: ("test",), IMAGE: ("docker", "kubernetes", "servers")}
EXEMPT = {"torch"}
HEADERS = {
    RUNTIME: "What the package needs, but for torch. Written by `make lock`; installed with --require-hashes --no-deps.",
    TEST: "What the tests need beside requirements.lock. Written by `make lock`.",
    IMAGE: "What the images need beside requirements.lock. Written by `make lock`.",
    BUILD: "What builds this package, and dependencies that are published as source. Written by `make lock`.",
}


installed_as = cache(distribution)


def needed(extras: Iterable[str]) -> dict[str, str]:
    """Name -> installed version of all that the package with these extras needs, torch and what only its CUDA builds need left out."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
    todo = [Requirement(line) for line in (*project["dependencies"], *lines)]
    found: dict[str, str] = {}
    seen = set()
    while todo:
        requirement = todo.pop()
        name, chosen = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, chosen) in seen or name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        seen.add((name, chosen))
        installed = installed_as(name)
        if name not in EXEMPT:
            found[name] = installed.version
        children = map(Requirement, installed.requires or ())
        todo += [
            child for child in children
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in ("", *chosen))
        ]  # fmt: skip
    return found


def locked(versions: dict[str, str]) -> str:
    """The lines of a lock file: each pinned version with the sha256 of every file of that release."""
    pinned = "\n".join(f"{name}=={version}" for name, version in sorted(versions.items()))
    uv = [sys.executable, "-m", "uv"] if len(sys.argv) < 2 else [sys.argv[1]]
    options = ("--no-deps", "--generate-hashes", "--no-header", "--no-annotate", "--quiet", "--python", sys.executable)
    return subprocess.run(
        [*uv, "pip", "compile", *options, "-"], input=pinned, text=True, check=True, capture_output=True, cwd="/"
    ).stdout


def main() -> None:
    known: dict[str, str] = {}
    for path, extras in EXTRAS.items():
        versions = {name: version for name, version in needed(extras).items() if name not in known}
        path.write_text(f"# {HEADERS[path]}\n{locked(versions)}", encoding="utf-8")
        if path == RUNTIME:
            known = versions
        print(f"{path.relative_to(TOP)}: {len(versions)} packages")
    tools = {name: installed_as(name).version for name in BUILD_TOOLS}
    BUILD.write_text(f"# {HEADERS[BUILD]}\n{locked(tools)}", encoding="utf-8")


if __name__ == "__main__":
    main()
