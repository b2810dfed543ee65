"""Python and the libraries: the versions that this package was run with, and combinations that are known not to work."""

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from bmfm_pipeline.commands.checkup.findings import FAIL, OK, WARN, Finding

SHOWN = ("torch", "pytorch-lightning", "transformers", "anndata", "scanpy", "numpy", "prefect", "mlflow", "fastapi")
PYTHON = (3, 11)
REINSTALL = "run `make venv`, or install requirements.lock into a new environment"
# (library, versions, what goes wrong, how bad).
KNOWN = (
    ("fastapi", ">=0.155", "Prefect's server does not start with it", FAIL),
    ("fastapi", ">=0.151,<0.155", "Prefect's server refuses deployments with it", FAIL),
    (
        "lightning",
        ">=0",
        "it is the same library under another name; trainings that mix both end with a TypeError",
        WARN,
    ),
    ("litdata", ">=0", "it brings a torchvision that does not fit torch, and breaks the import of Lightning", WARN),
)


def check() -> Iterator[Finding]:
    found = sys.version_info[:2]
    said = f"{platform.python_version()} at {sys.executable}"
    if found == PYTHON:
        yield Finding("Python", OK, said)
    else:
        yield Finding("Python", FAIL, said, f"Python {PYTHON[0]}.{PYTHON[1]} is needed: make PYTHON=python3.11 venv")
    for name in SHOWN:
        yield _library(name)
    yield from known_trouble()
    yield _torch()


def _library(name: str) -> Finding:
    """A library against what this package asks for; torch counts by its number, whatever it was built for."""
    wanted = _wanted(name)
    try:
        here = version(name)
    except PackageNotFoundError:
        return Finding(name, FAIL, "not installed", REINSTALL)
    if wanted is None or wanted.contains(here, prereleases=True):
        return Finding(name, OK, here)
    status = FAIL if name in ("torch", "prefect", "mlflow", "fastapi") else WARN
    return Finding(name, status, f"{here}, where {wanted} was tested", f"pip install '{name}{wanted}', or {REINSTALL}")


def _wanted(name: str):
    """What this package asks of a library, as versions; None where it asks nothing."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in requires("bmfm-pipeline") or ()]
    except PackageNotFoundError:
        return None
    return next((one.specifier for one in asked if one.name == name and one.marker is None), None)


def known_trouble() -> Iterator[Finding]:
    """One finding for each known bad library that is installed."""
    from packaging.specifiers import SpecifierSet

    for name, versions, trouble, status in KNOWN:
        try:
            here = version(name)
        except PackageNotFoundError:
            continue
        if SpecifierSet(versions).contains(here, prereleases=True):
            wanted = _wanted(name)
            mend = f"pip install '{name}{wanted}'" if wanted else f"pip uninstall {name}"
            yield Finding(f"{name} {here}", status, trouble, mend)


def _torch() -> Finding:
    """Whether torch can be imported at all: a wrong CUDA library or a half-done installation shows here first."""
    try:
        import torch
    except Exception as error:
        return Finding("import torch", FAIL, f"{type(error).__name__}: {str(error)[:300]}", REINSTALL)
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    return Finding("import torch", OK, f"works; built {built}, {torch.get_num_threads()} threads")
