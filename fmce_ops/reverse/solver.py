"""The one least-squares solver: conjugate gradients on the normal equations, batched."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """A linear map of each sample, known by its products alone."""

    def push(self, v: Tensor) -> Tensor: ...
    def pull(self, u: Tensor) -> Tensor: ...
    def take(self, rows: Tensor) -> "Operator": ...


@dataclass(frozen=True)
class Solution:
    """Where the solver ended: step (n, ...), and residual and iterations, (n,) each."""

    step: Tensor
    residual: Tensor
    iterations: Tensor


def norms(v: Tensor) -> Tensor:
    """(n, ...) -> (n,) Euclidean norms, summed in float64."""
    return torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=torch.float64)


def each(values: Tensor, like: Tensor) -> Tensor:
    """(n,) values, shaped so that they meet (n, ...) sample by sample."""
    return values.view(-1, *[1] * (like.ndim - 1))


def spread(factor: Tensor, like: Tensor) -> Tensor:
    """(n,) factors, shaped and typed so that they multiply (n, ...)."""
    return each(factor.to(like.dtype), like)


def least_squares(
    operator: Operator,
    gradient: Tensor,
    length: Tensor,
    damping: Tensor,
    tolerance: Tensor | float,
    max_iterations: Tensor | int,
) -> Solution:
    """argmin |A d - r|^2 + damping^2 |d|^2 of least norm, for every sample by itself.

    The method is CGLS (Hestenes and Stiefel 1952) with the gradient s = A^T r carried along
    instead of r, so that a caller may form it in higher precision. Started at 0, every d lies in
    the range of A^T, hence the least norm. A sample is finished when |r - A d| has come down to
    ``tolerance`` of |r|, or |s| to ``tolerance`` of its first value; once half are, they leave.

    Parameters
    ----------
    operator : A, (n, ...) -> (n, ...).
    gradient : (n, ...) A^T r.
    length : (n,) |r|.
    damping : (n,) non-negative.
    tolerance, max_iterations : (n,) or one for all.

    Returns
    -------
    The step (n, ...), |r - A d| (n,) and the iterations (n,) of each sample.
    """
    step = torch.zeros_like(gradient)
    residual, count = length.clone(), torch.zeros_like(length, dtype=torch.long)
    rows = torch.arange(len(gradient), device=gradient.device)
    goal = torch.as_tensor(tolerance, device=length.device).expand_as(length)
    limit = torch.as_tensor(max_iterations, device=length.device).expand_as(length)
    d, s, p, shift = step.clone(), gradient, gradient, damping.square()
    energy, gamma = length.square(), norms(gradient).square()
    least_energy, least_gamma = energy * goal.square(), gamma * goal.square()
    live = gamma > 0
    for done in range(int(limit.max())):
        if 2 * int(live.sum()) <= len(live):
            step[rows], residual[rows] = d, energy.clamp(min=0).sqrt()
            kept = live.nonzero()[:, 0]
            if not len(kept):
                return Solution(step, residual, count)
            operator, rows, live = operator.take(kept), rows[kept], live[kept]
            d, s, p = d[kept], s[kept], p[kept]
            shift, energy, gamma = shift[kept], energy[kept], gamma[kept]
            least_energy, least_gamma = least_energy[kept], least_gamma[kept]
            limit = limit[kept]
        q = operator.push(p)
        curvature = norms(q).square() + shift * norms(p).square()
        length_of_step = torch.where(live & (curvature > 0), gamma / curvature, 0)
        alpha = spread(length_of_step, p)
        d = torch.addcmul(d, alpha, p)
        energy = energy - length_of_step * gamma
        count[rows] += live
        live = live & (curvature > 0) & (energy > least_energy) & (done + 1 < limit)
        if not live.any():  # no gradient is needed any more
            break
        s = torch.addcmul(s, alpha, torch.addcmul(operator.pull(q), spread(shift, p), p), value=-1)
        previous, gamma = gamma, norms(s).square()
        live &= gamma > least_gamma
        p = torch.addcmul(s, spread(torch.where(live, gamma / previous, 0), p), p)
    step[rows], residual[rows] = d, energy.clamp(min=0).sqrt()
    return Solution(step, residual, count)
