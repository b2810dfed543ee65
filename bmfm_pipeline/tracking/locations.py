"""Where runs are recorded: the tracking address, the database and artifact folder behind the default one, and whether it answers."""

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PROBE_SECONDS = 3.0
# Where `bmfm ui` serves a store that has no server of its own.
LOCAL_PAGE = "http://127.0.0.1:5000"
# Telemetry off; and an unreachable server delays a run by seconds, where MLflow's own defaults are minutes.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(state_dir: str | os.PathLike) -> str:
    """$MLFLOW_TRACKING_URI, else a SQLite file under `state_dir`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(state_dir).absolute() / 'mlflow.db'}"


def is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def database_file(uri: str) -> Path | None:
    """The file behind a SQLite address, or None for any other store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri[len("sqlite:///") :].split("?", 1)[0]).absolute()


def artifact_folder(uri: str) -> str | None:
    """Artifacts of a SQLite store lie beside its file; a server decides for itself."""
    database = database_file(uri)
    if database is None:
        return None
    return (database.parent / f"{database.stem}-artifacts").as_uri()


def set_environment() -> None:
    """Must run before mlflow is imported; values that the user set stay."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def probe(uri: str) -> None:
    """Raise OSError when nothing listens at an http address: known in `PROBE_SECONDS`, before mlflow is imported."""
    if not is_http(uri):
        return
    parts = urlsplit(uri)
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname or ""):
        return  # reachable only through the proxy, which a bare connection cannot tell
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), PROBE_SECONDS).close()


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of a run: on its server, or where `bmfm ui` shows a store that has none."""
    base = uri.rstrip("/") if is_http(uri) else LOCAL_PAGE
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}"


def serving_command(uri: str, host: str, port: int) -> list[str]:
    """The command that shows the store at `uri` as pages: MLflow's own server, with one worker."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        str(port),
    ]
    folder = artifact_folder(uri)
    return [*command, "--workers", "1", *(["--default-artifact-root", folder] if folder else [])]
