"""The search for the input: two methods that help one another."""

import torch
from torch import Tensor

from fmce_ops.reverse.newton import gauss_newton
from fmce_ops.reverse.problem import Problem, Search
from fmce_ops.reverse.quasi_newton import lbfgs
from fmce_ops.reverse.solver import norms

_BLOCK = 500  # iterations of a method before the other one has its turn


def descend(problem: Problem, search: Search, max_iterations: int) -> None:
    """Bring ``search`` down to the goal, or as far as it goes.

    Gauss-Newton wakes units at rest, but is slow where the linearised problem is badly conditioned.
    L-BFGS is fast there and ends in the nearest local minimum. So Gauss-Newton goes its own way,
    and from every so many of its iterations L-BFGS tries to reach the goal; the best is kept.

    Parameters
    ----------
    max_iterations : of both together, for each sample, beside those that ``search`` comes with.
    """
    limit = search.iterations + max_iterations
    rows = ((search.distance > problem.goal) & ~search.stationary).nonzero()[:, 0]
    own = search.take(rows)
    own.iterations.zero_()
    while len(rows):
        here, most, before = problem.take(rows), limit[rows], own.copy()
        left = most - search.iterations[rows]
        gauss_newton(here, own, before.iterations + left.clamp(max=_BLOCK))
        moved, tried = _cost(here, own) < _cost(here, before), own.copy()
        tried.iterations += search.iterations[rows] - before.iterations
        lbfgs(here, tried, torch.minimum(tried.iterations + _BLOCK * moved, most))
        search.iterations[rows] = tried.iterations
        search.stationary[rows] = torch.where(moved, tried.stationary, own.stationary)
        better = _cost(here, tried) < _cost(here, search.take(rows))
        search.put(rows[better], tried.take(better))
        on = moved & (search.distance[rows] > here.goal) & (search.iterations[rows] < most)
        rows, own = rows[on], own.take(on)


def _cost(problem: Problem, search: Search) -> Tensor:
    """(n,) what the answer shall make small."""
    change = problem.damping * norms(search.x - problem.x0)
    return search.distance.square() + change.square()
