"""The way out of local minima: a step to where units that rest, and should not, are awake."""

import torch
from torch import Tensor

from fmce_ops.reverse.newton import downhill
from fmce_ops.reverse.problem import Problem, Search
from fmce_ops.reverse.products import Linearised, output_of
from fmce_ops.reverse.relus import Awake, Wanted
from fmce_ops.reverse.solver import each, least_squares, norms

_NEAR = 0.05  # how far below its kink a unit may rest, in root mean squares of the ReLU's input
_DAMPING = 0.03  # of the step, as a part of the largest singular value
_ACCURACY = 1e-2  # of the least-squares solver


def wake(problem: Problem, search: Search, limit: Tensor) -> Tensor:
    """Step out of local minima that units at rest make, nearer to the target or not.

    Where the search ends short of the target, the units that are missing often rest just below
    their kinks: they have no derivative, so that nothing draws them up. A backward pass tells which
    of them should be larger; the step is a damped Gauss-Newton step of the module in which these
    pass on what goes in, and the others at rest nothing. It does not ask whether the residual
    falls: once the units are awake, the search goes on from there with their derivatives.

    Parameters
    ----------
    limit : (n,) iterations of the least-squares solver, those before included.

    Returns
    -------
    (n,) which samples moved; the others have no such units, or would leave the bound.
    """
    relus = _wanted(problem, search.x)
    if not relus.masks:
        return torch.zeros_like(search.stationary)
    linearised = Linearised(problem.module, search.x, problem.target, relus)
    gradient = downhill(problem, search.x, linearised)
    slope = norms(gradient)
    largest = norms(linearised.push(gradient)) / slope.where(slope > 0, 1)
    damping = torch.maximum(problem.damping, _DAMPING * largest)
    most = limit - search.iterations
    found = least_squares(linearised, gradient, norms(linearised.rest), damping, _ACCURACY, most)
    search.iterations += found.iterations
    x = search.x + found.step
    distance = norms(problem.target - problem.module(x.clone()))
    within = (norms(x - problem.x0) <= problem.bound) & distance.isfinite()
    moved = within & (norms(found.step) > 0)
    search.x = x.where(each(moved, x), search.x)
    search.distance = distance.where(moved, search.distance)
    return moved


def _wanted(problem: Problem, x: Tensor) -> Awake:
    """The units that are awake at x, or rest near their kink and should be larger."""
    relus, leaf = Wanted(torch.full_like(problem.goal, _NEAR)), x.clone().requires_grad_()
    with torch.enable_grad():
        output = output_of(problem.module, leaf, relus)
    torch.autograd.grad(output.value, leaf, -output.rest(problem.target).detach())
    return Awake(relus.masks, len(x))
