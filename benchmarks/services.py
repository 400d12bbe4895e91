"""A remote behind the S3 API, a tracking server on PostgreSQL that ten stages log to at once, and
the commands of the plan for ImageNet-1k in docs/scaling.md, on digits.

pip install 'moto[server]' dvc-s3 psycopg2-binary    # and PostgreSQL's programs on the PATH
python benchmarks/services.py            # print what was found
python benchmarks/services.py --write    # and keep it in benchmarks/services.md

Everything runs in a temporary folder and on the loopback, and is stopped at the end.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from machine import commit, cores

STAGES = 10
EPOCHS = 4
BUCKET = "bucket"
CHAMPION = "models:/fmce-net@champion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the tables")
    given = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ |= {"OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that servers stop, too
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # the database runs as another user
        store = stack.enter_context(object_store())
        address = stack.enter_context(database(folder))
        parts = remote(folder, store), tracking(folder, address), plan(folder, store, address)
        text = "\n".join([head(), *parts])
    print(text)
    if given.write:
        Path(__file__).with_suffix(".md").write_text(text)


def head() -> str:
    """What was measured, where."""
    return f"""# A remote and a tracking server

`python benchmarks/services.py --write`; {cores()}; commit {commit()}; everything \
on the loopback of one machine, so that network and disk of real services are not in it.
"""


def run(folder: Path, *words: str, **variables: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def new_project(folder: Path) -> Path:
    """A repository with this pipeline, and a short training."""
    new_repository(folder)
    shorten(folder, seed=0)
    save(folder)
    return folder


def new_repository(folder: Path) -> Path:
    """A repository with this pipeline as it comes."""
    folder.mkdir(parents=True)
    run(folder, "git", "init", "-q")
    run(folder, "fmce-ops", "init")
    return folder


def shorten(project: Path, seed: int) -> None:
    """A short training of its own."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["data"]["per_class"] = 60
    params["train"] |= {"epochs": EPOCHS, "seed": seed}
    params["markers"]["phases"] = 2
    path.write_text(yaml.safe_dump(params))


def save(folder: Path) -> None:
    """Commit all."""
    run(folder, "git", "add", "-A")
    author = ("-c", "user.name=A user", "-c", "user.email=user@example.org")
    run(folder, "git", *author, "commit", "-q", "-m", "save")


def free_port() -> int:
    """That nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def server(words: list[str], port: int, **options: Any) -> Iterator[None]:
    """A process that is up once it listens; it is stopped by its process id, children too."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )
    try:
        wait_for(port, process)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens; two minutes at most."""
    for _ in range(600):
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit(f"{process.args} did not start")


@contextmanager
def object_store() -> Iterator[str]:
    """The S3 API with one bucket, `BUCKET`; its address."""
    import boto3

    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    with server(words, port):
        url = f"http://127.0.0.1:{port}"
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
        yield url


def add_remote(project: Path, store: str) -> None:
    """The bucket, as DVC's default remote."""
    run(project, "dvc", "remote", "add", "-d", "store", f"s3://{BUCKET}/{project.name}")
    run(project, "dvc", "remote", "modify", "store", "endpointurl", store)
    save(project)


def remote(folder: Path, store: str) -> str:
    """Push the FMCS shards to S3, clone elsewhere, pull; compare, and time."""
    project = new_project(folder / "project")
    run(project, "dvc", "repro", "features")
    add_remote(project, store)
    pushed = seconds(lambda: run(project, "dvc", "push"))
    clone = project.with_name("clone")
    run(project, "git", "clone", "-q", str(project), str(clone))
    pulled = seconds(lambda: run(clone, "dvc", "pull", "--allow-missing"))
    run(clone, "fmce-ops", "shards", "verify")
    status = run(clone, "dvc", "status", "features").strip()
    assert "up to date" in status, status
    again = seconds(lambda: run(project, "dvc", "push"))
    size = sum(file.stat().st_size for file in (clone / "data/fmcs").iterdir()) / 2**20
    whole = sum(f.stat().st_size for f in (project / ".dvc/cache").rglob("*") if f.is_file())
    return f"""## `dvc push` and `pull` against an S3 API

moto's server; {whole / 2**20:.0f} MiB of outputs, of them {size:.0f} MiB of FMCS shards. The \
clone's shards are verified byte by byte, and its `dvc status` is clean.

| | seconds | MiB/s |
|---|---|---|
| `dvc push` | {pushed:.1f} | {whole / 2**20 / pushed:.0f} |
| `dvc pull --allow-missing` in a fresh clone | {pulled:.1f} | {whole / 2**20 / pulled:.0f} |
| `dvc push` with nothing new | {again:.1f} | |
"""


