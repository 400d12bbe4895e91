"""Stage ``markers``: from the loss curve to K checkpoints, one for each score."""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from fmce_ops.convergence import Markers, cqi, epoch_markers
from fmce_ops.data import Images
from fmce_ops.figures import curve_figure
from fmce_ops.files import write_json
from fmce_ops.models import load_weights
from fmce_ops.stages.networks import describe_classifier
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import (
    CHECKPOINTS,
    IMAGES,
    LOSSES,
    MARKERS,
    PHASES,
    Stage,
    now,
    open_stage,
)
from fmce_ops.stages.work import publish, vouched
from fmce_ops.tracking.registry import log_network
from fmce_ops.training.losses import Point, read_losses
from fmce_ops.training.reporter import Reporter, Row

SECTIONS = ["data", "model", "markers"]


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``results/markers.json``, ``data/phases/`` and the figure of the curve."""
    with open_stage(
        "markers",
        params,
        SECTIONS,
        inputs=[IMAGES, LOSSES, CHECKPOINTS],
        outputs=[MARKERS, PHASES],
        progress=progress,
    ) as stage:
        settings = params.markers
        history = read_losses(LOSSES)
        losses = [point.train_loss for point in history]
        markers = epoch_markers(losses, **settings.model_dump())
        checkpoints = vouched(CHECKPOINTS)
        chosen = {phase_file(k): checkpoints[p - 1] for k, p in enumerate(markers.points, 1)}
        publish(chosen, PHASES)
        options = settings.model_dump(include={"alpha", "window", "method"})
        write_json(MARKERS, _record(markers, history))
        stage.figure(curve_figure(losses, markers, **options), "curve.png")
        _report(stage, markers, history, cqi(losses, **options).tolist())
        _log_checkpoints(stage, params, markers)


def phase_file(phase: int) -> str:
    """The name of the weights that made score ``phase``."""
    return f"phase-{phase:02d}.safetensors"


def _record(markers: Markers, history: Sequence[Point]) -> dict[str, object]:
    chosen = [history[point - 1] for point in markers.points]
    return {
        **asdict(markers),
        "epochs": [point.epoch for point in chosen],
        "losses": [point.train_loss for point in chosen],
        "val_accuracy": [point.val_accuracy for point in chosen],
    }


def _report(
    stage: Stage, markers: Markers, history: Sequence[Point], indicator: list[float]
) -> None:
    """One row a phase; what the run has once is kept as its final figures."""
    stage.reporter.begin("markers", len(markers.points))
    for phase, point in enumerate(markers.points, start=1):
        values = {"marker/point": float(point), "marker/epoch": history[point - 1].epoch}
        values |= {"marker/loss": history[point - 1].train_loss, "marker/cqi": indicator[point - 1]}
        finite = {name: value for name, value in values.items() if value == value}
        stage.reporter.row(Row(phase, finite, now()))
    if stage.run:
        stage.run.tags({"fmce.converged": str(markers.converged).lower()})
        stage.run.final({"mu": markers.mu, "converged": float(markers.converged)}, now())
        stage.run.file(MARKERS)


def _log_checkpoints(stage: Stage, params: Params, markers: Markers) -> None:
    if stage.run is None:
        return
    with Images.open(IMAGES) as images:
        network = describe_classifier(params, images, stage.inputs[str(IMAGES)])
        example = images.read("train", 0, 2)[0].to(torch.float32).numpy()
    for phase, point in enumerate(markers.points, start=1):
        state, _ = load_weights(PHASES / phase_file(phase))
        log_network(stage.run, f"phase-{phase:02d}", network, state, example, step=point)
