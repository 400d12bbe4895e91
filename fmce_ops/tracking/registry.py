"""Logged and registered models: log, register, promote, find."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

import fmce_ops
from fmce_ops.errors import FmceError, ModelError, TrackingError
from fmce_ops.tracking.runs import Run, connect
from fmce_ops.tracking.serving import (
    MATURITY_OPTIONS,
    NETWORK,
    Network,
    load_network,
    save_network,
)

CHAMPION, CHALLENGER = "champion", "challenger"
_PACKAGES = ("mlflow", "torch", "torchvision", "numpy", "safetensors", "h5py", "pillow")


def log_network(
    run: Run,
    name: str,
    network: Network,
    state: dict[str, torch.Tensor],
    example: np.ndarray,
    *,
    step: int = 0,
) -> str:
    """Log a network to the run once and return its ``models:/m-...`` URI.

    What a killed process left half-logged is completed, not logged beside it.

    ``example``: (n, C, H, W) with n >= 2, one input as a user would send it.
    """
    model = _begun(run, name) or _begin(run, name, network.kind)
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "model"
            save_network(Path(folder) / name, network, state)
            mlflow.pyfunc.save_model(
                saved,
                loader_module="fmce_ops.tracking.serving",
                data_path=str(Path(folder) / name),
                code_paths=[str(Path(fmce_ops.__file__).parent)],
                mlflow_model=Model(model.artifact_location, run.id, model_id=model.model_id),
                pip_requirements=[f"{package}=={version(package)}" for package in _PACKAGES],
                signature=_signature(network),
                input_example=example,
            )
            run.client.log_model_artifacts(model.model_id, str(saved))
        run.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    _link(run, model.model_id, step)
    return str(model.model_uri)


def _begin(run: Run, name: str, kind: str) -> LoggedModel:
    record = run.client.get_run(run.id)
    return run.client.create_logged_model(
        record.info.experiment_id, name, run.id, params=record.data.params, model_type=kind
    )


def _link(run: Run, model_id: str, step: int) -> None:
    """Make the model an output of the run, with what the run measured at its step."""
    record = run.client.get_run(run.id)
    linked = record.outputs.model_outputs if record.outputs else []
    if model_id in [output.model_id for output in linked]:
        return
    measured = [
        Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id)
        for key in record.data.metrics
        for metric in run.client.get_metric_history(run.id, key)
        if metric.step == step
    ]
    run.client.log_batch(run.id, metrics=measured)
    run.client.log_outputs(run.id, [LoggedModelOutput(model_id, step)])


def _begun(run: Run, name: str) -> LoggedModel | None:
    """The model of this name that the run has logged, or begun to."""
    experiment = run.client.get_run(run.id).info.experiment_id
    query = f"source_run_id = '{run.id}' AND name = '{name}'"
    found = run.client.search_logged_models([experiment], query)
    return found[0] if found else None


def _signature(network: Network) -> ModelSignature:
    inputs = TensorSpec(np.dtype(np.float32), (-1, *network.input_shape), name=None)
    named = len(network.answers) > 1
    outputs = [
        TensorSpec(np.dtype(np.float64), (-1, *shape), name=name if named else None)
        for name, shape in network.answers.items()
    ]
    options = None
    if network.kind == "maturity":
        types = {float: DataType.double, str: DataType.string}
        specs = [ParamSpec(n, types[type(v)], v) for n, v in MATURITY_OPTIONS.items()]
        options = ParamSchema(specs)
    return ModelSignature(Schema([inputs]), Schema(outputs), options)


@dataclass(frozen=True)
class Registered:
    """A version in the registry and the alias it got."""

    name: str
    version: str
    alias: str


def register(
    run: Run, name: str, model_uri: str, score: float, judge: Callable[[Path], float | None]
) -> Registered:
    """Register a logged model once; it becomes champion if it beats the champion on its own data.

    Parameters
    ----------
    score : the new model's figure on the validation data, larger is better.
    judge : gives the same figure for the model folder of the present champion on the same data,
        or None where that model cannot read the data at all.
    """
    known = run.client.search_model_versions(f"name='{name}' and run_id='{run.id}'")
    made = known[0] if known else mlflow.register_model(model_uri, name)
    if "fmce.alias" in made.tags:
        return Registered(name, str(made.version), made.tags["fmce.alias"])
    champion = _champion(run.client, name)
    best = champion in (None, str(made.version)) or _beats_champion(name, score, judge)
    alias = CHAMPION if best else CHALLENGER
    run.client.set_model_version_tag(name, made.version, "fmce.validation_score", repr(score))
    run.client.set_registered_model_alias(name, alias, made.version)
    run.client.set_model_version_tag(name, made.version, "fmce.alias", alias)  # the last: all done
    return Registered(name, str(made.version), alias)


def _champion(client: MlflowClient, name: str) -> str | None:
    """The version that is champion; it may be the one at hand, where a process was killed."""
    try:
        return str(client.get_registered_model(name).aliases.get(CHAMPION) or "") or None
    except MlflowException as error:
        raise TrackingError(
            f"the registry does not tell the champion of {name} ({str(error).splitlines()[0]}): "
            "run the same command again."
        ) from error


def _beats_champion(name: str, score: float, judge: Callable[[Path], float | None]) -> bool:
    uri = f"models:/{name}@{CHAMPION}"
    try:
        folder = model_folder(uri)
    except ModelError as error:
        if error.__cause__ and _has_files(uri):
            raise TrackingError(
                f"the files of {name}'s champion could not be fetched ({error.__cause__}): "
                f"run the same command again, or take the alias {CHAMPION!r} away."
            ) from error
        return True  # gone, or no model of this project: it can serve nobody
    try:
        standing = judge(folder)
    except ModelError:
        return True  # damaged
    return standing is None or score > standing


def _has_files(uri: str) -> bool:
    """Whether the store knows files of it; where the store does not answer, it may have some."""
    try:
        return bool(mlflow.artifacts.list_artifacts(artifact_uri=uri))
    except MlflowException as error:
        return bool(error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST))
    except Exception as error:  # every kind of store has errors of its own
        return not isinstance(error, FileNotFoundError)


def model_folder(uri: str) -> Path:
    """The local folder with ``network.json`` of a ``models:/``, ``runs:/`` or folder URI.

    Raises
    ------
    ModelError
        There is no such model, or it is not one of this project's.
    """
    try:
        local = Path(uri) if uri and Path(uri).is_dir() else _downloaded(uri)
    except FmceError:
        raise
    except Exception as error:  # every kind of store has errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"there is no model at {uri} ({reason}): "
            "give models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/NAME or a model folder."
        ) from error
    found = sorted(local.rglob(NETWORK)) if local.is_dir() else []
    if len(found) != 1:
        raise ModelError(
            f"{uri} holds {len(found)} models of fmce-ops: give the URI or folder of one."
        )
    return found[0].parent


def _downloaded(uri: str) -> Path:
    connect()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))


__all__ = ["Network", "Registered", "load_network", "log_network", "model_folder", "register"]
