"""Stage ``pathways``: the path that an image takes through the filters, and what it is good for."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.data import Images
from fmce_ops.files import write_json, write_table
from fmce_ops.path_figures import (
    detection_figure,
    needs_figure,
    profiles_figure,
    similarity_figure,
    tradeoff_figure,
)
from fmce_ops.pathways import (
    PathNetwork,
    compact,
    fixed,
    most_open,
    path_codes,
    profiles,
    similarity,
    split_code,
)
from fmce_ops.shards import write_codes
from fmce_ops.stages.champion import on_validation
from fmce_ops.stages.networks import describe_classifier, trained_classifier
from fmce_ops.stages.params import Params
from fmce_ops.stages.path_study import Judged, Outcome, Study
from fmce_ops.stages.stage import CHECKPOINTS, IMAGES, PATHS, RESULTS, now, open_stage
from fmce_ops.tracking.registry import log_network, register
from fmce_ops.tracking.serving import Network
from fmce_ops.training.adversarial import Detection
from fmce_ops.training.devices import launch
from fmce_ops.training.latency import milliseconds
from fmce_ops.training.pathways import Need, confirm_needed, judge_paths
from fmce_ops.training.reporter import Reporter

SECTIONS = ["data", "model", "pathways"]
NAME = "fmce-pathways"
METRICS, TABLE = RESULTS / "pathways.json", RESULTS / "pathways.csv"
SPEED = RESULTS / "pathways" / "speed.json"  # apart: no two measurements are the same
_KINDS = ("paths", "shared", "pruned")
_FINALS = ("val_accuracy", "test_accuracy", "multiply_adds")
_BATCH, _TIMED = 64, 512  # images that are timed together, and that they are taken from
_READ = 512  # images whose paths are read at a time


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``results/pathways.json``, ``pathways.csv``, ``data/paths.h5``; register the best."""
    fabric = launch()
    with (
        open_stage(
            "pathways",
            params,
            SECTIONS,
            inputs=[IMAGES, CHECKPOINTS],
            outputs=[METRICS, TABLE, PATHS],
            progress=progress,
            fabric=fabric,
        ) as stage,
        Images.open(IMAGES) as images,
    ):
        classifier = trained_classifier(params, len(images.classes))
        study = Study(fabric, stage, params, images, classifier)
        outcomes = [study.outcome(ratio) for ratio in params.pathways.ratios]
        if fabric.is_global_zero:
            _publish(study, outcomes)


def choose(dense: float, accuracies: Sequence[float], costs: Sequence[float], loss: float) -> int:
    """The cheapest network that loses at most ``loss`` on validation, else the most accurate one.

    Parameters
    ----------
    dense : accuracy of the network without gates.
    """
    good = [i for i, accuracy in enumerate(accuracies) if accuracy >= dense - loss]
    if good:
        return min(good, key=lambda i: costs[i])
    return max(range(len(accuracies)), key=lambda i: accuracies[i])


def _publish(study: Study, outcomes: list[Outcome]) -> None:
    stage, names = study.stage, list(study.images.classes)
    dense = study.judged(study.gated, controllers=False)
    chosen = outcomes[
        choose(
            dense.val_accuracy,
            [outcome.paths.val_accuracy for outcome in outcomes],
            [outcome.paths.multiply_adds for outcome in outcomes],
            study.params.pathways.tolerance,
        )
    ]
    network = chosen.paths.network
    detection = study.detection(network)
    told = _interpret(study, network)
    network.cpu()
    summary = {
        **_tradeoff(dense, outcomes, chosen),
        "auc": {
            attack: {name: curve.auc for name, curve in curves.items()}
            for attack, curves in detection.curves.items()
        },
        "accuracy_under_attack": detection.accuracy,
        "similarity": _similarity(told.alike),
        "needed_filters": [_need(need) for need in told.needs],
    }
    speed = _speed(study, outcomes)
    write_json(METRICS, summary)
    write_json(SPEED, speed)
    write_table(TABLE, _rows(outcomes))
    write_codes(
        PATHS,
        split_code(network, told.codes),
        told.labels,
        split_code(network, told.profiles),
    )
    stage.figure(tradeoff_figure(summary, speed), "tradeoff.png")
    stage.figure(similarity_figure(told.alike, names), "similarity.png")
    stage.figure(profiles_figure(split_code(network, told.profiles), names), "filters.png")
    stage.figure(needs_figure(told.needs, names), "needed.png")
    stage.figure(detection_figure(detection), "detection.png")
    if stage.run:
        _log(study, summary, speed)
        _register(study, chosen, told.profiles, detection)


@dataclass(frozen=True)
class _Interpretation:
    """What the paths of a network tell.

    Attributes
    ----------
    codes, labels : (N, gates) and (N,) of the test images.
    profiles : (K, gates) of the training images.
    alike : (K, K) agreement of test images.
    """

    codes: Tensor
    labels: Tensor
    profiles: Tensor
    alike: Tensor
    needs: list[Need]


def _interpret(study: Study, network: nn.Module) -> _Interpretation:
    test, settings, classes = study.split("test"), study.params.pathways, len(study.images.classes)
    codes, labels = judge_paths(network, test)[2], test.labels.cpu()
    found = profiles(*_learnt(study, network), classes)
    shown = study.split("test", settings.attacked)
    needs = confirm_needed(network, found, shown, settings.seed)
    return _Interpretation(codes, labels, found, similarity(codes, labels, classes), needs)


