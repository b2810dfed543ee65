"""The lock files: every package by hash, at the versions that pyproject.toml asks for, and nothing missing for what each is installed for."""

import re
import tomllib
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
ENTRY = re.compile(r"^([a-z0-9-]+(?:\[[a-z0-9,-]+\])?)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


def script():
    spec = spec_from_file_location("lock", TOP / ".ci" / "lock.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCK = script()
FILES = (*LOCK.EXTRAS, LOCK.BUILD)


def entries(path: Path) -> dict[str, str]:
    return {name: version for name, version, _ in ENTRY.findall(path.read_text())}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_is_a_pinned_version_with_hashes_or_the_heading(path):
    left = ENTRY.sub("", path.read_text())
    assert [line for line in left.splitlines() if line] == [f"# {LOCK.HEADERS[path]}"]
    names = [name for name, _, _ in ENTRY.findall(path.read_text())]
    assert names == sorted(set(names)) and names


def test_what_pyproject_asks_for_is_locked_at_a_version_that_it_allows():
    runtime = entries(LOCK.RUNTIME)
    for path, extras in LOCK.EXTRAS.items():
        known = runtime | entries(path)
        asked = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
        for line in (*PROJECT["dependencies"], *asked):
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name in LOCK.EXEMPT:
                continue
            assert name in known, f"{name} is in none of {LOCK.RUNTIME.name}, {path.name}: run `make lock`"
            assert requirement.specifier.contains(known[name]), (
                f"{requirement}, locked is {known[name]}: run `make lock`"
            )
        assert not LOCK.EXEMPT & set(known)


def test_nothing_that_a_locked_package_needs_is_missing():
    for extras in (LOCK.EXTRAS[LOCK.RUNTIME], LOCK.EXTRAS[LOCK.TEST]):
        path = next(path for path, names in LOCK.EXTRAS.items() if names == extras)
        known = set(entries(LOCK.RUNTIME)) | set(entries(path))
        assert set(LOCK.needed(extras)) <= known


def test_images_are_locked_for_workers_of_docker_and_kubernetes_and_for_postgres():
    names = set(entries(LOCK.IMAGE))
    assert {"prefect-docker", "prefect-kubernetes", "psycopg2-binary"} <= names
    if find_spec("prefect_kubernetes"):
        assert set(LOCK.needed(LOCK.EXTRAS[LOCK.IMAGE])) <= names | set(entries(LOCK.RUNTIME))


def test_one_package_has_one_version_in_all_files():
    seen: dict[str, str] = {}
    for path in FILES:
        for name, version in entries(path).items():
            assert seen.setdefault(name, version) == version, name


def test_the_environment_that_runs_the_tests_is_the_one_that_is_locked():
    different = {}
    for path in (LOCK.RUNTIME, LOCK.TEST):
        for name, version in entries(path).items():
            installed = LOCK.installed_as(name.partition("[")[0]).version
            if installed != version:
                different[name] = (installed, version)
    assert not different, "run `make venv`, or `make lock` where the installed versions are the right ones"