@contextmanager
def database(folder: Path) -> Iterator[str]:
    """A PostgreSQL of its own; its address."""
    port, data = free_port(), folder / "postgres"
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    data.mkdir()
    if user:
        shutil.chown(data, "postgres")
    made = ["initdb", "-D", str(data), "-U", "fmce", "--auth=trust"]
    subprocess.run(made, check=True, capture_output=True, cwd=data, **user)
    words = ["postgres", "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(data)]
    with server(words, port, cwd=data, **user):
        yield f"postgresql+psycopg2://fmce@127.0.0.1:{port}/postgres"


@contextmanager
def tracking_server(address: str, artifacts: str, *words: str, **variables: str) -> Iterator[str]:
    """``mlflow server`` on the database; its address."""
    port = free_port()
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    command += ["--backend-store-uri", address, "--artifacts-destination", artifacts, *words]
    command += ["--allowed-hosts", f"127.0.0.1:{port}"]
    with server(command, port, env={**os.environ, **variables}):
        uri = f"http://127.0.0.1:{port}"
        wait_until_healthy(uri)
        yield uri


def tracking(folder: Path, address: str) -> str:
    """Ten trainings log at once to a server over HTTP; nothing may be lost."""
    with tracking_server(address, str(folder / "artifacts")) as uri:
        return trainings(folder, uri)


def trainings(folder: Path, uri: str) -> str:
    """One alone, ten with stores of their own, and ten to the server."""
    alone = new_project(folder / "alone")
    run(alone, "fmce-ops", "prepare", MLFLOW_TRACKING_URI=uri)
    single = seconds(lambda: run(alone, "fmce-ops", "train", MLFLOW_TRACKING_URI=uri))
    projects = [copy(alone, folder / f"stage{seed}", seed) for seed in range(1, STAGES + 1)]
    local = seconds(lambda: at_once(projects, {}))
    for project in projects:
        shutil.rmtree(project / "data/checkpoints")
        shutil.rmtree(project / ".fmce")
    served = seconds(lambda: at_once(projects, {"MLFLOW_TRACKING_URI": uri}))
    points = {project.name: points_of(project) for project in projects}
    found = recorded(uri)
    wrong = [name for name, losses in points.items() if losses not in found]
    assert not wrong, f"{wrong} are not on the server as they are in losses.csv"
    return f"""## MLflow over HTTP with PostgreSQL, {STAGES} stages at once

`mlflow server` with two workers on PostgreSQL; {STAGES} `fmce-ops train` of \
{EPOCHS} epochs on digits, each in a project of its own and with its own seed. \
All {STAGES} runs are FINISHED on the server, each with the very losses of its `losses.csv`.

| | seconds |
|---|---|
| one training, alone, to the server | {single:.1f} |
| {STAGES} at once, each to a store of its own (SQLite) | {local:.1f} |
| {STAGES} at once, to the one server | {served:.1f} |
| server over own stores | {served / local:.2f} |
"""


def plan(folder: Path, store: str, address: str) -> str:
    """The plan's commands in its order, two processes in place of its machines and GPUs."""
    project = new_repository(folder / "plan")
    save(project)
    add_remote(project, store)
    shared = folder / "plan.git"
    run(folder, "git", "clone", "-q", "--bare", str(project), str(shared))
    run(project, "git", "remote", "add", "origin", str(shared))
    artifacts = f"s3://{BUCKET}/mlflow"
    with tracking_server(address, artifacts, MLFLOW_S3_ENDPOINT_URL=store) as uri:

        def step(*words: str) -> str:
            return run(project, *words, MLFLOW_TRACKING_URI=uri)

        def processes(port: int, *words: str) -> str:
            fabric = ["fabric", "run", "--accelerator", "cpu", "--strategy", "ddp"]
            fabric += ["--main-port", str(port), *words[:-1]]
            return step(*fabric, str(shutil.which("fmce-ops")), words[-1])

        step("dvc", "repro", "prepare")
        step("dvc", "push")
        port, nodes = free_port(), ("--num-nodes", "2", "--main-address", "127.0.0.1")
        with ThreadPoolExecutor() as machines:
            ranks = "01"
            list(machines.map(lambda r: processes(port, *nodes, "--node-rank", r, "train"), ranks))
        step("dvc", "commit", "-f", "train")
        step("dvc", "repro", "markers")
        for stage in ("features", "fmce"):
            processes(free_port(), "--devices", "2", stage)
            step("dvc", "commit", "-f", stage)
        step("dvc", "push")
        save(project)
        step("git", "push", "-q", "origin", "HEAD")
        status = step("dvc", "status", "fmce")
        assert "up to date" in status, status
        judged = json.loads(step("fmce-ops", "evaluate", "--model-uri", CHAMPION, "--json"))
    clone = folder / "elsewhere"
    run(folder, "git", "clone", "-q", str(shared), str(clone))
    run(clone, "dvc", "pull", "data/images.h5", "data/fmcs")
    run(clone, "fmce-ops", "shards", "verify")
    return f"""## The plan for ImageNet-1k, on digits

The commands of [the plan](../docs/scaling.md#a-plan-for-imagenet-1k) in its order, with a process \
on the CPU in place of each GPU, all on one machine, and the parameters that `fmce-ops init` \
writes: `dvc repro prepare`, `dvc push`; `train` under two `fabric run`, of one process each and \
with `--num-nodes 2`, that share a folder; `dvc repro markers`; `features` and `fmce` under \
`fabric run --devices 2`, and `dvc commit -f` behind all three; `dvc push`, `git push`. Outputs \
and models lie behind the S3 API, runs and registry in PostgreSQL behind `mlflow server`. \
Afterwards \
`dvc status fmce` is clean, `fmce-ops evaluate --model-uri {CHAMPION}` loads the registered model \
and judges {judged["accuracy"]:.1%} of {judged["count"]} test maps right, and a clone that pulls \
`data/images.h5` and `data/fmcs` verifies every byte of the shards.
"""


def wait_until_healthy(uri: str) -> None:
    """The port is open before the database is laid out."""
    import urllib.error
    import urllib.request

    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"{uri} is not healthy")


