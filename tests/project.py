"""A small project in a folder of its own, and the commands that a user runs there."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from fmce_ops.data import Images, prepare

SMALL = {
    "data": {"dataset": "digits", "image_size": 16, "per_class": 20},
    "model": {"backbone": "shufflenet_v2_x0_5", "stem": "small"},
    "train": {"epochs": 6, "batch_size": 16, "lr": 0.002},
    "markers": {"phases": 3, "mu": 1.0e-9},
    "features": {"images_per_shard": 64},
    "fmce": {"epochs": 3, "batch_size": 32, "lr": 0.001},
    "posttrain": {"epochs": 3, "lr": 0.003, "batch_size": 32, "seeds": 2, "alphas": [1.0]},
    "pathways": {"ratios": [0.5], "epochs": 2, "batch_size": 32, "attacked": 30},
    "study": {"images": 32, "checkpoints": 4},
    "maturity": {
        "runs": {"one": {"train": {"epochs": 4}}, "two": {"train": {"epochs": 4, "seed": 1}}},
        "steps": 20,
    },
    "report": {"title": "A small project"},
}

IMPORTED = ["fmce_ops.stages.evaluate", "fmce_ops.stages.networks", "fmce_ops.figures"]
IMPORTED += ["mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "torchvision"]


def environment() -> dict[str, str]:
    """No tracking variable of the caller; the scripts of this interpreter first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_"))}
    scripts = str(Path(sys.executable).parent)
    return {**kept, "PATH": scripts + os.pathsep + kept["PATH"], "OMP_NUM_THREADS": "1"}


def command(
    folder: Path, *words: str, code: int | None = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` and check its exit code."""
    done = subprocess.run(
        words,
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if code is not None:
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def fmce_ops(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Like ``command(folder, "fmce-ops", *words)``, in a fork of a process that has imported it."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as place:
        printed = [Path(place) / name for name in ("stdout", "stderr")]
        process = forks.Process(target=_run, args=(folder, ["fmce-ops", *words], printed))
        process.start()
        process.join(600)
        if process.exitcode is None:
            process.kill()
        stdout, stderr = (path.read_text() for path in printed)
    assert process.exitcode == code, f"{words}: {process.exitcode}\n{stdout}\n{stderr}"
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def in_two_processes(stage: str) -> list[str]:
    """The command that runs a stage so."""
    words = ["fabric", "run", "--accelerator", "cpu", "--strategy", "ddp", "--devices", "2"]
    script = Path(sys.executable).parent / "fmce-ops"
    return [*words, "--main-port", str(free_port()), str(script), stage]


def _run(folder: Path, words: list[str], printed: list[Path]) -> None:
    """In the new process."""
    for number, path in enumerate([Path(os.devnull), *printed]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    kept = environment()
    os.environ.clear()
    os.environ.update(kept)
    os.chdir(folder)
    sys.argv = words

    import torch
    from fmce_ops.cli import main

    torch.set_num_threads(1)
    main()


def new_project(folder: Path, params: dict[str, object] = SMALL) -> Path:
    """A git repository set up by ``fmce-ops init``, with its first commit."""
    folder.mkdir(parents=True)
    command(folder, "git", "init", "-q")
    command(folder, "git", "config", "user.email", "user@example.org")
    command(folder, "git", "config", "user.name", "A user")
    fmce_ops(folder, "init")
    write_params(folder, params)
    commit(folder, "start")
    return folder


def write_params(folder: Path, params: dict[str, object]) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def commit(folder: Path, message: str) -> None:
    command(folder, "git", "add", "-A")
    command(folder, "git", "commit", "-q", "--allow-empty", "-m", message)


def copy_project(project: Path, folder: Path) -> Path:
    """A copy to do damage to."""
    return Path(shutil.copytree(project, folder, symlinks=True))


@contextmanager
def digits(folder: Path, per_class: int, size: int) -> Iterator[Images]:
    """The embedded data set, prepared in a folder and opened."""
    path = folder / "images.h5"
    options = {"image_size": size, "per_class": per_class, "validation": 0.2, "test": 0.2}
    prepare("digits", path, root=folder, seed=0, **options)
    with Images.open(path) as images:
        yield images


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
