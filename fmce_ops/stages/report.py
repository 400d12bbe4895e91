"""Stage ``report``: everything that the pipeline found, on one self-contained page."""

import base64
import csv
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from fmce_ops import __version__
from fmce_ops.files import write_text
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import LOSSES, MARKERS, RESULTS, open_stage
from fmce_ops.training.reporter import Reporter

REPORT = RESULTS / "report.html"
PICTURES = {
    "curve": RESULTS / "markers" / "curve.png",
    "gradcam": RESULTS / "features" / "gradcam.png",
    "confusion": RESULTS / "fmce" / "confusion.png",
    "arms": RESULTS / "posttrain" / "arms.png",
    "tradeoff": RESULTS / "pathways" / "tradeoff.png",
    "similarity": RESULTS / "pathways" / "similarity.png",
    "needed": RESULTS / "pathways" / "needed.png",
    "detection": RESULTS / "pathways" / "detection.png",
    "left_out": RESULTS / "maturity" / "left_out.png",
}
FACTS = {
    name: RESULTS / f"{name}.json"
    for name in ("prepare", "train", "features", "fmce", "posttrain", "pathways", "maturity")
}


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``results/report.html``."""
    inputs = [LOSSES, MARKERS, *FACTS.values(), *PICTURES.values()]
    with open_stage(
        "report",
        params,
        list(Params.model_fields),
        inputs=inputs,
        outputs=[REPORT],
        progress=progress,
    ) as stage:
        write_text(REPORT, _page(params))
        if stage.run:
            stage.run.file(REPORT)


def _page(params: Params) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(
        (files("fmce_ops") / "templates" / "report.html").read_text(encoding="utf-8")
    )
    facts: dict[str, Any] = {name: json.loads(path.read_text()) for name, path in FACTS.items()}
    return template.render(
        title=params.report.title,
        params=params.model_dump(mode="json"),
        version=__version__,
        markers=json.loads(MARKERS.read_text()),
        pictures={name: _embedded(path) for name, path in PICTURES.items()},
        targets=[_embedded(path) for path in sorted((RESULTS / "posttrain").glob("targets-*.png"))],
        epochs=list(csv.DictReader((RESULTS / "fmce.csv").read_text().splitlines())),
        **facts,
    )


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
