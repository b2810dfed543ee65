"""`bmfm deploy`: register what the catalogue asks for on a Prefect server, or show what that would change."""

import argparse
from typing import Any

from bmfm_pipeline.errors import ConfigError

POOL_TYPES = ("process", "docker", "kubernetes")


def deploy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the differences as a table of +, ~, - and =, and carry them out unless --dry-run."""
    types = _pool_types(arguments.pool)
    if arguments.gpus is not None and arguments.gpus < 1:
        raise ConfigError(f"--gpus {arguments.gpus}: must be 1 or more, the GPUs of all workers together")
    import os

    from flows.local import QUIET

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from flows import deploying

    found = deploying.deploy(
        arguments.names, dry_run=arguments.dry_run, gpus=arguments.gpus, pool_types=types, reset=arguments.reset,
        keep=arguments.keep,
    )  # fmt: skip
    if not arguments.json:
        print(describe(found))
    return found


def _pool_types(words: list[str]) -> dict[str, str]:
    types = {}
    for word in words:
        name, _, kind = word.partition("=")
        if kind not in POOL_TYPES:
            raise ConfigError(f"--pool {word}: write it as --pool NAME=TYPE, TYPE one of {', '.join(POOL_TYPES)}")
        types[name] = kind
    return types


def describe(found: dict[str, Any]) -> str:
    """The table, then what has happened in one sentence."""
    rows = found["rows"]
    kinds = max((len(row["kind"]) for row in rows), default=0)
    names = max((len(row["name"]) for row in rows), default=0)
    lines = [f"{row['change']} {row['kind']:<{kinds}}  {row['name']:<{names}}  {row['what']}" for row in rows]
    if not found["changed"]:
        lines.append(f"{found['server']} has what the catalogue asks for; nothing to change")
    elif found["dry_run"]:
        lines.append(f"{found['changed']} changes to {found['server']}; without --dry-run they are made")
    else:
        lines.append(f"{found['changed']} changes made to {found['server']}")
    return "\n".join(lines)
