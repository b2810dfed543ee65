"""docker/entrypoint.sh, healthcheck.py and prepare.py, run as the images run them but outside a container."""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parents[2] / "docker"


def enter(*words: str, **environment: str) -> subprocess.CompletedProcess:
    known = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["sh", str(DOCKER / "entrypoint.sh"), *words],
        env=known | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def secrets(tmp_path):
    folder = tmp_path / "secrets"
    folder.mkdir()
    return folder


def test_any_command_runs_with_its_arguments_as_they_are_and_its_exit_code():
    said = enter("sh", "-c", 'printf "<%s>" "$@"; exit 75', "sh", "two words", "$HOME", "a=b", BMFM_SECRETS="/nowhere")
    assert said.returncode == 75
    assert said.stdout == "<two words><$HOME><a=b>"


def test_secrets_in_files_become_variables_and_nothing_in_them_is_carried_out(secrets):
    (secrets / "AWS_SECRET_ACCESS_KEY").write_text("s3cr3t $(touch /tmp/x) 'quoted'\n")
    (secrets / "readme.txt").write_text("no secret")
    (secrets / "..data").mkdir()  # as Kubernetes mounts them
    said = enter("sh", "-c", 'printf %s "$AWS_SECRET_ACCESS_KEY"; env', BMFM_SECRETS=str(secrets))
    assert said.stdout.startswith("s3cr3t $(touch /tmp/x) 'quoted'")
    assert "no secret" not in said.stdout


def test_a_role_that_says_too_little_is_told_what_is_missing():
    said = enter("worker", BMFM_SECRETS="/nowhere")
    assert said.returncode == 2 and "worker cpu" in said.stderr


def test_roles_become_the_servers_they_are_named_after(tmp_path):
    for name in ("prefect", "mlflow"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    worker = enter("worker", "gpu", "--limit", "1", PATH=path).stdout.split()
    assert worker[:2] == ["prefect", "--no-prompt"] and worker[2:6] == ["worker", "start", "--pool", "gpu"]
    assert (
        worker[-2:] == ["--limit", "1"] and "--with-healthcheck" in worker and "--no-create-pool-if-not-found" in worker
    )
    assert enter("prefect-server", PATH=path).stdout == "prefect --no-prompt server start --host 0.0.0.0\n"
    assert enter("mlflow-server", PATH=path).stdout == "mlflow server --host 0.0.0.0\n"


def test_a_worker_that_is_stopped_takes_its_container_along_only_when_its_training_has_saved(tmp_path):
    (tmp_path / "training").write_text("#!/bin/sh\nsleep 1.5\ntouch saved\n")
    (tmp_path / "prefect").write_text(
        "#!/usr/bin/env bash\ntrap 'exit 3' INT\ntrap 'kill -INT $$' TERM\n(setsid training &)\ntouch started\nwhile :; do sleep 0.05; done\n"
    )
    for name in ("training", "prefect"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BMFM_SECRETS": "/nowhere"}
    process = subprocess.Popen(["sh", str(DOCKER / "entrypoint.sh"), "worker", "gpu"], env=environment, cwd=tmp_path)
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == 3
    assert (tmp_path / "saved").exists()


@pytest.fixture
def prepare(monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    spec = spec_from_file_location("prepare", DOCKER / "prepare.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_buckets_are_made_once_and_only_for_addresses_on_s3(prepare, capsys):
    import boto3
    from moto import mock_aws

    with mock_aws():
        for uri in ("s3://bmfm/workspace", "s3://bmfm/workspace", "s3://mlflow/artifacts", "/data/workspace", ""):
            prepare.make_bucket(uri)
        made = boto3.client("s3").list_buckets()["Buckets"]
    assert [bucket["Name"] for bucket in made] == ["bmfm", "mlflow"]
    assert capsys.readouterr().out.count("made") == 2


class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Page) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def health(url: str | None) -> int:
    # A proxy that does not exist: the check must go past it.
    environment = {"PATH": os.environ["PATH"], "http_proxy": "http://127.0.0.1:9"} | (
        {"HEALTH_URL": url} if url else {}
    )
    return subprocess.run(
        [sys.executable, str(DOCKER / "healthcheck.py")], env=environment, capture_output=True, check=False
    ).returncode


def test_a_container_is_healthy_while_its_page_answers_and_one_without_a_page_always(server):
    assert health(f"{server}/health") == 0
    assert health(f"{server}/broken") == 1
    assert health("http://127.0.0.1:9/health") == 1
    assert health(None) == 0
