"""L-BFGS, batched: the way down where the linearised problem is badly conditioned, or unknown."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from fmce_ops.reverse.problem import Problem, Search
from fmce_ops.reverse.products import gradient, output_of
from fmce_ops.reverse.solver import norms, spread

_PAIRS = 20
_TRIALS = 20  # of one line search
_ENOUGH, _FLAT = 1e-4, 0.9  # of the slope: the fall that is asked for, the slope that may be left


@dataclass
class _Point:
    """x, (n, ...), half the squared merit, (n,), its gradient, and |module(x) - target|, (n,)."""

    x: Tensor
    value: Tensor
    gradient: Tensor
    distance: Tensor

    def put(self, rows: Tensor, other: "_Point") -> None:
        for name, column in vars(self).items():
            column[rows] = getattr(other, name)

    def take(self, rows: Tensor) -> "_Point":
        return _Point(*(column[rows] for column in vars(self).values()))


@dataclass
class _Pair:
    """A step, the change of the gradient along it, and 1 over their product or 0, (n,)."""

    step: Tensor
    change: Tensor
    weight: Tensor

    @classmethod
    def between(cls, old: _Point, new: _Point) -> "_Pair":
        step, change = new.x - old.x, new.gradient - old.gradient
        curvature = _dot(step, change)
        return cls(step, change, torch.where(curvature > 0, 1 / curvature, 0))


def lbfgs(problem: Problem, search: Search, limit: Tensor) -> None:
    """Improve ``search`` until the distance is within the goal or no step goes down.

    Limited-memory BFGS on the merit of `Problem` itself, with the true derivatives of ReLUs and a
    line search for the weak Wolfe conditions by bisection, which asks for no smooth function
    (Lewis and Overton 2013). Every sample has its own history and its own steps; where it finds
    none it begins once more without the history.

    Parameters
    ----------
    limit : (n,) evaluations of the module and its derivative, those before included.
    """
    rows = ((search.distance > problem.goal) & (search.iterations < limit)).nonzero()[:, 0]
    if not len(rows):
        return
    here, spent, limit = problem.take(rows), search.iterations[rows], limit[rows]
    point, live = _evaluate(here, search.x[rows]), torch.ones_like(rows, dtype=torch.bool)
    stationary, pairs = ~live, deque[_Pair](maxlen=_PAIRS)
    while live.any():
        following = _line_search(here, point, _direction(point, pairs), spent, limit * live)
        lower = following.value < point.value
        known = torch.stack([pair.weight > 0 for pair in pairs]).any(0) if pairs else ~live
        for pair in pairs:
            pair.weight[~lower] = 0
        pairs.append(_Pair.between(point, following))
        point = following
        stationary |= live & ~lower & ~known & (spent < limit)
        live &= ~stationary & (point.distance > here.goal) & (spent < limit)
    search.put(rows, Search(point.x, point.distance, spent, stationary))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


def _evaluate(problem: Problem, x: Tensor) -> _Point:
    leaf = x.detach().clone().requires_grad_()
    output = output_of(problem.module, leaf)
    rest = output.rest(problem.target)
    uphill = spread(problem.damping.square(), x) * (x - problem.x0)
    uphill = uphill - gradient(output.value, leaf, rest.detach())
    value = problem.merit(rest.detach(), x).square() / 2
    return _Point(x, value, uphill, output.distance(problem.target).detach())


def _direction(point: _Point, pairs: deque[_Pair]) -> Tensor:
    """-H g by the two loops (Nocedal and Wright 2006, algorithm 7.4)."""
    d, shares = -point.gradient, list[Tensor]()
    for pair in reversed(pairs):
        shares.append(pair.weight * _dot(pair.step, d))
        d = d - spread(shares[-1], d) * pair.change
    d = d * spread(_scale(point, pairs), d)
    for pair, share in zip(pairs, reversed(shares), strict=True):
        d = d + spread(share - pair.weight * _dot(pair.change, d), d) * pair.step
    return d


def _scale(point: _Point, pairs: deque[_Pair]) -> Tensor:
    """(n,) of the first estimate of H: of the newest pair, or such that the step would end at 0."""
    square = norms(point.gradient).square()
    scale = torch.where(square > 0, point.value / square, 0)
    for pair in pairs:
        square = norms(pair.change).square()
        scale = torch.where(pair.weight > 0, 1 / (pair.weight * square), scale)
    return scale


def _line_search(
    problem: Problem, point: _Point, direction: Tensor, spent: Tensor, limit: Tensor
) -> _Point:
    """The points behind the steps; a sample that finds none lower within the limit stays."""
    slope = _dot(point.gradient, direction)
    low, t = torch.zeros_like(slope), torch.ones_like(slope)
    high = torch.full_like(slope, torch.inf)
    best = _Point(*(column.clone() for column in vars(point).values()))
    open_ = slope < 0
    for _ in range(_TRIALS):
        rows = (open_ & (spent < limit)).nonzero()[:, 0]
        if not len(rows):
            break
        here = problem.take(rows)
        tried = _evaluate(here, point.x[rows] + spread(t[rows], direction) * direction[rows])
        spent[rows] += 1
        within = norms(tried.x - here.x0) <= here.bound
        low_enough = tried.value <= point.value[rows] + _ENOUGH * t[rows] * slope[rows]
        falls = within & low_enough
        flat = _dot(tried.gradient, direction[rows]) >= _FLAT * slope[rows]
        better = falls & (tried.value < best.value[rows])
        best.put(rows[better], tried.take(better))
        high[rows] = torch.where(falls, high[rows], t[rows])
        low[rows] = torch.where(falls, t[rows], low[rows])
        open_[rows] = ~(falls & flat)
        t = torch.where(high.isfinite(), (low + high) / 2, 2 * low)
    return best
