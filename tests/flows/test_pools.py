"""deployments/pools: the job templates, against Prefect's own worker classes, docker-py, and the schemas of Kubernetes."""

import asyncio
import json
from importlib.util import find_spec
from types import SimpleNamespace
from uuid import uuid4

import jsonschema
import pytest

from bmfm_pipeline import __version__
from flows import deployments, pools

FILES = {path.stem: json.loads(path.read_text()) for path in sorted(pools.FOLDER.glob("*.json"))}
NEEDS = {"process": "prefect", "docker": "prefect_docker", "kubernetes": "prefect_kubernetes"}


def requires(module: str):
    return pytest.mark.skipif(
        find_spec(module) is None, reason=f"{module} is not installed (make docker-check does it)"
    )


def with_worker_of(kind: str, *more: str):
    return pytest.param(kind, marks=[requires(name) for name in (NEEDS[kind], *more)], id=kind)


def prepared(configuration: type, template: dict, **values):
    """The job that a worker makes of a template for one run of a deployment with these job variables."""
    from prefect.client.schemas.objects import FlowRun

    nobody = SimpleNamespace()  # the client: asked only where a template refers to blocks of a server
    made = asyncio.run(configuration.from_template_and_values(template, values, client=nobody))
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="pretrain-zheng68k"))
    return made


def test_there_is_a_template_for_every_type_of_worker_and_every_pool_of_the_deployments():
    used = {spec["work_pool"]["name"] for spec in deployments.deployments()}
    assert used == set(pools.POOLS)
    assert set(FILES) == {f"{kind}-{pool}" for kind in pools.KINDS for pool in pools.POOLS}


@pytest.mark.parametrize("pool", pools.POOLS)
@pytest.mark.parametrize("kind", [with_worker_of(kind) for kind in pools.KINDS])
def test_the_committed_files_are_what_this_version_of_prefect_and_its_integrations_ask_for(kind, pool):
    assert (pools.FOLDER / f"{kind}-{pool}.json").read_text() == pools.render(kind, pool), "run `python -m flows.pools`"


@pytest.mark.parametrize("name", FILES)
def test_prefect_accepts_a_pool_with_the_template_and_all_defaults_fit_their_form(name):
    from prefect.client.schemas.actions import WorkPoolCreate

    template = FILES[name]
    WorkPoolCreate(name=name, type=name.partition("-")[0], base_job_template=template)
    form = template["variables"]
    jsonschema.Draft202012Validator.check_schema(form)
    given = {key: entry["default"] for key, entry in form["properties"].items() if entry.get("default") is not None}
    jsonschema.validate(given, form)
    assert given["env"]["DO_NOT_TRACK"] == "1"


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("process")])
def test_images_are_those_of_this_version(name):
    image = FILES[name]["variables"]["properties"]["image"]["default"]
    assert image == f"bmfm-pipeline:{__version__}-{name.partition('-')[2]}"


def test_a_process_sees_the_gpus_that_its_worker_was_given(monkeypatch):
    from prefect.workers.process import ProcessJobConfiguration

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    job = prepared(ProcessJobConfiguration, FILES["process-gpu"])
    assert job.env["CUDA_VISIBLE_DEVICES"] == "3"
    assert job.env["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert (
        prepared(ProcessJobConfiguration, FILES["process-gpu"], env={"CUDA_VISIBLE_DEVICES": "5"}).env[
            "CUDA_VISIBLE_DEVICES"
        ]
        == "5"
    )


def container(template: dict, **values) -> dict:
    """What docker-py sends to the engine."""
    from docker.models.containers import _create_container_args
    from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration

    job = prepared(DockerWorkerJobConfiguration, template, **values)
    settings = DockerWorker._build_container_settings(SimpleNamespace(), SimpleNamespace(), job)
    settings.pop("extra_hosts")
    return _create_container_args(settings | {"version": "1.47"})


@requires("prefect_docker")
def test_a_docker_job_gets_its_gpu_shared_memory_volumes_and_no_privileges():
    sent = container(FILES["docker-gpu"])
    host = sent["host_config"]
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 0, "DeviceIDs": ["0"], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert host["ShmSize"] == 8 * 2**30 and host["Memory"] == 32 * 2**30 and host["Init"] is True
    assert (
        host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"] and not host.get("Privileged")
    )
    assert "bmfm-data:/data" in host["Binds"] and "/etc/bmfm/secrets:/run/secrets:ro" in host["Binds"]
    assert sent["image"] == f"bmfm-pipeline:{__version__}-gpu"
    assert sent["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"


@requires("prefect_docker")
def test_a_docker_pool_of_another_gpu_differs_by_one_variable_and_a_cpu_job_asks_for_none():
    sent = container(FILES["docker-gpu"], gpu_device_ids=["2"], shared_memory="16g")
    assert sent["host_config"]["DeviceRequests"][0]["DeviceIDs"] == ["2"]
    assert sent["host_config"]["ShmSize"] == 16 * 2**30
    assert "DeviceRequests" not in container(FILES["docker-cpu"])["host_config"]


def manifest(template: dict, **values) -> dict:
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    return prepared(KubernetesWorkerJobConfiguration, template, **values).job_manifest


@requires("prefect_kubernetes")
@requires("kubernetes_validate")
@pytest.mark.parametrize("pool", pools.POOLS)
def test_kubernetes_accepts_the_job(pool):
    import kubernetes_validate

    job = manifest(FILES[f"kubernetes-{pool}"])
    with pytest.raises(kubernetes_validate.ValidationError, match="completions"):
        kubernetes_validate.validate(job, "1.33", strict=True)
    # Prefect insists on these two in the pod, where they belong to the job; Kubernetes ignores them there, and 1 is its default.
    for field in ("completions", "parallelism"):
        assert job["spec"]["template"]["spec"].pop(field) == 1
    kubernetes_validate.validate(job, "1.33", strict=True)


@requires("prefect_kubernetes")
def test_a_kubernetes_job_asks_for_what_the_deployment_says():
    job = manifest(
        FILES["kubernetes-gpu"],
        gpus=2,
        node_selector={"gpu": "h100"},
        shared_memory="16Gi",
        secrets="ours",
        memory_limit="64Gi",
    )
    pod = job["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    assert only["resources"]["limits"] == {"nvidia.com/gpu": 2, "memory": "64Gi"}
    assert only["envFrom"] == [{"configMapRef": {"name": "bmfm"}}, {"secretRef": {"name": "ours", "optional": True}}]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "bmfm-data"}
    assert pod["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == pools.USER
    assert {"name": "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "value": "reschedule"} in only["env"]
    assert job["metadata"]["namespace"] == "bmfm"


@requires("prefect_kubernetes")
def test_a_kubernetes_job_of_the_cpu_pool_takes_no_gpu_and_no_node_that_has_one():
    pod = manifest(FILES["kubernetes-cpu"])["spec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]
    assert pod["tolerations"] == []
