"""Damped Gauss-Newton: the reverse step of any differentiable module."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmce_ops.reverse.products import Linearised, Output, output_of
from fmce_ops.reverse.solver import least_squares, norms, spread

_SHARE = 2  # a step may spend one part in so many of all iterations
_FORCING = 0.1  # part of the residual that a step may leave over
_HALVINGS = 6
_STALLED = 1e-3  # a step that promises to take less than this part of the residual is none


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

    def merit(self, output: Output, x: Tensor) -> Tensor:
        """(n,) what Gauss-Newton lowers: the residual and the damped change."""
        rest = norms(output.rest(self.target))
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
    until the residual falls. Units that a ReLU holds at rest have no derivative though the module
    may reach their target; where the true derivative has no more to give, a second pass looks for
    inputs that wake them, see `Output`, and counts where it ends nearer.

    Parameters
    ----------
    max_iterations : of the least-squares solver, for each sample in each pass.
    """
    rests = _improve(problem, search, max_iterations, hinge=False)
    rows = (search.stationary & (search.distance > problem.goal)).nonzero()[:, 0]
    if not (rests and len(rows)):
        return
    none = torch.zeros_like(rows)
    second = Search(search.x[rows], search.distance[rows], none, none.bool())
    _improve(problem.take(rows), second, max_iterations, hinge=True)
    search.iterations[rows] += second.iterations
    better = second.distance < search.distance[rows]
    won = rows[better]
    search.x[won], search.distance[won] = second.x[better], second.distance[better]
    search.stationary[won] = second.stationary[better]


def _improve(problem: Problem, search: Search, max_iterations: int, hinge: bool) -> bool:
    """One pass; returns whether there are ReLUs in the module."""
    rests = False
    rows = (search.distance > problem.goal).nonzero()[:, 0]
    while len(rows):
        here, x = problem.take(rows), search.x[rows]
        linearised = Linearised(here.module, x, here.target, hinge)
        rests = linearised.output.rests
        left = max_iterations - int(search.iterations[rows].min())
        most = min(left, -(-max_iterations // _SHARE))
        step, spent, merit, promising = _step(here, x, linearised, most)
        search.iterations[rows] += spent
        falling = _descend(problem, search, rows, step, merit, promising, hinge)
        search.stationary[rows] = ~falling
        going = falling & (search.distance[rows] > here.goal)
        rows = rows[going & (search.iterations[rows] < max_iterations)]
    return rests


def _step(
    problem: Problem, x: Tensor, linearised: Linearised, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The Gauss-Newton step, its iterations, the merit before it, and if it promises anything."""
    rest, merit = linearised.output.rest(problem.target), problem.merit(linearised.output, x)
    gradient = linearised.pull(rest) - spread(problem.damping.square(), x) * (x - problem.x0)
    wanted = (problem.goal / merit.clamp(min=1e-300) / 2).clamp(min=_FORCING)
    found = least_squares(linearised, gradient, merit, problem.damping, wanted, most)
    promising = found.residual < (1 - _STALLED) * merit
    return found.step, found.iterations.clamp(min=1), merit, promising


def _descend(
    problem: Problem,
    search: Search,
    rows: Tensor,
    step: Tensor,
    merit: Tensor,
    promising: Tensor,
    hinge: bool,
) -> Tensor:
    """Take the promising steps, halved until they lower the merit; (n,) where one did."""
    better = torch.zeros_like(promising)
    for halving in range(_HALVINGS):
        left = (promising & ~better).nonzero()[:, 0]
        if not len(left):
            break
        here, x = problem.take(rows[left]), search.x[rows[left]] + step[left] * 0.5**halving
        output = output_of(here.module, x, hinge)
        lower = here.merit(output, x) < (1 - _STALLED) * merit[left]
        taken = rows[left[lower]]
        search.x[taken] = x[lower]
        search.distance[taken] = output.distance(here.target)[lower]
        better[left[lower]] = True
    return better
