"""The one least-squares solver: conjugate gradients on the normal equations, batched."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_AT_ONCE = 2**14  # values of a sample


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
    rows = v.flatten(1)
    if v.is_cuda or rows.shape[1] <= _AT_ONCE:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    # A CPU makes a copy in float64: of a part that its cache holds, six times as fast.
    return norms(torch.stack([norms(part) for part in rows.split(_AT_ONCE, 1)], 1))


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
    d, s, p, shift = step.clone(), gradient.clone(), gradient.clone(), damping.square()
    energy, gamma = length.square(), norms(gradient).square()
    least_energy, least_gamma = energy * goal.square(), gamma * goal.square()
    live, damped = gamma > 0, bool(shift.any())
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
        curvature = norms(q).square()
        if damped:
            curvature += shift * norms(p).square()
        length_of_step = torch.where(live & (curvature > 0), gamma / curvature, 0)
        alpha = spread(length_of_step, p)
        d.addcmul_(alpha, p)
        energy = energy - length_of_step * gamma
        count[rows] += live
        live = live & (curvature > 0) & (energy > least_energy) & (done + 1 < limit)
        if not live.any():  # no gradient is needed any more
            break
        pulled = operator.pull(q)
        if damped:
            pulled = torch.addcmul(pulled, spread(shift, p), p)
        s.addcmul_(alpha, pulled, value=-1)
        previous, gamma = gamma, norms(s).square()
        live &= gamma > least_gamma
        torch.addcmul(s, spread(torch.where(live, gamma / previous, 0), p), p, out=p)
    step[rows], residual[rows] = d, energy.clamp(min=0).sqrt()
    return Solution(step, residual, count)
