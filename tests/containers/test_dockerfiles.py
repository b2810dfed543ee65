"""docker/Dockerfile.*: pinned bases, a user without rights, nothing fetched around the locks; and docker/compose.yaml against its schema."""

import json
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import pytest
import yaml

from bmfm_pipeline import __version__

TOP = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((TOP / "docker").glob("Dockerfile.*"))
COMPOSE = yaml.safe_load((TOP / "docker" / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("bmfm-pipeline:")]


def steps(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def of(path: Path, instruction: str) -> list[str]:
    return [rest for word, rest in steps(path) if word == instruction]


each = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def test_there_is_an_image_for_each_kind_of_worker():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@each
def test_bases_are_pinned_to_a_patch_release_of_the_python_that_the_project_wants(path):
    bases = of(path, "FROM")
    assert len(bases) == 2 and bases[0].endswith(" AS build")
    for base in bases:
        assert re.match(r"python:3\.11\.\d+-slim-[a-z]+\b", base)
    assert PROJECT["requires-python"] == ">=3.11,<3.12"


@each
def test_the_last_stage_runs_as_a_numbered_user_with_a_health_check_and_labels(path):
    words = [word for word, _ in steps(path)]
    last = words[len(words) - words[::-1].index("FROM") :]
    assert "USER" in last and last.index("USER") > last.index("COPY")
    assert of(path, "USER") == ["10001:10001"]  # by number: Kubernetes can tell that it is not root
    assert "HEALTHCHECK" in last and "LABEL" in last
    assert f'org.opencontainers.image.version="{__version__}"' in of(path, "LABEL")[0]
    for entry in of(path, "ENTRYPOINT") + of(path, "CMD"):
        assert json.loads(entry)  # without a shell that would keep signals to itself


@each
def test_packages_come_by_hash_but_for_torch_at_the_version_of_the_project(path):
    installed = [step for step in of(path, "RUN") if "pip install" in step]
    for step in installed:
        by_hash = "--require-hashes" in step and "--no-deps" in step
        itself = "--no-deps --no-build-isolation ." in step
        assert by_hash or itself or '"torch==$TORCH"' in step, step
    (version,) = [rest.removeprefix("TORCH=") for rest in of(path, "ARG") if rest.startswith("TORCH=")]
    assert f"torch=={version.partition('+')[0]}" in PROJECT["dependencies"]
    assert version.endswith("+cpu") == (path.suffix == ".cpu")


@each
def test_nothing_else_is_fetched_and_package_lists_do_not_stay(path):
    text = path.read_text()
    assert not of(path, "ADD")
    assert not re.search(r"\b(curl|wget|git clone)\b|:latest\b", text)
    for step in of(path, "RUN"):
        if "apt-get" in step:
            assert "--no-install-recommends" in step and "rm -rf /var/lib/apt/lists/*" in step


@each
def test_all_that_is_copied_exists_and_reaches_the_build(path):
    sent = [line[1:] for line in (TOP / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for rest in of(path, "COPY"):
        if "--from=" in rest:
            continue
        for source in [word for word in rest.split() if not word.startswith("--")][:-1]:
            assert (TOP / source).exists(), source
            assert any(Path(source).match(pattern) for pattern in sent), (
                f"{source} is kept from the build by .dockerignore"
            )


def test_both_images_differ_in_torch_and_compilers_only():
    cpu, gpu = (
        {(word, part.strip()) for word, rest in steps(path) for part in re.split(r"  +", rest)} for path in DOCKERFILES
    )
    different = cpu ^ gpu
    assert different
    for _, part in different:
        assert re.search(r"TORCH|\bapt\b|NVIDIA|image\.title", part), part


@pytest.mark.skipif(find_spec("check_jsonschema") is None, reason="check-jsonschema is not installed")
def test_compose_accepts_the_file():
    import check_jsonschema

    schema = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(COMPOSE, json.loads(schema.read_text()))


def test_everything_listens_on_loopback_only():
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_images_are_pinned_and_ours_have_no_rights_to_spare():
    for name, service in SERVICES.items():
        assert re.search(
            r":(\$\{BMFM_VERSION:-" + re.escape(__version__) + r"\}-[cg]pu|[\w.-]*\d[\w.-]*)$", service["image"]
        ), name
        if name in OURS:
            assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
            assert service["build"]["dockerfile"] == f"docker/Dockerfile.{service['image'][-3:]}"
            assert service["init"] is True
    assert set(OURS) == {"prefect", "mlflow", "setup", "worker-cpu", "worker-gpu"}


def test_whoever_waits_for_a_service_waits_until_it_is_healthy_or_done():
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            if needed == "setup":
                assert how["condition"] == "service_completed_successfully"
            else:
                assert how["condition"] == "service_healthy", (name, needed)
                assert "healthcheck" in SERVICES[needed] or SERVICES[needed]["environment"]["HEALTH_URL"]


def test_the_gpu_worker_has_its_gpu_reserved_and_starts_when_asked_for():
    worker = SERVICES["worker-gpu"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and len(device["device_ids"]) == 1
    assert worker["profiles"] == ["gpu"] and worker["command"] == ["worker", "gpu", "--limit", "1"]
    assert worker["shm_size"] == "8gb"


def test_secrets_come_from_the_environment_file_which_holds_none_and_names_all_that_is_asked_for():
    text = (TOP / "docker" / "compose.yaml").read_text()
    example = dict(line.split("=", 1) for line in (TOP / "docker" / ".env.example").read_text().splitlines() if "=" in line and line[0] != "#")  # fmt: skip
    asked = set(re.findall(r"\$\{(\w+)", text)) - {"BMFM_VERSION"}
    assert asked == set(example)
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert {name for name, value in example.items() if not value} == required
    assert "docker/.env" in (TOP / ".gitignore").read_text().splitlines()


def test_volumes_keep_what_must_outlive_a_container():
    named = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if volume[0] != "."
    }
    assert named == set(COMPOSE["volumes"]) == {"postgres", "s3", "data"}
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (TOP / "docker" / volume.partition(":")[0]).is_file() and volume.endswith(":ro")
