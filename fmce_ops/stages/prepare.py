"""Stage ``prepare``: the data set of params.yaml as one file of images."""

import time
from dataclasses import asdict
from pathlib import Path

from fmce_ops.data import prepare
from fmce_ops.files import file_digest, write_json
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import IMAGES, RESULTS, now, open_stage
from fmce_ops.tracking.location import home
from fmce_ops.training.reporter import Reporter, Row


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``data/images.h5`` and ``results/prepare.json``."""
    data = params.data
    outputs = [IMAGES, RESULTS / "prepare.json"]
    with open_stage("prepare", params, ["data"], outputs=outputs, progress=progress) as stage:
        stage.reporter.begin("prepare", 1)
        started = time.perf_counter()
        summary = prepare(
            data.dataset,
            IMAGES,
            root=home(Path.cwd()) / data.root,
            image_size=data.image_size,
            per_class=data.per_class,
            validation=data.validation,
            test=data.test,
            seed=data.seed,
        )
        elapsed = time.perf_counter() - started
        counts = {f"images_{split}": float(count) for split, count in summary.counts.items()}
        speed = sum(counts.values()) / elapsed
        write_json(RESULTS / "prepare.json", {**asdict(summary), "digest": _digest()})
        if stage.run:
            stage.run.dataset(IMAGES, data.dataset, _digest(), "prepared")
        stage.reporter.row(Row(1, {**counts, "images_per_second": speed}, now()))


def _digest() -> str:
    return file_digest(IMAGES, "md5")
