"""Stages that are killed go on, end with the same bytes, and are one run in MLflow."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
import pytest
from fmce_ops.files import file_digest
from mlflow import MlflowClient

from tests.project import (
    SMALL,
    command,
    copy_project,
    environment,
    fmce_ops,
    in_two_processes,
    new_project,
    write_params,
)

RESULTS = [
    "results/losses.csv",
    "results/markers.json",
    "data/checkpoints/manifest.json",
    "data/phases/manifest.json",
    "data/fmcs/manifest.json",
    "results/fmce.json",
    "results/fmce.csv",
    "results/posttrain.json",
    "results/posttrain.csv",
    "data/targets/manifest.json",
    "results/pathways.json",
    "results/pathways.csv",
    "data/paths.h5",
    "data/study/one/manifest.json",
    "data/study/two/manifest.json",
    "results/maturity.json",
    "results/maturity.csv",
]


pytestmark = pytest.mark.timeout(1500)


@pytest.fixture
def undisturbed(project: Path) -> dict[str, str]:
    return digests(project)


def digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in RESULTS}


def heed_ctrl_c() -> None:
    """A shell's background job ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=folder,
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


def until(process: subprocess.Popen[str], text: str) -> None:
    """Read what the process prints until a line holds ``text``."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if text in line:
            return
    told = "".join(printed[-20:])
    raise AssertionError(f"{process.args} ended before it printed {text!r}:\n{told}")


def once(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Wait for a thing to happen while the process runs."""
    while not happened():
        assert process.poll() is None, "the process ended before it happened"
        time.sleep(0.005)


def end(process: subprocess.Popen[str]) -> None:
    """Kill the process and all that it has started, also what has a group of its own.

    The process first: DVC rewrites its lock in place as soon as a stage has ended, and a kill in
    between leaves it empty (docs/pipeline.md).
    """
    every = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in every:
        one.kill()
    for one in every:
        one.wait(timeout=60)
    if process.stdout:
        process.stdout.close()


def stages(folder: Path) -> dict[str, list[mlflow.entities.Run]]:
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    store = MlflowClient()
    found: dict[str, list[mlflow.entities.Run]] = {}
    experiment = store.get_experiment_by_name("fmce-ops")
    for run in store.search_runs([experiment.experiment_id]):
        found.setdefault(run.data.tags["fmce.stage"], []).append(run)
    return found


def test_sigkill_at_many_points_costs_nothing(undisturbed: dict[str, str], tmp_path: Path) -> None:
    folder = new_project(tmp_path / "killed")

    def registered(name: str) -> Callable[[], bool]:
        database = f"sqlite:///{folder / 'mlflow.db'}"
        return lambda: bool(MlflowClient(database).search_model_versions(f"name='{name}'"))

    # behind each text all processes are killed, a little later or as soon as a thing happened
    points: list[tuple[str, float | Callable[[], bool]]] = [
        ("Running stage 'prepare'", 1.5),
        ("train 1/6", 0.0),
        ("train 3/6", 0.1),
        ("train 6/6", 0.0),
        ("Running stage 'markers'", 6.0),
        ("features 2/", 0.0),
        ("fmce 1/3", 0.0),
        ("fmce 3/3", registered("fmce-net")),
        ("train 3/6", 0.1),  # of a fold
        ("targets of conv1..head 1/", 0.0),
        ("posttrain 2/6", 0.1),
        ("posttrain 6/6", (folder / "results/posttrain/targets-conv1..head.png").exists),
        ("posttrain 6/6", registered("fmce-posttrained")),
        ("pathways 1/2", 0.0),
        ("Running stage 'pathways'", registered("fmce-pathways")),
        ("describe 5/", 0.0),
        ("maturity 1/2", 0.0),
    ]
    for text, later in points:
        process = start(folder, "dvc", "repro")
        until(process, text)
        if callable(later):
            once(process, later)
        else:
            time.sleep(later)
        end(process)
    command(folder, "dvc", "repro")
    assert digests(folder) == undisturbed
    assert not list(folder.glob("data/.*.tmp")) and not list(folder.glob("results/.*.tmp"))
    found = stages(folder)
    assert len(found.pop("posttrain-arm")) == 4 * 2
    assert len(found.pop("posttrain-fold")) == 2
    assert len(found.pop("pathways-arm")) == 2
    names = ["prepare", "train", "markers", "features", "fmce", "posttrain", "pathways"]
    names += ["study@one", "study@two", "maturity", "report"]
    assert {name: len(runs) for name, runs in found.items()} == dict.fromkeys(names, 1)
    assert {run.info.status for runs in found.values() for run in runs} == {"FINISHED"}
    store = MlflowClient()
    for stage, metric, steps in [("train", "train/loss", 6), ("fmce", "val/accuracy", 3)]:
        history = store.get_metric_history(found[stage][0].info.run_id, metric)
        assert [entry.step for entry in history] == list(range(1, steps + 1))
    for name in ("fmce-net", "fmce-posttrained", "fmce-pathways"):
        assert len(store.search_model_versions(f"name='{name}'")) == 1, name
    assert len(found["markers"][0].outputs.model_outputs) == 3


def test_two_processes_that_are_killed_go_on_to_the_results_of_one(
    project: Path, tmp_path: Path
) -> None:
    folder = copy_project(project, tmp_path / "two")
    local = {"mode": "local", "modules": ["stage3..stage4", "conv5"], "folds": 0}
    local["images_per_shard"] = 32
    write_params(folder, {**SMALL, "posttrain": {**SMALL["posttrain"], **local}})
    fmce_ops(folder, "posttrain")
    results = [folder / "results" / name for name in ("posttrain.json", "posttrain.csv")]
    alone = [file.read_bytes() for file in results]
    for text in ("targets of conv5 1/", "posttrain 2/6"):
        process = start(folder, *in_two_processes("posttrain"))
        until(process, text)
        end(process)
    command(folder, *in_two_processes("posttrain"))
    assert [file.read_bytes() for file in results] == alone


def test_ctrl_c_closes_the_run_keeps_the_work_and_says_how_to_go_on(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    folder = new_project(tmp_path / "interrupted")
    command(folder, "dvc", "repro", "prepare")
    process = start(folder, "fmce-ops", "train")
    until(process, "train 2/6")
    os.killpg(process.pid, signal.SIGINT)
    told = process.stdout.read() if process.stdout else ""
    assert process.wait(timeout=60) == 130
    assert "run the same command again" in told
    assert "Traceback" not in told
    (run,) = stages(folder)["train"]
    assert run.info.status == "KILLED"
    command(folder, "dvc", "repro", "train")
    (run,) = stages(folder)["train"]
    assert run.info.status == "FINISHED"
    for name in ("results/losses.csv", "data/checkpoints/manifest.json"):
        assert file_digest(folder / name) == undisturbed[name]
