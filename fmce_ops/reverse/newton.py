"""Damped Gauss-Newton: the reverse step of any differentiable module."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmce_ops.reverse.products import Linearised
from fmce_ops.reverse.solver import least_squares, norms, spread

_INNER = 30  # iterations of the solver in one step
_LOOSEST = 0.1  # part of the residual that a step may leave over
_HALVINGS = 6
_STALLED = 1e-3  # a step that promises to take less than this part of the residual is none
_LEAKS = (1.0, 0.0)


@dataclass(frozen=True)
class Problem:
    """Bring module(x) to ``target`` from ``x0``, n samples; damping and goal are (n,)."""

    module: nn.Module
    target: Tensor
    x0: Tensor
    damping: Tensor
    goal: Tensor

    def take(self, rows: Tensor) -> "Problem":
        return Problem(
            self.module, self.target[rows], self.x0[rows], self.damping[rows], self.goal[rows]
        )

    def merit(self, value: Tensor, x: Tensor, floor: float) -> Tensor:
        """(n,) what Gauss-Newton lowers: residual and damped change, the part beyond a ReLU off."""
        rest = norms(self.target.clamp(min=floor) - value)
        return (rest.square() + (self.damping * norms(x - self.x0)).square()).sqrt()


@dataclass
class Search:
    """Where the search stands.

    Attributes
    ----------
    x : (n, ...) the best inputs so far.
    distance : (n,) |module(x) - target|.
    iterations : (n,) of the least-squares solver.
    stationary : (n,) whether the linearised module knows no better input near x.
    """

    x: Tensor
    distance: Tensor
    iterations: Tensor
    stationary: Tensor


def gauss_newton(problem: Problem, search: Search, max_iterations: int) -> None:
    """Improve ``search`` until the distance is within the goal or no step helps.

    Every step minimises |J d - r|^2 + damping^2 |x + d - x0|^2 by `least_squares` and is halved
    until the true residual falls. Units that rest in the flat part of their activation have no
    derivative though the module may reach the target through them: a first pass therefore gives
    them slope 1, and a second takes the samples that are left with the true derivative.
    """
    for leak in _LEAKS:
        rows = ((search.distance > problem.goal) & ~search.stationary).nonzero()[:, 0]
        for _ in range(max_iterations):
            if not len(rows):
                break
            rows = _step(problem, search, rows, leak)


def _step(problem: Problem, search: Search, rows: Tensor, leak: float) -> Tensor:
    """One step of the samples ``rows``; returns those that shall go on."""
    here, x = problem.take(rows), search.x[rows]
    linearised = Linearised(here.module, x, leak)
    rest = here.target.clamp(min=linearised.floor) - linearised.value
    gradient = linearised.pull(rest) - spread(here.damping.square(), x) * (x - here.x0)
    merit = here.merit(linearised.value, x, linearised.floor)
    wanted = (here.goal / merit.clamp(min=1e-300) / 2).clamp(max=_LOOSEST)
    found = least_squares(linearised, gradient, merit, here.damping, wanted, _INNER)
    search.iterations[rows] += found.iterations
    promising = found.residual < (1 - _STALLED) * merit
    floor = linearised.floor
    falling = _descend(problem, search, rows, found.step, merit, promising, floor)
    if not leak:
        search.stationary[rows] = ~falling
    return rows[falling & (search.distance[rows] > here.goal)]


def _descend(
    problem: Problem,
    search: Search,
    rows: Tensor,
    step: Tensor,
    merit: Tensor,
    promising: Tensor,
    floor: float,
) -> Tensor:
    """Take the promising steps, halved until they lower the merit; (n,) where one did."""
    better = torch.zeros_like(promising)
    for halving in range(_HALVINGS):
        left = (promising & ~better).nonzero()[:, 0]
        if not len(left):
            break
        here, x = problem.take(rows[left]), search.x[rows[left]] + step[left] * 0.5**halving
        value = here.module(x.clone())
        lower = here.merit(value, x, floor) < (1 - _STALLED) * merit[left]
        taken = rows[left[lower]]
        search.x[taken], search.distance[taken] = x[lower], norms(here.target - value)[lower]
        better[left[lower]] = True
    return better
