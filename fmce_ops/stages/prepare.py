"""Stage ``prepare``: the data set of params.yaml as one file of images."""

import time
from dataclasses import asdict
from pathlib import Path

from fmce_ops.data import ImagesSummary, prepare
from fmce_ops.files import file_digest, write_json
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import IMAGES, RESULTS, now, open_stage
from fmce_ops.tracking.location import home
from fmce_ops.training.reporter import Reporter, Row


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``data/images.h5`` and ``results/prepare.json``."""
    outputs = [IMAGES, RESULTS / "prepare.json"]
    with open_stage("prepare", params, ["data"], outputs=outputs, progress=progress) as stage:
        stage.reporter.begin("prepare", 1)
        started = time.perf_counter()
        summary = prepare_images(params, IMAGES)
        elapsed = time.perf_counter() - started
        counts = {f"images_{split}": float(count) for split, count in summary.counts.items()}
        speed = sum(counts.values()) / elapsed
        write_json(RESULTS / "prepare.json", {**asdict(summary), "digest": _digest()})
        if stage.run:
            stage.run.dataset(IMAGES, params.data.dataset, _digest(), "prepared")
        stage.reporter.row(Row(1, {**counts, "images_per_second": speed}, now()))


def prepare_images(params: Params, out: Path) -> ImagesSummary:
    """Write the data set of ``params`` to ``out``."""
    settings = params.data.model_dump(exclude={"dataset", "root"})
    root = home(Path.cwd()) / params.data.root
    return prepare(params.data.dataset, out, root=root, **settings)


def _digest() -> str:
    return file_digest(IMAGES, "md5")
