"""One tracked MLflow run for one stage: opened or resumed, filled, closed with the truth."""

import contextlib
import http.client
import logging
import os
import signal
import subprocess
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, RunStatus
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from fmce_ops.errors import TrackingError
from fmce_ops.files import atomic, remove_leftovers
from fmce_ops.tracking.location import SQLITE, home, tracking_uri
from fmce_ops.training.reporter import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENT = "fmce-ops"
OUTPUT_TAG = "fmce.output."  # + the output's path = its digest
_KEY_TAG = "fmce.key"


@dataclass(frozen=True)
class Run:
    """The open run of a stage; also a ``Reporter`` that writes each row once."""

    client: MlflowClient
    id: str
    last_step: dict[str, int]

    def begin(self, task: str, total: int) -> None:
        """Find out which steps a resumed run already has."""
        self.last_step["*"] = max(
            (metric.step for metric in self._latest() if not metric.key.startswith("system/")),
            default=-1,
        )

    def row(self, row: Row) -> None:
        """Write one step; a step that the run already has is not doubled."""
        if row.step <= self.last_step.get("*", -1):
            return
        metrics = [Metric(key, value, row.time, row.step) for key, value in row.values.items()]
        self.client.log_batch(self.id, metrics=metrics)
        self.last_step["*"] = row.step

    def final(self, values: Mapping[str, float], time: int, step: int = 0) -> None:
        """Write figures that a run has once; those it already has stay."""
        known = {metric.key for metric in self._latest()}
        metrics = [Metric(k, float(v), time, step) for k, v in values.items() if k not in known]
        self.client.log_batch(self.id, metrics=metrics)

    def _latest(self) -> list[Metric]:
        run = self.client.get_run(self.id)
        return list(run.data._metric_objs)

    def figure(self, figure: "Figure", name: str) -> None:
        """Keep a picture under ``figures/``."""
        self.client.log_figure(self.id, figure, f"figures/{name}")

    def file(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the run."""
        self.client.log_artifact(self.id, str(path), folder)

    def params(self, values: Mapping[str, object]) -> None:
        """Record parameters; a resumed run has them already, with the same values."""
        for key, value in values.items():
            self.client.log_param(self.id, key, value)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; a run that is not to be found by a tag has none."""
        for key, value in values.items():
            self.client.set_tag(self.id, key, value)

    def makers(self, digests: Mapping[str, str]) -> list[str]:
        """The ids of the latest runs that made the files with these digests, in their order."""
        experiment = self.client.get_run(self.id).info.experiment_id
        found = []
        for name, digest in digests.items():
            query = f"tags.`{OUTPUT_TAG}{name}` = '{digest}'"
            found += self.client.search_runs([experiment], query, max_results=1)
        return list(dict.fromkeys(run.info.run_id for run in found))

    @contextlib.contextmanager
    def child(self, name: str, tags: Mapping[str, str]) -> Iterator["Run"]:
        """A run beneath this one; where this one was resumed, the child that it had."""
        experiment = self.client.get_run(self.id).info.experiment_id
        beneath = {"mlflow.parentRunId": self.id, "mlflow.runName": name}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in beneath.items())
        found = self.client.search_runs([experiment], query, max_results=1)
        run = found[0] if found else self.client.create_run(experiment, tags={**tags, **beneath})
        self.client.update_run(run.info.run_id, "RUNNING")
        status = "KILLED"
        try:
            yield Run(self.client, run.info.run_id, {})
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            with contextlib.suppress(MlflowException):  # it must not hide why the run failed
                self.client.set_terminated(run.info.run_id, status)

    def dataset(self, path: Path, name: str, digest: str, context: str) -> None:
        """Name a data set that the run reads, with its digest."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two names for the same kind of source
            source = resolve_dataset_source(str(path.resolve()))
        mlflow.log_input(MetaDataset(source, name=name, digest=digest), context=context)


def connect() -> MlflowClient:
    """A client of the project's tracking store, with the experiment in place.

    Raises
    ------
    TrackingError
        The store cannot be opened or reached.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    project = home(Path.cwd())
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    uri = tracking_uri(project)
    # a store in a folder or file derives its place for artifacts from the working folder
    here = Path.cwd()
    _refuse_dead_server(uri)
    try:
        os.chdir(project)
        if uri.startswith(SQLITE):
            _lay_out(Path(uri.removeprefix(SQLITE)), name)
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(name)
    except (MlflowException, OSError, ImportError, SQLAlchemyError) as error:
        raise TrackingError(
            f"the tracking store {uri} cannot be used ({str(error).splitlines()[0]}): "
            "check MLFLOW_TRACKING_URI, or start the server it names."
        ) from error
    finally:
        os.chdir(here)
    return MlflowClient()


