"""The way out of local minima: a step to where units that rest, and should not, are awake."""

import torch
from torch import Tensor

from fmce_ops.reverse.problem import Problem, Search
from fmce_ops.reverse.products import Linearised, output_of
from fmce_ops.reverse.relus import Raised, Wanted
from fmce_ops.reverse.solver import each, least_squares, norms

_NEAR = 0.15  # how far below its kink a unit may rest, in root mean squares of the ReLU's input
_ACCURACY, _MOST = 1e-2, 100  # of the least-squares solver, and its iterations


def wake(problem: Problem, search: Search, limit: Tensor, share: Tensor) -> Tensor:
    """Step out of local minima that units at rest make, nearer to the target or not.

    Where the search ends short of the target, the units that are missing often rest just below
    their kinks: they have no derivative, so that nothing draws them up. A backward pass tells how
    much each of them should be larger; the step brings these just above their kinks and changes the
    output as little as it can. It is a least-squares problem, in which the output counts more:
    units come up where the input has freedom to spare, and stay where the output settles them. The
    step does not ask whether the residual falls: once the units are awake, the search goes on with
    their derivatives.

    Parameters
    ----------
    limit : (n,) iterations of the least-squares solver, those before included.
    share : (n,) units are woken that are wanted more than this part of the most wanted one.

    Returns
    -------
    (n,) which samples moved; the others have no such units, or would leave the bound.
    """
    masks = _wanted(problem, search.x, share) if problem.products else []
    if not any(mask.any() for mask in masks):
        return torch.zeros_like(search.stationary)
    relus = Raised(masks, len(search.x))
    linearised = Linearised(problem.module, search.x, problem.target, relus)
    lacks = linearised.rest
    most = (limit - search.iterations).clamp(max=_MOST)
    found = least_squares(
        linearised, linearised.pull(lacks), norms(lacks), problem.damping, _ACCURACY, most
    )
    search.iterations += found.iterations
    x = search.x + found.step
    distance = norms(problem.target - problem.module(x.clone()))
    within = (norms(x - problem.x0) <= problem.bound) & distance.isfinite()
    moved = within & (norms(found.step) > 0)
    search.x = x.where(each(moved, x), search.x)
    search.distance = distance.where(moved, search.distance)
    return moved


def _wanted(problem: Problem, x: Tensor, share: Tensor) -> list[Tensor]:
    """The units of each ReLU that rest near their kinks and should be larger."""
    relus, leaf = Wanted(torch.full_like(share, _NEAR)), x.clone().requires_grad_()
    output = output_of(problem.module, leaf, relus)
    torch.autograd.grad(output.value, leaf, -output.rest(problem.target).detach())
    return relus.masks(share)
