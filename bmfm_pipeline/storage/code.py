"""The version of the code that makes an artefact: sources a stage really imports, and the libraries that shape its numbers."""

import ast
import functools
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bmfm_pipeline.storage.hashing import hash_bytes, hash_json

PACKAGE = "bmfm_pipeline"
NUMERIC_LIBRARIES = ("torch", "numpy", "scanpy", "anndata")
_ROOT = Path(__file__).resolve().parents[1]


def library_versions() -> dict[str, str]:
    found = {}
    for name in NUMERIC_LIBRARIES:
        try:
            found[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            found[name] = "absent"
    return found


@functools.cache
def code_version(module: str) -> str:
    """Hash of `module`, of every module of this package that it imports directly or not (lazy imports too), and of library versions."""
    sources = {name: hash_bytes(path.read_bytes()) for name, path in sorted(transitive_imports(module).items())}
    return hash_json({"sources": sources, "libraries": library_versions()})


def transitive_imports(module: str) -> dict[str, Path]:
    """{module name: source file} of `module` and of what it imports from this package, found by reading the sources."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if path is None or name in found:
            continue
        found[name] = path
        waiting.extend(_imports(name, path))
    return found


def _source(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != PACKAGE or len(parts) == 1:  # the package itself only names its lazy exports
        return None
    base = _ROOT.joinpath(*parts[1:])
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@functools.cache
def _imports(module: str, path: Path) -> tuple[str, ...]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.FunctionDef) and node.name == "__getattr__" and path.name == "__init__.py":
            # A room that exports its names lazily: whoever imports the room may reach any of its modules.
            names += [f"{module}.{file.stem}" for file in path.parent.glob("*.py") if file.stem != "__init__"]
            names += [f"{module}.{file.parent.name}" for file in path.parent.glob("*/__init__.py")]
    return tuple(name for name in names if name.split(".")[0] == PACKAGE)
