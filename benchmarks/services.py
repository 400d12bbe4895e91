"""A remote behind the S3 API, and a tracking server on PostgreSQL that ten stages log to at once.

pip install 'moto[server]' dvc-s3 psycopg2-binary    # and PostgreSQL's programs on the PATH
python benchmarks/services.py            # print what was found
python benchmarks/services.py --write    # and keep it in benchmarks/services.md

Everything runs in a temporary folder and on the loopback, and is stopped at the end.
"""

import argparse
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

STAGES = 10
EPOCHS = 4


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
        project = new_project(folder / "project")
        text = "\n".join([head(), remote(project, stack), tracking(folder, stack)])
    print(text)
    if given.write:
        Path(__file__).with_suffix(".md").write_text(text)


def head() -> str:
    """What was measured, where."""
    return f"""# A remote and a tracking server

`python benchmarks/services.py --write`; {platform.machine()}, {os.cpu_count()} cores, everything \
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
    folder.mkdir(parents=True)
    run(folder, "git", "init", "-q")
    run(folder, "fmce-ops", "init")
    change(folder, seed=0)
    save(folder)
    return folder


def change(project: Path, seed: int) -> None:
    """A training of its own."""
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


def remote(project: Path, stack: ExitStack) -> str:
    """Push the FMCS shards to S3, clone elsewhere, pull; compare, and time."""
    import boto3

    port = free_port()
    stack.enter_context(
        server([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)
    )
    url = f"http://127.0.0.1:{port}"
    secrets = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    os.environ |= {**secrets, "AWS_DEFAULT_REGION": "us-east-1"}
    boto3.client("s3", endpoint_url=url).create_bucket(Bucket="shards")
    run(project, "dvc", "repro", "features")
    run(project, "dvc", "remote", "add", "-d", "store", "s3://shards/project")
    run(project, "dvc", "remote", "modify", "store", "endpointurl", url)
    save(project)
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


def tracking(folder: Path, stack: ExitStack) -> str:
    """Ten trainings log at once to a server over HTTP; nothing may be lost."""
    address = stack.enter_context(database(folder))
    port = free_port()
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    words += ["--backend-store-uri", address, "--artifacts-destination", str(folder / "artifacts")]
    stack.enter_context(server(words, port))
    uri = f"http://127.0.0.1:{port}"
    wait_until_healthy(uri)
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
    change(folder, seed)
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
