"""Stage ``fmce``: train FMCE-Net on the shards, judge it once on the test split, register it."""

from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from fmce_ops.figures import confusion_figure
from fmce_ops.files import write_json, write_table
from fmce_ops.models import FmceNet
from fmce_ops.shards import Manifest, ShardStore, Split, split_by_image, split_paper
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import FMCS, RESULTS, Stage, now, open_stage
from fmce_ops.stages.work import recorded_digests
from fmce_ops.tracking.registry import Registered, load_network, log_network, register
from fmce_ops.tracking.serving import Network
from fmce_ops.training.devices import launch
from fmce_ops.training.fmce import Epoch, FmcePlan, best_epoch, judge, train_fmce
from fmce_ops.training.metrics import Figures
from fmce_ops.training.reporter import Reporter

SECTIONS = ["fmce"]
NAME = "fmce-net"
METRICS, EPOCHS, CONFUSION = (RESULTS / name for name in ("fmce.json", "fmce.csv", "confusion.csv"))


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``results/fmce.json``, ``fmce.csv``, ``confusion.csv``; register ``fmce-net``."""
    fabric = launch(params.fmce.precision)
    with (
        open_stage(
            "fmce",
            params,
            SECTIONS,
            inputs=[FMCS],
            outputs=[METRICS, EPOCHS, CONFUSION],
            progress=progress,
            fabric=fabric,
        ) as stage,
        ShardStore.open(FMCS) as store,
    ):
        settings = params.fmce
        split = split_rows(store.manifest, settings.model_dump())
        plan = FmcePlan(settings.epochs, settings.batch_size, settings.lr, settings.seed)
        torch.manual_seed(settings.seed)
        channels, height, width = store.manifest.shape
        network = FmceNet((channels, height, width), store.manifest.phases)
        history = train_fmce(
            fabric,
            network,
            store,
            split.train,
            split.validation,
            plan,
            stage.folder,
            stage.reporter,
        )
        matrix, _ = judge(fabric, network, store, split.test, settings.batch_size)
        if fabric.is_global_zero:
            _publish(stage, params, history, matrix)
            _register(stage, params, fabric, network, store, split, best_epoch(history))


def split_rows(manifest: Manifest, made_with: dict[str, Any]) -> Split:
    """The split that settings like those of the section ``fmce`` give."""
    split = split_paper if made_with["split"] == "paper" else split_by_image
    shares = made_with["test"], made_with["validation"], made_with["seed"]
    return split(manifest.images, manifest.phases, *shares)


def _publish(stage: Stage, params: Params, history: list[Epoch], matrix: np.ndarray) -> None:
    best = best_epoch(history)
    figures = asdict(Figures.of(matrix))
    summary = {
        "test": figures,
        "validation_accuracy": best.val_accuracy,
        "best_epoch": best.epoch,
        "split": params.fmce.split,
        "chance": 1 / len(matrix),
    }
    write_json(METRICS, summary)
    write_table(EPOCHS, [[c.name for c in fields(Epoch)], *(astuple(e) for e in history)])
    phases = range(1, len(matrix) + 1)
    counts = [[k, *row] for k, row in zip(phases, matrix.tolist(), strict=True)]
    write_table(CONFUSION, [["true", *phases], *counts])
    title = f"FMCE-Net on test maps: accuracy {figures['accuracy']:.4f}"
    stage.figure(confusion_figure(matrix, title, [str(k) for k in phases]), "confusion.png")
    if stage.run:
        finals = {f"test/{name}": value for name, value in figures.items()}
        stage.run.final({**finals, "best_epoch": best.epoch}, now(), best.epoch)


def _register(
    stage: Stage,
    params: Params,
    fabric: Fabric,
    network: FmceNet,
    store: ShardStore,
    split: Split,
    best: Epoch,
) -> Registered | None:
    if stage.run is None:
        return None
    manifest = store.manifest
    settings = params.fmce.model_dump(include={"split", "test", "validation", "seed"})
    made_from = {
        "shards": stage.inputs[str(FMCS)],
        "dvc": recorded_digests(Path("dvc.lock")).get(str(FMCS)),
        "split": settings,
        "provenance": manifest.provenance,
    }
    spec = {"shape": list(manifest.shape), "phases": manifest.phases}
    described = Network("fmce-net", spec, made_from)
    example = store.batch([1, manifest.phases], [0, 0]).astype(np.float32)
    uri = log_network(stage.run, NAME, described, network.state_dict(), example, step=best.epoch)

    def on_the_same_maps(folder: Path) -> float | None:
        standing, champion = load_network(folder)
        if standing.kind != described.kind or standing.spec != spec:
            return None
        matrix, _ = judge(
            fabric, champion.to(fabric.device), store, split.validation, params.fmce.batch_size
        )
        return float(np.trace(matrix) / matrix.sum())

    made = register(stage.run, NAME, uri, best.val_accuracy, on_the_same_maps)
    stage.run.tags({"fmce.registered": f"{made.name} version {made.version} ({made.alias})"})
    return made
