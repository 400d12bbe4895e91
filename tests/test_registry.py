"""What a killed process left in the store is completed, and the champion stays who it is."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from tests.project import command, environment

CONNECT = "from fmce_ops.tracking.runs import connect; connect().search_experiments()"


def test_a_store_that_was_begun_is_made_anew(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CONNECT]
    variables = {**environment(), "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    killed = subprocess.Popen(words, cwd=tmp_path, env=variables)
    end = time.monotonic() + 120
    while not any(file.stat().st_size for file in tmp_path.glob(".mlflow.db.*.tmp")):
        assert killed.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "mlflow.db").exists()
    both = [subprocess.Popen(words, cwd=tmp_path, env=variables) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    files = {path.name for path in tmp_path.iterdir()} - {"mlruns"}
    assert files == {"mlflow.db"}


LOG = """
import os, signal, sys
import numpy as np
from mlflow.tracking import MlflowClient
from fmce_ops.tracking.registry import load_network, log_network, model_folder
from fmce_ops.tracking.runs import tracked
from fmce_ops.tracking.serving import Network

store, dies_in = sys.argv[1:]
os.environ["MLFLOW_TRACKING_URI"] = store
if dies_in:
    setattr(MlflowClient, dies_in, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
network = Network("fmce-net", {"shape": (3, 2, 2), "phases": 4}, {})
with tracked("test", "its key", params={}, tags={}, system_metrics=False) as run:
    print(run.id, flush=True)
    run.final({"loss": 0.5}, 1000, 7)
    state = network.build().state_dict()
    uri = log_network(run, "net", network, state, np.zeros((2, 3, 2, 2), "float32"), step=7)
    assert uri == log_network(run, "net", network, state, np.zeros((2, 3, 2, 2), "float32"), step=7)
    load_network(model_folder(uri))
"""


def test_mlflow_reports_nothing_over_the_network() -> None:
    code = "import fmce_ops.tracking.runs; from mlflow.telemetry import get_telemetry_client as c; "
    code += "assert c() is None"
    # MLflow is silent by itself where it sees that tests run.
    outside = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    subprocess.run([sys.executable, "-c", code], env=outside, check=True, timeout=120)


@pytest.mark.parametrize(
    "dies_in", ["log_model_artifacts", "finalize_logged_model", "log_outputs", "set_terminated"]
)
def test_a_model_that_was_begun_is_completed(tmp_path: Path, dies_in: str) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    killed = command(tmp_path, sys.executable, "-c", LOG, store, dies_in, code=-9)
    (run_id,) = killed.stdout.split()
    again = command(tmp_path, sys.executable, "-c", LOG, store, "")
    assert again.stdout.split() == [run_id]
    client = MlflowClient(store)
    run = client.get_run(run_id)
    (made,) = client.search_logged_models([run.info.experiment_id])
    assert made.status == LoggedModelStatus.READY
    assert [(metric.key, metric.value) for metric in made.metrics] == [("loss", 0.5)]
    (linked,) = run.outputs.model_outputs
    assert (linked.model_id, linked.step) == (made.model_id, 7)


def test_a_run_that_was_killed_as_it_was_opened_is_the_one_that_goes_on(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    killed = command(tmp_path, sys.executable, "-c", LOG, store, "log_batch", code=-9)
    assert killed.stdout == ""
    again = command(tmp_path, sys.executable, "-c", LOG, store, "")
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("fmce-ops").experiment_id])
    assert again.stdout.split() == [run.info.run_id] and run.info.status == "FINISHED"


REGISTER = """
import os, shutil, sys
import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from fmce_ops.errors import TrackingError
from fmce_ops.tracking.registry import log_network, register
from fmce_ops.tracking.runs import tracked
from fmce_ops.tracking.serving import Network

os.environ["MLFLOW_TRACKING_URI"] = sys.argv[1]
network = Network("fmce-net", {"shape": (3, 2, 2), "phases": 4}, {})


def made(score, standing, broken=""):
    owner = mlflow.artifacts if broken == "download_artifacts" else MlflowClient
    original = getattr(owner, broken, None)

    def refuse(*given, **named):
        if "fmce.validation_score" in given:
            return original(*given, **named)
        raise MlflowException("503 Service Unavailable")

    with tracked("test", params={}, tags={}, system_metrics=False) as run:
        state = network.build().state_dict()
        uri = log_network(run, "net", network, state, np.zeros((2, 3, 2, 2), "float32"))
        if broken:
            setattr(owner, broken, refuse)
        try:
            return register(run, "net", uri, score, lambda folder: standing).alias
        except (TrackingError, MlflowException) as error:
            failure = type(error).__name__
        finally:
            if broken:
                setattr(owner, broken, original)
        again = register(run, "net", uri, score, lambda folder: max(standing, score)).alias
        return f"{failure}, then {again}"


print(made(0.9, None))
print(made(0.4, 0.9))
print(made(0.3, 0.9, "get_registered_model"))
print(made(0.95, 0.9, "set_model_version_tag"))
print(made(0.3, 0.9, "download_artifacts"))
shutil.rmtree("mlruns")
print(made(0.2, 0.9))
"""


def test_a_failing_registry_makes_no_champion(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = command(tmp_path, sys.executable, "-c", REGISTER, store)
    assert done.stdout.splitlines() == [
        "champion",
        "challenger",
        "TrackingError, then challenger",
        "MlflowException, then champion",
        "TrackingError, then challenger",
        "champion",  # for the files of the last one are gone
    ]
