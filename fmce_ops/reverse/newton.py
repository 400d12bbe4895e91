"""Damped Gauss-Newton: the reverse step of any differentiable module."""

from dataclasses import replace

import torch
from torch import Tensor

from fmce_ops.reverse.problem import Problem, Search
from fmce_ops.reverse.products import Linearised, output_of
from fmce_ops.reverse.relus import Smooth
from fmce_ops.reverse.solver import Solution, least_squares, norms, spread

_LEAST, _SHARE = 6, 8  # iterations of a step: so many, or this part of those before it
_FORCING = 0.1  # part of the residual that a step may leave over
_HALVINGS = 6
_STALLED = 1e-3  # a step that promises to take less than this part of the residual is none
_POOR = 0.9  # part of the residual left by a step whose kinks were too wide
_NARROWEST, _WIDTH, _WIDEST = 1e-3, 3e-2, 0.3  # of kinks, the second to begin with


def gauss_newton(problem: Problem, search: Search, limit: Tensor) -> None:
    """Improve ``search`` until the distance is within the goal or no step helps.

    Every step minimises |J d - r|^2 + damping^2 |x + d - x0|^2 by `least_squares` and is halved
    until the residual falls. J takes ReLUs for smooth ones, see `Linearised`: with the true
    derivative, which knows no unit that rests, the search ends in local minima. The kinks get wider
    after a good step and narrower after a poor one; a sample is done when the narrowest bring
    nothing and all widths before them, from the widest, brought nothing either.

    Parameters
    ----------
    limit : (n,) iterations of the least-squares solver, those before included.
    """
    width = torch.full_like(problem.goal, _WIDTH)
    swept = torch.full_like(problem.goal, torch.inf)  # distances when the narrowest failed
    rows = ((search.distance > problem.goal) & (search.iterations < limit)).nonzero()[:, 0]
    while len(rows):
        here, x = problem.take(rows), search.x[rows]
        linearised = Linearised(here.module, x, here.target, Smooth(width[rows]))
        spent = search.iterations[rows]
        most = torch.minimum((spent // _SHARE).clamp(min=_LEAST), limit[rows] - spent)
        step = _step(here, x, linearised, most)
        search.iterations[rows] += step.iterations.clamp(min=1)
        merit = here.merit(linearised.output.rest(here.target), x)
        left = _descend(problem, search, rows, step.step, merit)
        failed, smoothed, distance = left == 1, linearised.output.rectified, search.distance[rows]
        del linearised, step  # before the next takes its memory
        swept_now = failed & (width[rows] <= _NARROWEST)
        done = (swept_now & (distance >= swept[rows])) | (failed & (not smoothed))
        over = search.iterations[rows] >= limit[rows]
        search.stationary[rows] = done | swept_now | (failed & over)
        swept[rows] = torch.where(swept_now, distance, swept[rows])
        wider = (width[rows] * torch.where(left > _POOR, 0.5, 2.0)).clamp(_NARROWEST, _WIDEST)
        width[rows] = torch.where(swept_now, _WIDEST, wider)
        done |= (distance <= here.goal) | over
        rows = rows[~done]


def _step(problem: Problem, x: Tensor, linearised: Linearised, most: Tensor) -> Solution:
    """The Gauss-Newton step; 0 where it promises nothing."""
    gradient, length = downhill(problem, x, linearised), problem.merit(linearised.rest, x)
    wanted = (problem.goal / length.clamp(min=1e-300) / 2).clamp(min=_FORCING)
    found = least_squares(linearised, gradient, length, problem.damping, wanted, most)
    promising = found.residual < (1 - _STALLED) * length
    return replace(found, step=found.step * spread(promising, x))


def downhill(problem: Problem, x: Tensor, linearised: Linearised) -> Tensor:
    """(n, ...) the direction in which half the squared merit falls most steeply."""
    pulled = linearised.pull(linearised.rest)
    return pulled - spread(problem.damping.square(), x) * (x - problem.x0)


def _descend(problem: Problem, search: Search, rows: Tensor, step: Tensor, merit: Tensor) -> Tensor:
    """Take the steps, halved until they lower the merit.

    Returns
    -------
    (n,) the part of the merit that is left, 1 where no step was taken.
    """
    left = torch.ones_like(merit)
    some = norms(step) > 0
    for halving in range(_HALVINGS):
        tried = (some & (left == 1)).nonzero()[:, 0]
        if not len(tried):
            break
        here = problem.take(rows[tried])
        x = search.x[rows[tried]] + step[tried] * 0.5**halving
        output = output_of(here.module, x)
        ratio = here.merit(output.rest(here.target), x) / merit[tried]
        lower = (ratio < 1 - _STALLED) & (norms(x - here.x0) <= here.bound)
        taken = rows[tried[lower]]
        search.x[taken] = x[lower]
        search.distance[taken] = output.distance(here.target)[lower]
        left[tried[lower]] = ratio[lower]
    return left
