"""The judge of maturity: learn it from runs, and find out how far it errs on runs left out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from scipy.stats import spearmanr
from torch import Tensor

from fmce_ops.maturity import (
    FEWEST,
    Electorate,
    Judge,
    cells,
    depths,
    kinds,
    margin,
    reading,
)
from fmce_ops.training.reporter import Reporter, Row

_NOISE, _DROP, _WEIGHT_DECAY = 0.1, 0.2, 0.05
_FOLDS = 5  # groups of runs that are left out in turn to find the intervals


@dataclass(frozen=True)
class StudiedRun:
    """What is known of one run.

    Attributes
    ----------
    name : of the run.
    modules : names of its functional modules, first to last.
    descriptors : (checkpoints, bags, modules, DESCRIPTORS).
    start : (bags, modules, DESCRIPTORS), of the network with random weights; NaN if not known.
    maturity : (checkpoints, modules), the truth.
    """

    name: str
    modules: tuple[str, ...]
    descriptors: Tensor
    start: Tensor
    maturity: Tensor

    def rows(self, *, alone: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """What is read (n, READ), depth (n,) and maturity (n,) of every bag of a module.

        ``alone``: without its network and its start.
        """
        shape = self.descriptors.shape[:3]
        depth = depths(shape[2]).expand(shape)
        truth = self.maturity[:, None].expand(shape)
        known = {} if alone else {"start": self.start, "network": self.descriptors}
        read = reading(self.descriptors, **known).flatten(0, 2)
        return read, depth.flatten(), truth.flatten()


@dataclass(frozen=True)
class JudgePlan:
    """How to learn: absolute errors, AdamW with half a cosine, and every size drawn as often.

    Attributes
    ----------
    members : of each pattern, see ``Judge``.
    """

    steps: int
    batch_size: int = 256
    lr: float = 3e-3
    width: int = 64
    members: int = 2
    seed: int = 0


@dataclass(frozen=True)
class LeftOut:
    """What judges said of a run that they had not seen: a row for every bag of a module.

    Attributes
    ----------
    value, low, high, truth : (n,)
    size : (n,) of the images, as in ``Judge.margins``.
    depth : (n,) where the module lies, 0 the first to 1 the last.
    """

    value: Tensor
    low: Tensor
    high: Tensor
    truth: Tensor
    size: Tensor
    depth: Tensor


def fit_judge(runs: Sequence[StudiedRun], plan: JudgePlan) -> Judge:
    """A judge that has learned from all of the runs; its intervals are not yet known."""
    rows = [run.rows() for run in runs]
    shares = _equal_shares(rows)
    read, depth, truth = (torch.cat(part) for part in zip(*rows, strict=True))
    of = kinds(read)
    torch.manual_seed(plan.seed)
    judge = Judge(plan.width, plan.members)
    for kind in of.unique().tolist():
        chosen = of == kind
        known = read[chosen], depth[chosen], truth[chosen], shares[chosen]
        _fit(judge.electorate(kind), *known, plan)
    return judge.eval()


def _fit(
    voters: Electorate, read: Tensor, depth: Tensor, truth: Tensor, shares: Tensor, plan: JudgePlan
) -> None:
    """Train those who vote on rows of one kind, drawn with their shares."""
    known = torch.cat([read, depth[:, None]], dim=1).nan_to_num(0.0)
    voters.mean.copy_(known.mean(0))
    voters.std.copy_(known.std(0, correction=0).clamp_min(1e-3))
    inputs = voters.standardised(read, depth)
    drawn = torch.multinomial(shares, plan.steps * plan.batch_size, replacement=True)
    optimizer = torch.optim.AdamW(
        voters.parameters(), lr=plan.lr, weight_decay=_WEIGHT_DECAY, fused=True
    )
    for step, chosen in enumerate(drawn.split(plan.batch_size)):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * (1 + math.cos(math.pi * step / plan.steps)) / 2
        clean = inputs[chosen]
        kept = torch.rand(plan.members, len(clean), plan.width) > _DROP
        noisy = clean + _NOISE * torch.randn_like(clean)
        votes = voters.votes(noisy, kept / (1 - _DROP))
        loss = (votes - truth[chosen]).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def calibrate(judge: Judge, errors: Sequence[Tensor]) -> None:
    """Set the judge's margins from the errors of judges on runs that they had not seen.

    ``errors``: of each run (n, 4), the absolute errors in doubts, with their cells.
    """
    for cell in product(*map(range, judge.margins.shape)):
        chosen = [run[(run[:, 1:] == torch.tensor(cell)).all(1), 0] for run in errors]
        chosen = [part for part in chosen if len(part)]
        judge.margins[cell] = margin(chosen) if chosen else torch.inf
    for size in range(1, judge.margins.shape[1]):  # where there are no examples of a size
        own, fewer = judge.margins[:, size], judge.margins[:, size - 1]
        judge.margins[:, size] = torch.where(own.isinf(), fewer, own)


def left_out_errors(
    runs: Sequence[StudiedRun], plan: JudgePlan, folds: int = _FOLDS
) -> list[Tensor]:
    """Errors (n, 4) in doubts on each run of a judge that learned from runs of other folds."""
    folds = min(folds, len(runs))
    found = []
    for fold in range(folds):
        others = [run for i, run in enumerate(runs) if i % folds != fold]
        judge = fit_judge(others, plan)
        found += [_errors(judge, run) for run in runs[fold::folds]]
    return found


def certain_judge(runs: Sequence[StudiedRun], plan: JudgePlan, folds: int = _FOLDS) -> Judge:
    """A judge that has learned from all of the runs, with the intervals that runs left out give.

    Fewer than FEWEST runs bear no interval but the whole scale.
    """
    judge = fit_judge(runs, plan)
    if len(runs) >= FEWEST:
        calibrate(judge, left_out_errors(runs, plan, folds))
    return judge


def leave_out(
    runs: Sequence[StudiedRun],
    plan: JudgePlan,
    reporter: Reporter,
    clock: Callable[[], int],
    *,
    folds: int = _FOLDS,
) -> dict[str, LeftOut]:
    """Judge each run by a judge, intervals and all, that never saw it."""
    reporter.begin("maturity", len(runs))
    found = {}
    for step, run in enumerate(runs, start=1):
        others = [other for other in runs if other is not run]
        found[run.name] = judged(certain_judge(others, plan, folds), run)
        figures = {f"left_out/{k}": v for k, v in summary([found[run.name]]).items()}
        reporter.row(Row(step, figures, clock()))
    return found


def judged(judge: Judge, run: StudiedRun) -> LeftOut:
    """What the judge says of a run."""
    rows, depth, truth = run.rows()
    scores = judge.scores(rows, depth)
    value, low, high = (
        torch.tensor([getattr(score, name) for score in scores])
        for name in ("value", "low", "high")
    )
    return LeftOut(value, low, high, truth, cells(rows, depth)[1], depth)


def summary(
    found: Sequence[LeftOut], size: int | None = None, *, depth: float = 1.0
) -> dict[str, float]:
    """Mean over runs of Spearman, mean absolute error, coverage and width of the interval.

    Parameters
    ----------
    size : of the images, as in ``LeftOut``; None: the largest.
    depth : of the modules that are looked at, 1 the last of each network.
    """
    figures: list[Mapping[str, float]] = []
    for run in found:
        there = run.depth == depth
        chosen = there & (run.size == (run.size.max() if size is None else size))
        value, truth = run.value[chosen], run.truth[chosen]
        inside = (run.low[chosen] <= truth + 1e-6) & (truth <= run.high[chosen] + 1e-6)
        flat = len(truth.unique()) < 2 or len(value.unique()) < 2
        figures.append(
            {
                "spearman": 0.0 if flat else float(spearmanr(value, truth).statistic),
                "error": (value - truth).abs().mean().item(),
                "coverage": inside.float().mean().item(),
                "width": (run.high[chosen] - run.low[chosen]).mean().item(),
            }
        )
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}


def _errors(judge: Judge, run: StudiedRun) -> Tensor:
    """Of every module with its network and its start, and alone: (n, 4), error and cell."""
    found = []
    for alone in (False, True):
        rows, depth, truth = run.rows(alone=alone)
        with torch.no_grad():
            value, doubt = judge(rows, depth)
        error = (value - truth).abs() / doubt
        found.append(torch.stack([error, *cells(rows, depth)], dim=1))
    return torch.cat(found)


def _equal_shares(rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Weights (n,) with which every run, and in it every size, is drawn equally often."""
    parts = []
    for read, depth, _ in rows:
        _, size, _ = cells(read, depth)
        parts.append(1 / size.bincount()[size])
    return torch.cat(parts)


__all__ = [
    "JudgePlan",
    "LeftOut",
    "StudiedRun",
    "calibrate",
    "certain_judge",
    "fit_judge",
    "judged",
    "leave_out",
    "left_out_errors",
    "summary",
]