def _lay_out(database: Path, experiment: str) -> None:
    """Make a new store whole or not at all: one that is killed among its tables is of no use."""
    if database.exists() or "?" in database.name or database.name == ":memory:":
        return
    file = database.with_name(f"{database.name}.lock")
    with FileLock(file):
        remove_leftovers(database)
        if not database.exists():
            with atomic(database) as temporary:
                mlflow.set_tracking_uri(f"{SQLITE}{temporary}")
                mlflow.set_experiment(experiment)
        file.unlink(missing_ok=True)  # whoever waits for it finds the store


def _refuse_dead_server(uri: str) -> None:
    """MLflow itself tries for minutes before it says that nobody answers."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(uri, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers, and may want credentials that MLflow has
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise TrackingError(
            f"no tracking server answers at {uri} ({error}): start it or correct "
            "MLFLOW_TRACKING_URI."
        ) from error


@contextlib.contextmanager
def tracked(
    name: str,
    key: str | None = None,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    system_metrics: bool = True,
) -> Iterator[Run]:
    """Open a run, or go on in the one with the ``key``; close it as FINISHED, FAILED or KILLED.

    The store makes a run and its key at once, so that no kill leaves a run that is not found. A
    run that fails carries the reason in its tag ``fmce.failure``. SIGTERM closes it as KILLED.
    """
    client = connect()
    mlflow.set_system_metrics_sampling_interval(2)  # s; most stages are short
    run_id = _begun(key) if key else None
    new = {} if run_id else {"run_name": name, "tags": {_KEY_TAG: key} if key else None}
    started = mlflow.start_run(run_id=run_id, log_system_metrics=system_metrics, **new)
    run = Run(client, started.info.run_id, {})
    status, failure = RunStatus.FINISHED, ""
    try:
        with _terminated_as_interrupt():
            mlflow.log_params(flatten(params))
            run.tags({**tags, **_git_tags()})
            yield run
    except (KeyboardInterrupt, GeneratorExit):  # the latter where it came between two results
        status, failure = RunStatus.KILLED, "interrupted"
        raise
    except MlflowException as error:
        status, failure = RunStatus.FAILED, f"{type(error).__name__}: {error}"
        raise TrackingError(
            f"the tracking store refused ({str(error).splitlines()[0]}): see that it can be "
            "reached and has room, then run the same command again."
        ) from error
    except BaseException as error:
        status, failure = RunStatus.FAILED, f"{type(error).__name__}: {error}"
        raise
    finally:
        _close(run, status, failure if failure or run_id else None)


def _close(run: Run, status: int, failure: str | None) -> None:
    """End the run; a store that is gone must not hide why the stage failed."""
    with contextlib.suppress(MlflowException):
        if failure is not None:
            run.tags({"fmce.failure": failure[:5000]})
        mlflow.end_run(RunStatus.to_string(status))


def _begun(key: str) -> str | None:
    """None also where the store was removed or changed since: a new run tells the whole story."""
    query = f"tags.`{_KEY_TAG}` = '{key}'"
    found = mlflow.search_runs(filter_string=query, max_results=1, output_format="list")
    return found[0].info.run_id if found else None


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the stage as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``: the same name in params.yaml, DVC and MLflow."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _git_tags() -> dict[str, str]:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*dvc.lock")
    return {"mlflow.source.git.commit": commit, "fmce.git.dirty": str(bool(changed)).lower()}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
