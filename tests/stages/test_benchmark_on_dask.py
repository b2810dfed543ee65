"""The cells of a benchmark on a Dask cluster of this machine, against the same cells one after the other without Prefect."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_benchmark import AS_FINISHED

from bmfm_pipeline.config.suites import load_suite
from bmfm_pipeline.stages.benchmark_plan import plan_benchmark
from bmfm_pipeline.stages.benchmark_running import run_benchmark
from bmfm_pipeline.storage import load_artefact, read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_cluster_makes_the_same_artefacts_with_the_same_numbers(tmp_path, finished, monkeypatch):
    pytest.importorskip("prefect_dask")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "two.yaml"
    models = [
        {"name": "trained", "overrides": ["finetune.trainer.learning_rate=0.002", "finetune.task.max_steps=5"]},
        {"name": "tested", "overrides": ["evaluate.task.num_bootstrap_runs=150"]},
    ]
    datasets = [{"dataset": str(finished.file), "name": "mini", "label": "celltype"}]
    fewer = ["evaluate.evaluation.controls=[majority]"]
    path.write_text(
        yaml.safe_dump({"name": "two", "datasets": datasets, "models": models, "overrides": [*AS_FINISHED, *fewer]})
    )
    there = tmp_path / "there" / "workspace"
    shutil.copytree(finished.workspace, there)

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "BMFM_"))}
    environment |= {"HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    command = [Path(sys.executable).parent / "bmfm", "benchmark", path, "fan_out=dask", "parallel=2"]
    done = subprocess.run(
        [*command, "--workspace", there, "--json"], env=environment, capture_output=True, text=True, timeout=800, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    spread = json.loads(done.stdout.splitlines()[-1])
    assert "mini, trained, seed 1234: done" in done.stderr, "the parent says when a piece of work has ended"

    here = run_benchmark(plan_benchmark(load_suite(str(path)), workspace=finished.workspace))
    assert list(spread["cells"]) == [cell.name for cell in here.plan.cells] and not here.failed
    for cell in here.plan.cells:
        ours, theirs = (load_artefact(uri) for uri in (cell.evaluation.uri, spread["cells"][cell.name]))
        assert ours.key == theirs.key and theirs.uri.startswith(str(there))
        metrics = [read_json(artefact.local_file("metrics.json")) for artefact in (ours, theirs)]
        for own, other in zip(*metrics, strict=True):
            assert own.keys() == other.keys() and own["metric"] == other["metric"] and own["model"] == other["model"]
            # Linear models of other processes differ in their last digits.
            for name in ("value", "ci_low", "ci_high"):
                assert (
                    own[name] == other[name]
                    if own["model"] == "model"
                    else own[name] == pytest.approx(other[name], rel=1e-3)
                )
        models = [load_artefact(job.uri) for job in (cell.jobs[-2],)]
        weights = {name: entry["sha256"] for name, entry in models[0].files.items() if name.endswith(".safetensors")}
        twin = load_artefact(models[0].uri.replace(finished.workspace, str(there)))
        assert weights and weights == {name: twin.files[name]["sha256"] for name in weights}
    assert Path(spread["benchmark"]).name == Path(here.table["uri"]).name
