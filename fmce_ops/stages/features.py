"""Stage ``features``: the FMCS shards, and where the network looked at each phase."""

import time
from pathlib import Path

import numpy as np

from fmce_ops.data import Images, to_input
from fmce_ops.figures import gradcam, gradcam_figure
from fmce_ops.files import write_json
from fmce_ops.models import Classifier, feature_shape, load_into
from fmce_ops.shards import Manifest, Shard
from fmce_ops.stages.networks import build_classifier
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import (
    FMCS,
    IMAGES,
    MARKERS,
    PHASES,
    RESULTS,
    Stage,
    now,
    open_stage,
)
from fmce_ops.stages.work import publish, vouched
from fmce_ops.training.devices import launch
from fmce_ops.training.features import Extraction, extract
from fmce_ops.training.reporter import Reporter

SECTIONS = ["data", "model", "features"]
METRICS = RESULTS / "features.json"
GRADCAM_IMAGES = 5


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``data/fmcs/``, ``results/features.json`` and the Grad-CAM grid."""
    fabric = launch(params.train.precision)
    with (
        open_stage(
            "features",
            params,
            SECTIONS,
            inputs=[IMAGES, PHASES, MARKERS],
            outputs=[FMCS, METRICS],
            progress=progress,
            fabric=fabric,
        ) as stage,
        Images.open(IMAGES) as images,
    ):
        checkpoints = vouched(PHASES)
        classifier = build_classifier(params, len(images.classes))
        settings = Extraction(
            shape=feature_shape(classifier, params.data.image_size),
            size=params.data.image_size,
            **params.features.model_dump(),
        )
        started = time.perf_counter()
        shards = extract(
            fabric, classifier, checkpoints, images, settings, stage.folder, stage.reporter
        )
        elapsed = time.perf_counter() - started
        if fabric.is_global_zero:
            manifest = _manifest(stage, params, images, settings, shards)
            _publish(manifest, stage)
            _report(stage, manifest, elapsed)
            _draw(stage, classifier.cpu(), checkpoints, images, settings.size)


def _manifest(
    stage: Stage, params: Params, images: Images, settings: Extraction, shards: list[Shard]
) -> Manifest:
    provenance = {
        "dataset": params.data.dataset,
        "images": stage.inputs[str(IMAGES)],
        "checkpoints": stage.inputs[str(PHASES)],
        "model": params.model.model_dump(),
    }
    return Manifest(
        dtype=settings.dtype,
        compression=settings.compression,
        shape=settings.shape,
        phases=max(shard.phase for shard in shards),
        images=images.counts["train"],
        shards=tuple(shards),
        classes=len(images.classes),
        provenance=provenance,
    )


def _publish(manifest: Manifest, stage: Stage) -> None:
    manifest.save(stage.folder)
    names = ["manifest.json", *(shard.file for shard in manifest.shards)]
    publish({name: stage.folder / name for name in names}, FMCS)


def _report(stage: Stage, manifest: Manifest, seconds: float) -> None:
    maps = manifest.phases * manifest.images
    size = sum(shard.bytes for shard in manifest.shards)
    facts = {
        "maps": maps,
        "phases": manifest.phases,
        "images": manifest.images,
        "bytes": size,
        "shards": len(manifest.shards),
        "shape": list(manifest.shape),
    }
    write_json(METRICS, facts)
    if stage.run:
        figures = {"maps": maps, "bytes": size, "maps_per_second": maps / seconds}
        stage.run.final(figures, now())
        stage.run.file(FMCS / "manifest.json")


def _draw(
    stage: Stage, classifier: Classifier, checkpoints: list[Path], images: Images, size: int
) -> None:
    pixels, labels = images.read("train", 0, GRADCAM_IMAGES)
    inputs = to_input(pixels, size=size, mean=images.mean, std=images.std)
    heat = []
    for checkpoint in checkpoints:
        load_into(classifier, checkpoint)
        heat.append(gradcam(classifier, inputs, labels))
    names = [images.classes[label] for label in labels.tolist()]
    points = _points()
    stage.figure(gradcam_figure(pixels, names, np.stack(heat), points), "gradcam.png")


def _points() -> list[int]:
    import json

    return list(json.loads(MARKERS.read_text())["points"])
