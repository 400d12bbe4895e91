"""Judge any logged model on the test split of the data that it belongs to."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fmce_ops.data import Images
from fmce_ops.errors import FmceError, ModelError, ParamsError
from fmce_ops.figures import confusion_figure
from fmce_ops.shards import ShardStore
from fmce_ops.stages.fmce import split_rows
from fmce_ops.stages.params import load_params
from fmce_ops.stages.stage import FMCS, IMAGES, now
from fmce_ops.stages.versions import data_version
from fmce_ops.tracking.registry import load_network, model_folder
from fmce_ops.tracking.runs import tracked
from fmce_ops.tracking.serving import Network
from fmce_ops.training.devices import launch
from fmce_ops.training.fmce import judge
from fmce_ops.training.metrics import Figures, confusion

_ORDERED = ("within_one", "mae", "spearman")  # figures that make no sense for unordered classes


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on the test split of its data."""

    model_uri: str
    kind: str
    data: str
    count: int
    unit: str
    names: list[str]
    figures: dict[str, float]
    confusion: list[list[int]]

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``; the figures stand at the top level."""
        rest = asdict(self)
        return {**rest.pop("figures"), **rest}


def evaluate(model_uri: str, params_file: Path) -> Evaluation:
    """Judge a ``models:/``, ``runs:/`` or local model and record it as a run.

    Raises
    ------
    ModelError
        There is no such model, or neither the workspace nor DVC's cache has its data.
    """
    folder = model_folder(model_uri)
    refuse_unknown_code(folder, params_file)
    network, module = load_network(folder)
    if network.kind == "maturity":
        raise ModelError(
            f"{model_uri} judges maturity, and its data are runs: its figures on runs left out are "
            "in results/maturity.json; score a network with 'fmce-ops score'."
        )
    on_maps = network.kind == "fmce-net"
    matrix = _on_shards(network, module) if on_maps else _on_images(network, module)
    values = asdict(Figures.of(matrix))
    names = [str(k) for k in range(1, len(matrix) + 1)] if on_maps else network.spec["classes"]
    result = Evaluation(
        model_uri=model_uri,
        kind=network.kind,
        data=network.made_from["shards" if on_maps else "images"],
        count=int(matrix.sum()),
        unit="maps" if on_maps else "images",
        names=names,
        figures={k: v for k, v in values.items() if on_maps or k not in _ORDERED},
        confusion=matrix.tolist(),
    )
    _record(result, network, matrix)
    return result


def refuse_unknown_code(folder: Path, params_file: Path) -> None:
    """A model that names a factory is built by importing it: only what the project itself names."""
    network = Network.read(folder)
    backbone = str(network.spec.get("backbone", ""))
    if ":" not in backbone:
        return
    if not params_file.exists() or load_params(params_file).model.backbone != backbone:
        raise ModelError(
            f"{folder} wants to be built by {backbone}, which params.yaml does not name: "
            f"set model.backbone to {backbone} if you trust that code."
        )


def _on_shards(network: Network, module: nn.Module) -> NDArray[np.int64]:
    made_from = network.made_from
    fabric = launch()
    version = data_version(FMCS, made_from["shards"], made_from.get("dvc"))
    with version as folder, ShardStore.open(folder) as store:
        split = split_rows(store.manifest, made_from["split"])
        matrix, _ = judge(fabric, module.to(fabric.device), store, split.test, 256)
    return matrix


@torch.inference_mode()
def _on_images(network: Network, module: nn.Module) -> NDArray[np.int64]:
    fabric = launch()
    module.to(fabric.device)
    classes = len(network.spec["classes"])
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    wanted = network.made_from["images"]
    with data_version(IMAGES, wanted, wanted) as file, Images.open(file) as images:
        total = images.counts["test"]
        for start in range(0, total, 256):
            pixels, labels = images.read("test", start, min(start + 256, total))
            logits = module(network.prepare(fabric.to_device(pixels)))
            counts += confusion(labels, logits.argmax(1).cpu(), classes)
    return counts.numpy()


def _record(result: Evaluation, network: Network, matrix: NDArray[np.int64]) -> None:
    tags = {
        "fmce.stage": "evaluate",
        "fmce.model_uri": result.model_uri,
        "fmce.command": f"fmce-ops evaluate --model-uri {result.model_uri}",
    }
    provenance = network.made_from.get("provenance", {})
    tags["fmce.dataset"] = provenance.get("dataset", network.spec.get("dataset", ""))
    backbone = provenance.get("model", network.spec).get("backbone", "")
    data = FMCS if network.kind == "fmce-net" else IMAGES
    tags |= {"fmce.backbone": backbone, f"fmce.input.{data}": result.data}
    params = {"model_uri": result.model_uri, "kind": result.kind}
    with tracked("evaluate", params=params, tags=tags, system_metrics=False) as run:
        run.dataset(data, str(data), result.data, "test")
        run.tags({"fmce.builds_on": ",".join(run.makers({str(data): result.data}))})
        run.final({f"test/{name}": value for name, value in result.figures.items()}, now())
        title = f"accuracy {result.figures['accuracy']:.4f}"
        run.figure(confusion_figure(matrix, title, result.names), "confusion.png")


def parse_minimum(texts: Iterable[str]) -> dict[str, float]:
    """``["accuracy=0.9"]`` as ``{"accuracy": 0.9}``.

    Raises
    ------
    ParamsError
        Not FIGURE=VALUE, an unknown figure, or no finite number.
    """
    known = list(Figures.__annotations__)
    least = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in least:
            raise ParamsError(f"--min {name} is given twice: keep one of the two.")
        try:
            least[name] = float(value)
        except ValueError:
            least[name] = math.nan
        if name not in known or not math.isfinite(least[name]):
            raise ParamsError(
                f"--min {text} is not understood: write FIGURE=NUMBER with one of "
                f"{', '.join(known)}."
            )
    return least


def shortfalls(result: Evaluation, least: dict[str, float]) -> list[str]:
    """A sentence for each figure that falls short; of ``mae`` less is better."""
    missing = [name for name in least if name not in result.figures]
    if missing:
        raise FmceError(f"a {result.kind} has no figure {missing[0]}: ask for another.")
    return [
        f"{name} is {result.figures[name]:.4f}, which misses {bound}"
        for name, bound in least.items()
        if (result.figures[name] > bound if name == "mae" else result.figures[name] < bound)
    ]
