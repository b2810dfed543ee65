"""deployments/workers.sh and deployments/slurm: what they start, with which GPU, and what a signal or an exit code makes of it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

DEPLOYMENTS = Path(__file__).resolve().parents[2] / "deployments"
# Stand for programs that a machine without GPUs and without a batch system lacks; each notes how it was called.
NOTE = 'echo "$(basename "$0") $* gpus=${CUDA_VISIBLE_DEVICES-unset}" >> "$NOTES"\n'
WAITS = NOTE + 'trap "exit ${ON_TERM:-0}" TERM\nwhile :; do sleep 0.05; done\n'


@pytest.fixture
def place(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "notes").touch()
    return tmp_path


def program(place: Path, name: str, body: str) -> None:
    path = place / "bin" / name
    path.write_text("#!/usr/bin/env bash\n" + body)
    path.chmod(0o755)


def start(place: Path, script: str, *words: str, **environment: str) -> subprocess.Popen:
    hidden = ("CUDA_VISIBLE_DEVICES", "GPUS", "CPU_RUNS", "PREFECT_API_URL", "BMFM_WORKSPACE")
    known = {name: value for name, value in os.environ.items() if name not in hidden}
    known |= {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "NOTES": str(place / "notes"),
        "BMFM_WORKSPACE": "s3://bucket/work",
    }
    return subprocess.Popen(
        ["bash", str(DEPLOYMENTS / script), *words],
        env=known | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def notes(place: Path, count: int) -> list[str]:
    """The calls so far, once there are `count` of them."""
    until = time.monotonic() + 20
    while len(lines := (place / "notes").read_text().splitlines()) < count and time.monotonic() < until:
        time.sleep(0.02)
    assert len(lines) == count, lines
    return sorted(lines)


SERVER = {"PREFECT_API_URL": "http://127.0.0.1:4200/api"}


def test_each_gpu_gets_a_worker_that_sees_no_other_and_all_end_with_the_script(place):
    program(place, "prefect", WAITS)
    program(place, "nvidia-smi", "printf '0\\n1\\n'\n")
    script = start(place, "workers.sh", **SERVER)
    cpu, first, second = notes(place, 3)
    assert "--pool cpu" in cpu and "--limit 2" in cpu and cpu.endswith("gpus=")
    for gpu, line in enumerate((first, second)):
        assert "--pool gpu" in line and "--limit 1" in line and f"-gpu-{gpu} " in line and line.endswith(f"gpus={gpu}")
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=20)
    assert script.returncode == 143
    with pytest.raises(ProcessLookupError):  # nobody of its session is left
        os.killpg(script.pid, 0)


def test_only_gpus_that_this_shell_may_use_or_names_get_workers(place):
    program(place, "prefect", WAITS)
    script = start(place, "workers.sh", CUDA_VISIBLE_DEVICES="2,5", CPU_RUNS="0", **SERVER)
    assert [line.rsplit("gpus=")[1] for line in notes(place, 2)] == ["2", "5"]
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=20)
    script = start(place, "workers.sh", GPUS="", CPU_RUNS="0", **SERVER)
    assert "nothing to start" in script.communicate(timeout=20)[1] and script.returncode == 2


def test_workers_can_be_interrupted_although_they_run_in_the_background(place):
    program(
        place,
        "prefect",
        'trap "echo stopped >> $NOTES; exit 0" INT\ntrap "kill -INT $$" TERM\n'
        + NOTE
        + "while :; do sleep 0.05; done\n",
    )
    script = start(place, "workers.sh", GPUS="0", CPU_RUNS="0", **SERVER)
    notes(place, 1)
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=20)
    assert "stopped" in notes(place, 2)


def test_the_end_of_one_worker_is_the_end_of_all_so_that_a_supervisor_notices(place):
    program(place, "prefect", NOTE + 'case "$*" in *gpu-1*) sleep 0.2; exit 3;; esac\n' + WAITS.removeprefix(NOTE))
    script = start(place, "workers.sh", GPUS="0 1", **SERVER)
    assert "ended with code 3" in script.communicate(timeout=20)[1] and script.returncode == 3
    with pytest.raises(ProcessLookupError):
        os.killpg(script.pid, 0)


@pytest.mark.parametrize(
    ("script", "missing"), [("workers.sh", "PREFECT_API_URL"), ("slurm/pretrain.sbatch", "BMFM_WORKSPACE")]
)
def test_what_must_be_named_is_asked_for(place, script, missing):
    said = start(place, script, **{missing: ""})
    assert missing in said.communicate(timeout=20)[1] and said.returncode != 0


def slurm(place: Path, **environment: str) -> subprocess.Popen:
    program(place, "scontrol", NOTE)
    return start(place, "slurm/pretrain.sbatch", "zheng68k", SLURM_JOB_ID="77", SLURM_GPUS_ON_NODE="4", **environment)


def test_a_batch_job_that_is_told_its_time_is_over_saves_and_is_queued_again(place):
    program(place, "bmfm", WAITS)
    job = slurm(place, ON_TERM="75")
    assert notes(place, 1) == ["bmfm pretrain zheng68k task.devices=4 gpus=unset"]
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=20)
    assert job.returncode == 75
    assert "scontrol requeue 77 gpus=unset" in notes(place, 2)


@pytest.mark.parametrize("code", [0, 2])
def test_a_batch_job_that_is_finished_or_wrong_is_not_queued_again(place, code):
    program(place, "bmfm", NOTE + f"exit {code}\n")
    job = slurm(place, STAGE="finetune")
    job.communicate(timeout=20)
    assert job.returncode == code
    assert notes(place, 1) == ["bmfm finetune zheng68k task.devices=4 gpus=unset"]


def test_seeds_run_as_an_array_each_with_its_number(place):
    program(place, "bmfm", NOTE + 'test -n "$BMFM_STATE"\n')
    job = start(place, "slurm/seeds.sbatch", "zheng68k", SLURM_JOB_ID="78", SLURM_ARRAY_TASK_ID="3")
    job.communicate(timeout=20)
    assert job.returncode == 0
    assert notes(place, 1) == ["bmfm run zheng68k seed.seed_value=3 gpus=unset"]
