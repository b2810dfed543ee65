"""The servers that runs talk to: MLflow's store and Prefect's server, with its pools, workers and settings."""

import os
import sqlite3
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import urlsplit

from bmfm_pipeline.commands.checkup.findings import FAIL, OK, WARN, Finding, guarded
from bmfm_pipeline.commands.checkup.places import SKEW, skewed
from bmfm_pipeline.commands.listening import LOOPBACK, ask
from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage import Workspace, strip_userinfo
from bmfm_pipeline.tracking import check_store, database_file, is_http, tracking_uri


def check(workspace: Workspace) -> Iterator[Finding]:
    uri = tracking_uri(workspace.state_dir)
    yield from guarded("MLflow", lambda: _mlflow(uri))
    yield from guarded("Prefect", _prefect)
    yield from _proxies(uri)
    yield _telemetry()


def _mlflow(uri: str) -> Iterator[Finding]:
    shown = strip_userinfo(uri)
    mend = "start it (`bmfm ui` serves a local store), or correct or unset MLFLOW_TRACKING_URI; runs go on and send later what they record"
    if (database := database_file(uri)) is not None:
        yield _database(shown, database)
        return
    began = time.monotonic()
    try:
        check_store(uri)
    except StorageError as error:
        yield Finding("MLflow", FAIL, str(error), mend)
        return
    yield Finding("MLflow", OK, f"{shown}: answers in {time.monotonic() - began:.1f} s")
    if is_http(uri):
        yield from _mlflow_server(uri, shown)


def _database(shown: str, file) -> Finding:
    """A SQLite store is opened read-only: a check must not make or migrate it."""
    if not file.exists():
        return Finding("MLflow", OK, f"{shown}: made by the first run")
    aside = f"move {file} away: the next run makes a new one, and artefacts need none"
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5) as database:
            runs = database.execute("select count(*) from runs").fetchone()[0]
            state = database.execute("pragma quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        return Finding("MLflow", FAIL, f"{shown}: {error}", aside)
    if state != "ok":
        return Finding("MLflow", FAIL, f"{shown}: the database is damaged: {state}", aside)
    return Finding("MLflow", OK, f"{shown}: {runs:,} runs")


def _mlflow_server(uri: str, shown: str) -> Iterator[Finding]:
    yield from _clock("MLflow server", f"{uri.rstrip('/')}/health", shown)
    said, here = ask(f"{uri.rstrip('/')}/version").text, version("mlflow")
    if not said or "<" in said:
        return  # behind a proxy that hides it
    if said.split(".")[:2] != here.split(".")[:2]:
        yield Finding("MLflow server", WARN, f"{said}, where {here} is installed here", "run the same version on both")
    else:
        yield Finding("MLflow server", OK, said)


def _clock(name: str, url: str, shown: str) -> Iterator[Finding]:
    """Whether the clock of a server agrees with this machine's, by the date of its answer."""
    before = time.time()
    ahead = clock_ahead(ask(url).date, before, time.time())
    if ahead is not None and abs(ahead) > SKEW:
        yield skewed(name, f"the clock of {shown}", ahead)


def _prefect() -> Iterator[Finding]:
    from flows.local import user_has_a_server

    try:
        version("prefect")
    except PackageNotFoundError:
        return  # said already
    if not user_has_a_server():
        yield Finding(
            "Prefect", OK,
            "no server is named: each run starts its own. For deployments and schedules: `bmfm ui`, then PREFECT_API_URL",
        )  # fmt: skip
        return
    from flows.checkup import check as check_server

    for name, status, found, mend in check_server():
        yield Finding(name, status, found, mend)
    if address := os.environ.get("PREFECT_API_URL"):
        yield from _clock("Prefect server", f"{address.rstrip('/')}/health", strip_userinfo(address))


def clock_ahead(date: str | None, before: float, after: float) -> float | None:
    """Seconds that the sender of a Date header is ahead of this machine, which asked at `before` and had its answer at `after`."""
    try:
        there = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None
    return min(0.0, there + 1 - before) or max(0.0, there - after)


def _proxies(uri: str) -> Iterator[Finding]:
    """A proxy has no way to this machine's loopback."""
    proxied = os.environ.get("http_proxy") or os.environ.get("HTTP_PROXY")
    direct = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    named = {urlsplit(address).hostname for address in (uri, os.environ.get("PREFECT_API_URL", ""))}
    if proxied and (
        hidden := [host for host in LOOPBACK if host in named and host not in direct and "*" not in direct]
    ):
        yield Finding(
            "proxy", WARN, f"http_proxy is set, and no_proxy does not name {hidden[0]}: servers of this machine cannot be reached",
            f"export no_proxy={','.join(filter(None, [*direct, *hidden]))}",
        )  # fmt: skip


def _telemetry() -> Finding:
    """What bmfm itself starts sends nothing; what a person switched on by hand is theirs, and said."""
    from flows.local import QUIET

    switched = []
    for name, quiet in QUIET.items():
        asked = os.environ.get(name)
        truths = ("true", "1", "yes", "on")
        if asked is not None and quiet in ("true", "false", "1") and (asked.lower() in truths) != (quiet in truths):
            switched.append(f"{name}={asked}")
    if switched:
        return Finding("telemetry", WARN, f"switched on by {', '.join(switched)}", f"unset {' '.join(one.split('=')[0] for one in switched)}")  # fmt: skip
    return Finding("telemetry", OK, "off in what bmfm starts")
