"""The search for the input: Gauss-Newton, L-BFGS, and ways out of the minima that they end in."""

from dataclasses import replace

import torch
from torch import Tensor

from fmce_ops.reverse.newton import gauss_newton
from fmce_ops.reverse.problem import Problem, Search
from fmce_ops.reverse.quasi_newton import lbfgs
from fmce_ops.reverse.solver import norms, spread
from fmce_ops.reverse.waking import wake

FIRST = 500  # iterations of Gauss-Newton before L-BFGS goes on
_STRETCH = 700  # iterations of L-BFGS before units at rest are woken
_WORTH = 0.03  # part of the distance that a stretch must take, for another like it to follow
_SHARES = (0.5, 0.0)  # of what the most wanted unit is wanted, to be woken, at first and later
_STARTS = 20  # beside x0
_BESIDE = 0.5  # how far, of the change that the search from x0 came to


def descend(problem: Problem, search: Search, max_iterations: int, reach: Tensor) -> None:
    """Bring ``search`` down to the goal, or as far as it goes.

    Gauss-Newton draws up units at rest, but is slow where the linearised problem is badly
    conditioned; L-BFGS is not. Both end in local minima. So where more iterations are given than
    Gauss-Newton gets at once, units at rest are woken by force, see `wake`, as long as that brings
    L-BFGS nearer: those that are wanted most, and where that is not enough all that are wanted.

    Parameters
    ----------
    max_iterations : for each sample, beside those that ``search`` comes with.
    reach : (n,) how far from x0 an answer is of use; what is within it is never left.
    """
    rows = ((search.distance > problem.goal) & ~search.stationary).nonzero()[:, 0]
    own = search.take(rows)
    own.iterations.zero_()
    limit = torch.full_like(own.iterations, max_iterations)
    _down(problem.take(rows), own, limit, reach[rows])
    own.iterations += search.iterations[rows]
    search.put(rows, own)


def _down(problem: Problem, search: Search, limit: Tensor, reach: Tensor) -> None:
    """Gauss-Newton, and L-BFGS from where it ends if it came nearer."""
    if problem.products:
        before = search.distance.clone()
        gauss_newton(problem, search, limit.clamp(max=FIRST))
        limit = torch.where(search.distance < before, limit, search.iterations)
    within = norms(search.x - problem.x0) <= reach
    held = replace(problem, bound=torch.where(within, reach, problem.bound).minimum(problem.bound))
    _walk(held, search, limit)


def _walk(problem: Problem, search: Search, limit: Tensor) -> None:
    """Stretches of L-BFGS, and between them a step out of where they end; the best is kept."""
    rows = ((search.distance > problem.goal) & (search.iterations < limit)).nonzero()[:, 0]
    walker, share = search.take(rows), torch.full_like(problem.goal[rows], _SHARES[0])
    while len(rows):
        here, most = problem.take(rows), limit[rows]
        lbfgs(here, walker, most.minimum(walker.iterations + _STRETCH))
        left = (here.cost(walker) / here.cost(search.take(rows))).sqrt()
        search.put(rows[left <= 1], walker.take(left <= 1))
        search.iterations[rows] = walker.iterations
        poor = ~(left < 1 - _WORTH)
        going = (walker.distance > here.goal) & (walker.iterations < most)
        going &= ~poor | (share > _SHARES[1])
        walker.put(poor.nonzero()[:, 0], search.take(rows[poor]))
        share[poor] = _SHARES[1]
        rows, walker, share = rows[going], walker.take(going), share[going]
        if not len(rows) or int(limit.max()) <= FIRST:
            return
        moved = wake(problem.take(rows), walker, limit[rows], share)
        search.iterations[rows] = walker.iterations
        going = moved | ~walker.stationary | (share > _SHARES[1])
        rows, walker, share = rows[going], walker.take(going), share[going]


def start_anew(problem: Problem, search: Search, left: Tensor, reach: Tensor) -> None:
    """Search from beside x0, too, while there are iterations left, and keep the best.

    The points beside are drawn from a seed of their own; but for the distance they are the same for
    every sample.

    Parameters
    ----------
    left : (n,) iterations.
    reach : (n,) how far from x0 an answer is of use.
    """
    problem = replace(problem, bound=torch.minimum(problem.bound, reach))
    drawn = torch.Generator().manual_seed(0)
    length, limit = _BESIDE * norms(search.x - problem.x0), search.iterations + left
    for _ in range(_STARTS):
        short = (search.distance > problem.goal) & (search.iterations < limit)
        rows = (short & (length > 0)).nonzero()[:, 0]
        if not len(rows):
            return
        here = problem.take(rows)
        aside = torch.randn(here.x0.shape[1:], generator=drawn, dtype=here.x0.dtype)
        aside = aside.to(here.x0.device).expand_as(here.x0)
        x = here.x0 + spread(length[rows] / norms(aside), aside) * aside
        distance = norms(here.target - here.module(x.clone()))
        spent = torch.zeros_like(rows)
        other = Search(x, distance, spent, spent.bool())
        _down(here, other, limit[rows] - search.iterations[rows], here.bound)
        search.iterations[rows] += other.iterations
        other.iterations = search.iterations[rows]
        better = here.cost(other) < here.cost(search.take(rows))
        search.put(rows[better], other.take(better))
