"""Stage ``study``: a run of ``maturity.runs``, trained and described for the judge of maturity."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from fmce_ops.convergence import epoch_markers, maturity
from fmce_ops.data import Images, generator, to_input
from fmce_ops.errors import ParamsError
from fmce_ops.files import file_digest
from fmce_ops.models import save_weights
from fmce_ops.stages.networks import build_classifier
from fmce_ops.stages.params import RUN_SECTIONS, Params
from fmce_ops.stages.prepare import prepare_images
from fmce_ops.stages.stage import STUDY, Stage, now, open_stage
from fmce_ops.stages.train import training_batches, training_plan, validation
from fmce_ops.stages.work import publish
from fmce_ops.training.classifier import point_file, train_classifier
from fmce_ops.training.devices import launch
from fmce_ops.training.losses import Point
from fmce_ops.training.reporter import Reporter
from fmce_ops.training.study import Checkpoint, choose_points, describe_run


def run(params: Params, progress: Reporter | None, name: str) -> None:
    """Write ``data/study/<name>/``: the run's descriptors as shards, with its maturity."""
    if name not in params.maturity.runs:
        known = ", ".join(params.maturity.runs) or "none"
        raise ParamsError(f"there is no run {name!r} in maturity.runs of params.yaml: {known}.")
    own = params.of_run(name)
    fabric = launch(own.train.precision)
    with open_stage(
        f"study@{name}",
        own,
        [*RUN_SECTIONS, "study"],
        outputs=[STUDY / name],
        progress=progress,
        fabric=fabric,
    ) as stage:
        images = _images(fabric, own, stage.folder)
        digest = file_digest(images, "md5")
        if stage.run:
            stage.run.dataset(images, own.data.dataset, digest, "prepared")
        with Images.open(images) as opened:
            _study(fabric, stage, own, opened, name, digest)


def _images(fabric: Fabric, params: Params, folder: Path) -> Path:
    path = folder / "images.h5"
    if fabric.is_global_zero and not path.exists():
        prepare_images(params, path)
    fabric.barrier()
    return path


def _study(
    fabric: Fabric, stage: Stage, params: Params, images: Images, name: str, digest: str
) -> None:
    classifier = build_classifier(params, len(images.classes))
    start = stage.folder / "start.safetensors"
    if fabric.is_global_zero:
        save_weights(start, classifier.state_dict(), {})
    history = train_classifier(
        fabric,
        classifier,
        training_batches(fabric, images, params),
        validation(fabric, images, params),
        training_plan(params),
        stage.folder,
        stage.reporter,
    )
    if not fabric.is_global_zero:
        return
    checkpoints = [Checkpoint(start, 0, 0.0), *_checkpoints(params, history, stage.folder)]
    sections = params.model_dump(mode="json", include=set(RUN_SECTIONS))
    provenance = {"run": name, "images": digest, **sections}
    inputs = _inputs(images, params)
    store = stage.folder / "store"
    manifest = describe_run(
        fabric,
        classifier,
        checkpoints,
        inputs,
        store,
        stage.reporter,
        provenance,
        step=len(history),
    )
    manifest.save(store)
    names = ["manifest.json", *(shard.file for shard in manifest.shards)]
    publish({file: store / file for file in names}, STUDY / name)
    if stage.run:
        stage.run.final({"checkpoints": len(checkpoints), "images": len(inputs)}, now())
        stage.run.file(STUDY / name / "manifest.json")


def _checkpoints(params: Params, history: Sequence[Point], folder: Path) -> list[Checkpoint]:
    """The points whose maturity is spread evenly, as the markers of the run define it."""
    losses = [point.train_loss for point in history]
    settings = params.markers.model_dump(exclude={"phases"})
    markers = epoch_markers(losses, 1, **settings)  # one phase: its end is all that is needed
    method = params.markers.method
    curve = maturity(losses, markers, alpha=params.markers.alpha, method=method).tolist()
    chosen = choose_points(curve, params.study.checkpoints)
    return [Checkpoint(point_file(folder, point), point, curve[point - 1]) for point in chosen]


def _inputs(images: Images, params: Params) -> Tensor:
    """The training images that are described, drawn at random, as the network takes them."""
    pixels, _ = images.load("train")
    order = torch.randperm(len(pixels), generator=generator(params.study.seed))
    chosen = pixels[order[: params.study.images]]
    return to_input(chosen, size=params.data.image_size, mean=images.mean, std=images.std)
