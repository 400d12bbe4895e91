"""Stage ``maturity``: a judge of runs that it has never seen, learned from the studied runs."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmce_ops.errors import ParamsError
from fmce_ops.files import write_json, write_table
from fmce_ops.maturity import DEPTHS, SIZES, VIEWS_OF_ONE, Judge, Score
from fmce_ops.maturity_figures import left_out_figure
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import RESULTS, STUDY, Stage, now, open_stage
from fmce_ops.tracking.registry import load_network, log_network, register
from fmce_ops.tracking.serving import Network
from fmce_ops.training.maturity import (
    JudgePlan,
    LeftOut,
    StudiedRun,
    certain_judge,
    judged,
    leave_out,
    summary,
)
from fmce_ops.training.reporter import Reporter
from fmce_ops.training.study import read_run

SECTIONS = ["maturity"]
NAME = "fmce-maturity"
METRICS, TABLE = RESULTS / "maturity.json", RESULTS / "maturity.csv"


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``results/maturity.json``, ``results/maturity.csv``; register ``fmce-maturity``."""
    names = list(params.maturity.runs)
    if len(names) < 2:
        raise ParamsError(
            f"maturity.runs has {len(names)} runs: give two or more, for a judge learns from some "
            "and is judged by others."
        )
    stores = [STUDY / name for name in names]
    outputs = [METRICS, TABLE]
    with open_stage(
        "maturity", params, SECTIONS, inputs=stores, outputs=outputs, progress=progress
    ) as stage:
        runs = [read_run(store, name) for store, name in zip(stores, names, strict=True)]
        plan = JudgePlan(steps=params.maturity.steps, seed=params.maturity.seed)
        found = leave_out(runs, plan, stage.reporter, now)
        judge = certain_judge(runs, plan)
        figures = _figures(found)
        write_json(METRICS, {"runs": names, "left_out": figures})
        write_table(TABLE, _rows(runs, found))
        stage.figure(_drawn(runs, found), "left_out.png")
        if stage.run:
            flat = {
                f"left_out/{size}/{name}": value
                for size, values in figures.items()
                for name, value in values.items()
            }
            stage.run.final(flat, now())
        _register(stage, judge, runs)


def _figures(found: dict[str, LeftOut]) -> dict[str, dict[str, float]]:
    """Of the last modules: for one image, and for the largest bag of images."""
    everyone = list(found.values())
    return {"image": summary(everyone, VIEWS_OF_ONE), "batch": summary(everyone)}


def _rows(runs: list[StudiedRun], found: dict[str, LeftOut]) -> list[list[object]]:
    """The largest bag of each checkpoint and module: the truth, and what its judge said."""
    rows: list[list[object]] = [["run", "module", "checkpoint", "maturity", "score", "low", "high"]]
    for run in runs:
        for module, name in enumerate(run.modules):
            for step, (truth, score) in enumerate(_largest(run, found[run.name], module)):
                rows.append([run.name, name, step, truth, score.value, score.low, score.high])
    return rows


def _largest(run: StudiedRun, found: LeftOut, module: int) -> list[tuple[float, Score]]:
    shape = run.descriptors.shape[:3]
    values = [
        part.view(shape)[:, -1, module].tolist() for part in (found.value, found.low, found.high)
    ]
    truth = run.maturity[:, module].tolist()
    return [(true, Score(*said)) for true, *said in zip(truth, *values, strict=True)]


def _drawn(runs: list[StudiedRun], found: dict[str, LeftOut]) -> Any:
    last = {run.name: _largest(run, found[run.name], len(run.modules) - 1) for run in runs}
    return left_out_figure(last, "Each run by a judge that never saw it, last module")


def _register(stage: Stage, judge: Judge, runs: list[StudiedRun]) -> None:
    if stage.run is None:
        return
    shape = {"width": judge.width, "members": judge.members}
    spec = {**shape, "sizes": list(SIZES), "depths": DEPTHS}
    network = Network("maturity", spec, {"runs": dict(stage.inputs)})
    example = np.random.default_rng(0).random((2, 8, 4, 4), dtype=np.float32)
    uri = log_network(stage.run, NAME, network, judge.state_dict(), example)

    def on_the_same_runs(folder: Path) -> float | None:
        standing, champion = load_network(folder)
        if standing.kind != "maturity" or not isinstance(champion, Judge):
            return None
        return _closeness(champion, runs)

    made = register(stage.run, NAME, uri, _closeness(judge, runs), on_the_same_runs)
    stage.run.tags({"fmce.registered": f"{made.name} version {made.version} ({made.alias})"})


def _closeness(judge: Judge, runs: list[StudiedRun]) -> float:
    """How near to the truth on all rows of the runs: 1 less the mean absolute error."""
    with torch.no_grad():
        errors = [(judged(judge, run).value - run.rows()[2]).abs().mean() for run in runs]
    return 1 - float(torch.stack(errors).mean())