def copy(project: Path, folder: Path, seed: int) -> Path:
    """The prepared project with another seed of training."""
    shutil.copytree(project, folder, symlinks=True)
    shorten(folder, seed)
    shutil.rmtree(folder / ".fmce", ignore_errors=True)
    return folder


def at_once(projects: list[Path], variables: dict[str, str]) -> None:
    """The stage train of all projects, side by side."""
    running = [
        subprocess.Popen(
            ["fmce-ops", "train"],
            cwd=project,
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for project in projects
    ]
    for process in running:
        error = process.communicate(timeout=900)[1].decode()
        if process.returncode:
            raise SystemExit(f"{process.args} failed: {error}")


def points_of(project: Path) -> list[float]:
    """The losses that a training wrote down."""
    rows = (project / "results/losses.csv").read_text().splitlines()
    column = rows[0].split(",").index("train_loss")
    return [float(row.split(",")[column]) for row in rows[1:]]


def recorded(uri: str) -> list[list[float]]:
    """The losses of every finished training that the server knows."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [found.experiment_id for found in client.search_experiments()]
    runs = client.search_runs(experiments, "attributes.status = 'FINISHED'")
    histories = [client.get_metric_history(found.info.run_id, "train/loss") for found in runs]
    return [[m.value for m in sorted(h, key=lambda m: m.step)] for h in histories if h]


if __name__ == "__main__":
    main()