def _tradeoff(dense: Judged, outcomes: Sequence[Outcome], chosen: Outcome) -> dict[str, Any]:
    """Accuracy and multiply-adds of every network."""
    return {
        "dense": _record(dense),
        "ratios": [
            {
                "ratio": outcome.ratio,
                "open": float(outcome.codes.float().mean()),
                "closed_layers": _closed(outcome),
                **{kind: _record(getattr(outcome, kind)) for kind in _KINDS},
            }
            for outcome in outcomes
        ],
        "chosen_ratio": chosen.ratio,
        "val_accuracy": chosen.paths.val_accuracy,
        "test_accuracy": chosen.paths.test_accuracy,
        "multiply_adds": chosen.paths.multiply_adds / dense.multiply_adds,
    }


def _learnt(study: Study, network: nn.Module) -> tuple[Tensor, Tensor]:
    """Codes and labels of training images."""
    pixels, labels = study.images.load("train")
    device = study.fabric.device
    parts = pixels.split(_READ)
    codes = [path_codes(network, study.pixels.input(part.to(device))).cpu() for part in parts]
    return torch.cat(codes), labels


def _record(found: Judged) -> dict[str, float]:
    return {
        "val_accuracy": found.val_accuracy,
        "test_accuracy": found.test_accuracy,
        "multiply_adds": found.multiply_adds,
    }


def _closed(outcome: Outcome) -> list[str]:
    """Layers whose gates are closed for every validation image at the end."""
    return [name for name, share in outcome.history[-1].open.items() if share == 0]


def _similarity(alike: Tensor) -> dict[str, float | None]:
    """Mean agreement of paths within and between classes; None where no gate varies."""
    same = torch.eye(len(alike), dtype=torch.bool)
    return {
        "within": _finite(float(alike[same].nanmean())),
        "between": _finite(float(alike[~same].nanmean())),
    }


def _need(need: Need) -> dict[str, Any]:
    """None in place of the accuracy of a class that has no images."""
    own, others = ([_finite(value) for value in part] for part in (need.own, need.others))
    return {"label": need.label, "filters": need.filters, "own": own, "others": others}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _speed(study: Study, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Milliseconds of an image, alone and in a batch; every network as it is best run.

    Paths are timed on a batch that is sorted by label, so that its paths are as alike as can be.
    """
    pixels, labels = study.images.read("test", 0, min(_TIMED, study.images.counts["test"]))
    inputs, order = study.pixels.input(pixels), labels.argsort(stable=True)
    alike, first = inputs[order][:_BATCH], labels[order[0]]
    of_first = study.images.load("val")[1] == first
    everything = torch.ones(outcomes[0].codes.shape[1], dtype=torch.bool)

    def timed(network: nn.Module, batch: Tensor = inputs[:_BATCH]) -> dict[str, float]:
        return {"alone": milliseconds(network, inputs[:1]), "batch": milliseconds(network, batch)}

    found: dict[str, Any] = {"dense": timed(fixed(study.gated, everything)), "ratios": []}
    for outcome in outcomes:
        found["ratios"].append(
            {
                "paths": timed(compact(outcome.paths.network), alike),
                "class": timed(
                    fixed(outcome.paths.network, most_open(outcome.codes[of_first])), alike
                ),
                "shared": timed(fixed(outcome.paths.network, outcome.common)),
                "pruned": timed(fixed(outcome.pruned.network, outcome.kept)),
            }
        )
    return found


def _rows(outcomes: Sequence[Outcome]) -> list[list[object]]:
    """Every epoch of every ratio."""
    rows: list[list[object]] = []
    for outcome in outcomes:
        for epoch in outcome.history:
            values = {k: v for k, v in epoch.row().values.items() if k != "images_per_second"}
            if not rows:
                rows.append(["ratio", *values])
            rows.append([outcome.ratio, *values.values()])
    return rows


def _log(study: Study, summary: dict[str, Any], speed: dict[str, Any]) -> None:
    run = study.stage.run
    assert run is not None
    finals = {
        f"auc/{a}/{d}": auc for a, found in summary["auc"].items() for d, auc in found.items()
    }
    finals |= {f"final/{name}": summary[name] for name in _FINALS}
    finals["ms_alone/dense"] = speed["dense"]["alone"]
    for row, times in zip(summary["ratios"], speed["ratios"], strict=True):
        for kind in _KINDS:
            finals[f"ms_alone/{kind}_{row['ratio']:g}"] = times[kind]["alone"]
    run.final({name.replace(" ", "_"): value for name, value in finals.items()}, now())
    closed = {f"{row['ratio']:g}": row["closed_layers"] for row in summary["ratios"]}
    run.tags({"fmce.closed_layers": json.dumps(closed)})
    for path in (METRICS, SPEED, TABLE):
        run.file(path)


def _register(study: Study, chosen: Outcome, found: Tensor, detection: Detection) -> None:
    run, images = study.stage.run, study.images
    assert run is not None
    modules = study.params.pathways.modules
    plain = describe_classifier(study.params, images, study.stage.inputs[str(IMAGES)])
    network = Network("pathways", {**plain.spec, "modules": modules}, plain.made_from)
    served = PathNetwork(study.classifier, len(images.classes), modules)
    served.gated.load_state_dict(chosen.paths.network.state_dict())
    served.profiles.copy_(found)
    with torch.no_grad():
        served.detector.weight.copy_(torch.from_numpy(detection.detector.weight))
        served.detector.bias.fill_(detection.detector.bias)
    example = images.read("train", 0, 2)[0].to(torch.float32).numpy()
    step = len(chosen.history)
    uri = log_network(run, NAME, network, served.state_dict(), example, step=step)

    judge = on_validation(network, images, study.fabric.device)
    made = register(run, NAME, uri, chosen.paths.val_accuracy, judge)
    run.tags({"fmce.registered": f"{made.name} version {made.version} ({made.alias})"})
