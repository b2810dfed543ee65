"""deployments/pools: the job templates of the work pools, for workers that start processes, Docker containers or Kubernetes jobs.

Each is the template of Prefect's own worker with what these jobs need: image, GPUs, shared memory, secrets, volumes, node selectors, limits.
Run `python -m flows.pools` after a new version of Prefect or its integrations (extras docker and kubernetes); a test finds what differs.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmfm_pipeline import __version__

FOLDER = Path(__file__).resolve().parents[1] / "deployments" / "pools"
POOLS = ("cpu", "gpu")
USER = 10001  # of the images
SILENT = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
}
# A server that is restarted or upgraded may be away for eight minutes (2 + 4 + ... + 256 s) before a run gives up on telling it something.
PATIENT = {"PREFECT_CLIENT_MAX_RETRIES": "8"}
# A training that is stopped finishes its step, saves and leaves within 25 s.
GRACE_SECONDS = 60
Template = dict[str, Any]


def process(pool: str) -> Template:
    """Runs are processes of the worker's machine and see what it sees: its environment, and of GPUs those in CUDA_VISIBLE_DEVICES."""
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    _defaults(template, env=SILENT | PATIENT)
    return template


def docker(pool: str) -> Template:
    """Runs are containers beside those of docker/compose.yaml: on its network and volume, with secrets from files of the host."""
    from prefect_docker.worker import DockerWorker

    template = DockerWorker.get_default_base_job_template()
    variables = template["variables"]["properties"]
    _defaults(
        template,
        image=_image(pool),
        image_pull_policy="IfNotPresent",
        networks=["bmfm"],
        volumes=["bmfm-data:/data", "/etc/bmfm/secrets:/run/secrets:ro"],
        mem_limit="32g" if pool == "gpu" else "8g",
        env=SILENT
        | PATIENT
        | {
            "PREFECT_API_URL": "http://prefect:4200/api",
            "MLFLOW_TRACKING_URI": "http://mlflow:5000",
            "AWS_ENDPOINT_URL_S3": "http://s3:8333",
            "AWS_DEFAULT_REGION": "us-east-1",
            "BMFM_WORKSPACE": "s3://bmfm/workspace",
        },
    )
    variables["volumes"]["description"] += (
        " Files in /run/secrets become environment variables of their names, such as AWS_SECRET_ACCESS_KEY."
    )
    # What would be said here is said by the variables below, and a free form would replace the limits.
    del variables["container_create_kwargs"]
    variables["shared_memory"] = {
        "title": "Shared Memory",
        "type": "string",
        "description": "Size of /dev/shm, through which batches travel from loader processes to training.",
        "default": "8g" if pool == "gpu" else "1g",
    }
    settings: Template = {
        "shm_size": "{{ shared_memory }}",
        "init": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }
    if pool == "gpu":
        variables["gpu_device_ids"] = {
            "title": "GPUs",
            "type": "array",
            "items": {"type": "string"},
            "description": "Numbers or UUIDs of the host's GPUs that the container sees. Docker hands out none by itself: a pool for each GPU.",
            "default": ["0"],
        }
        settings["device_requests"] = [
            {"driver": "nvidia", "device_ids": "{{ gpu_device_ids }}", "capabilities": [["gpu"]]}
        ]
    template["job_configuration"]["container_create_kwargs"] = settings
    return template


def kubernetes(pool: str) -> Template:
    """Runs are jobs of a cluster, of one pod that asks for GPUs, and is tried again elsewhere when its node is drained."""
    from prefect_kubernetes.worker import KubernetesWorker

    template = KubernetesWorker.get_default_base_job_template()
    gpu = pool == "gpu"
    _defaults(
        template,
        namespace="bmfm",
        image=_image(pool),
        finished_job_ttl=86400,
        pod_watch_timeout_seconds=1800,  # a GPU may be long in coming, and an image of some gigabytes too
        cpu_request="4" if gpu else "2",
        memory_request="32Gi" if gpu else "8Gi",
        memory_limit="32Gi" if gpu else "8Gi",
        env=SILENT | PATIENT,
    )
    template["variables"]["properties"] |= _kubernetes_variables(gpu)
    _complete_job(template["job_configuration"]["job_manifest"]["spec"], gpu)
    return template


def _kubernetes_variables(gpu: bool) -> Template:
    def variable(title: str, kind: str, default: Any, description: str, **more: Any) -> Template:
        return {"title": title, "type": kind, "default": default, "description": description, **more}

    texts = {"additionalProperties": {"type": "string"}}
    found = {
        "secrets": variable(
            "Secrets",
            "string",
            "bmfm",
            "Secret whose keys become environment variables, such as AWS_SECRET_ACCESS_KEY and PREFECT_API_KEY. It may be absent.",
        ),
        "settings": variable(
            "Settings",
            "string",
            "bmfm",
            "ConfigMap whose keys become environment variables: MLFLOW_TRACKING_URI, and BMFM_WORKSPACE where it is not /data/workspace.",
        ),
        "shared_memory": variable(
            "Shared Memory", "string", "8Gi" if gpu else "1Gi", "Size of /dev/shm; what is used of it counts as memory of the pod."
        ),
        "claim": variable(
            "Claim", "string", "bmfm-data",
            "PersistentVolumeClaim at /data, ReadWriteMany where runs use several nodes. It holds checkpoints while training lasts, so that a "
            "run whose pod is gone can go on in another.",
        ),
        "image_pull_secrets": variable(
            "Image Pull Secrets", "array", [], "Names of secrets for the registry.",
            items={"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        ),
        "node_selector": variable("Node Selector", "object", {}, "Labels that the node must have.", **texts),
        "tolerations": variable(
            "Tolerations", "array",
            [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if gpu else [],
            "Taints of nodes that are accepted.", items={"type": "object"},
        ),
    }  # fmt: skip
    if gpu:
        found["gpus"] = variable("GPUs", "integer", 1, "GPUs of one node for the run.", minimum=1)
    return found


def _complete_job(job: Template, gpu: bool) -> None:
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    container["envFrom"] = [
        # Not optional: without MLFLOW_TRACKING_URI every node would write to one SQLite file.
        {"configMapRef": {"name": "{{ settings }}"}},
        {"secretRef": {"name": "{{ secrets }}", "optional": True}},
    ]
    container["volumeMounts"] = [
        {"name": "data", "mountPath": "/data"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if gpu:
        container["resources"]["limits"]["nvidia.com/gpu"] = "{{ gpus }}"
    pod |= {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "imagePullSecrets": "{{ image_pull_secrets }}",
        "nodeSelector": "{{ node_selector }}",
        "tolerations": "{{ tolerations }}",
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": "{{ claim }}"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "{{ shared_memory }}"}},
        ],
    }


def _image(pool: str) -> str:
    return f"bmfm-pipeline:{__version__}-{pool}"


def _defaults(template: Template, **values: Any) -> None:
    for name, value in values.items():
        template["variables"]["properties"][name]["default"] = value


KINDS: dict[str, Callable[[str], Template]] = {"process": process, "docker": docker, "kubernetes": kubernetes}


def render(kind: str, pool: str) -> str:
    """The text of deployments/pools/KIND-POOL.json."""
    return json.dumps(KINDS[kind](pool), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        for pool in POOLS:
            (FOLDER / f"{kind}-{pool}.json").write_text(render(kind, pool), encoding="utf-8")
    print(f"{FOLDER}: {len(KINDS) * len(POOLS)} job templates", file=sys.stderr)
