"""Stage ``train``: the original task, with the loss and the weights of every point."""

from pathlib import Path

from lightning_fabric import Fabric
from torch import Tensor

from fmce_ops.data import Augment, Images, TrainBatches
from fmce_ops.files import write_json
from fmce_ops.stages.networks import build_classifier
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import CHECKPOINTS, IMAGES, LOSSES, RESULTS, open_stage
from fmce_ops.stages.work import publish
from fmce_ops.training.classifier import (
    Plan,
    Validation,
    point_file,
    train_classifier,
)
from fmce_ops.training.devices import launch, load
from fmce_ops.training.losses import Point, write_losses
from fmce_ops.training.reporter import Reporter

SECTIONS = ["data", "model", "train"]
METRICS = RESULTS / "train.json"


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``results/losses.csv``, ``results/train.json`` and ``data/checkpoints/``."""
    fabric = launch(params.train.precision)
    with (
        open_stage(
            "train",
            params,
            SECTIONS,
            inputs=[IMAGES],
            outputs=[LOSSES, METRICS, CHECKPOINTS],
            progress=progress,
            fabric=fabric,
        ) as stage,
        Images.open(IMAGES) as images,
    ):
        history = train_classifier(
            fabric,
            build_classifier(params, len(images.classes)),
            training_batches(fabric, images, params),
            validation(fabric, images, params),
            training_plan(params),
            stage.folder,
            stage.reporter,
        )
        if fabric.is_global_zero:
            _publish(history, stage.folder)


def training_plan(params: Params) -> Plan:
    """How ``params`` ask to train."""
    return Plan(**params.train.model_dump(exclude={"batch_size", "augment", "precision"}))


def training_batches(
    fabric: Fabric, images: Images, params: Params, rows: Tensor | None = None
) -> TrainBatches:
    """The training images of ``params``, this process's share, on its device; all or (m,) some."""
    return TrainBatches(
        *load(fabric, images, "train"),
        batch_size=params.train.batch_size,
        size=params.data.image_size,
        mean=images.mean,
        std=images.std,
        augment=Augment(**params.train.augment.model_dump()),
        seed=params.train.seed,
        rows=rows,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )


def validation(fabric: Fabric, images: Images, params: Params) -> Validation:
    """The validation images of ``params``, on the device."""
    size = params.data.image_size
    return Validation(*load(fabric, images, "val"), size, images.mean, images.std)


def _publish(history: list[Point], folder: Path) -> None:
    files = [point_file(folder, point.point) for point in history]
    publish({file.name: file for file in files}, CHECKPOINTS)
    write_losses(LOSSES, history)
    last = history[-1]
    best = max(point.val_accuracy for point in history)
    summary = {
        "points": len(history),
        "train_loss": last.train_loss,
        "val_loss": last.val_loss,
        "val_accuracy": last.val_accuracy,
        "best_val_accuracy": best,
    }
    write_json(METRICS, summary)
