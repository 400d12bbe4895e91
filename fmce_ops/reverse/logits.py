"""The nearest logits that classify correctly: where reverse propagation begins."""

import sys
from numbers import Real

import torch
from torch import Tensor

from fmce_ops.errors import ReverseError
from fmce_ops.reverse.checks import described, is_plain


def nearest_logits(logits: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
    """The logits nearest to ``logits`` in which the label wins by at least ``margin``.

    argmin |z* - z|^2 subject to z*_c >= z*_j + margin for all j != c, in closed form: with the
    violations v_j = z_j + margin - z_c in descending order, the k largest share one rise
    r = (v_1 + ... + v_k) / (k + 1), k the least with v_{k+1} <= r (arXiv 2506.07188).

    Parameters
    ----------
    logits : (N, K) finite.
    labels : (N,) integers in 0 .. K-1.
    margin : by how much the label's logit shall lead, >= 0; with 0 ties are allowed.

    Returns
    -------
    (N, K); rows that satisfy the constraint come back bit for bit.

    Raises
    ------
    ReverseError
        Shapes that do not fit, labels out of range; logits, margin or answer that are not finite.

    Examples
    --------
    >>> nearest_logits(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]))
    tensor([[2., 2., 2.]])
    """
    _check(logits, labels, margin)
    if not len(logits):
        return logits.clone()
    own = labels.long()[:, None]
    wide = logits.double()
    margin = float(margin)
    violation = wide + margin - wide.gather(1, own)
    violation.scatter_(1, own, -torch.inf)
    rise = _rise(violation)
    raised = wide.gather(1, own) + rise
    nearest = torch.where(violation > rise, raised - margin, wide).scatter(1, own, raised)
    return _finite(nearest.to(logits.dtype), margin)


def _finite(nearest: Tensor, margin: float) -> Tensor:
    if not nearest.isfinite().all():
        raise ReverseError(
            f"the nearest logits for a margin of {margin} overflow {nearest.dtype}: give smaller "
            "logits or a smaller margin."
        )
    return nearest


def _rise(violation: Tensor) -> Tensor:
    """(N, K) violations, -inf at the label -> (N, 1) by how much the label's logit rises."""
    following = violation.sort(dim=1, descending=True).values
    largest = following[:, :-1]
    total = torch.cat([torch.zeros_like(following[:, :1]), largest.cumsum(1)], dim=1)
    shared = total / torch.arange(1, total.shape[1] + 1, device=total.device)
    least = (following <= shared).int().argmax(dim=1, keepdim=True)
    return shared.gather(1, least)


def _check(logits: Tensor, labels: Tensor, margin: float) -> None:
    if not is_plain(logits) or not is_plain(labels):
        raise ReverseError(
            f"the logits are {described(logits)} and the labels {described(labels)}: "
            "give dense tensors."
        )
    if logits.device != labels.device:
        raise ReverseError(
            f"the logits are on {logits.device} and the labels on {labels.device}: "
            "give both in one place."
        )
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ReverseError(
            f"the logits are {tuple(logits.shape)} of {logits.dtype}: give (N, K) floats."
        )
    whole = labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if labels.shape != logits.shape[:1] or not whole:
        raise ReverseError(
            f"the labels are {tuple(labels.shape)} of {labels.dtype}: "
            f"give one integer for each of the {len(logits)} rows of logits."
        )
    number = isinstance(margin, Real) and not isinstance(margin, bool)
    if not number or not 0 <= margin <= sys.float_info.max:
        raise ReverseError(f"the margin is {margin!r}: give a finite number that is not negative.")
    if not logits.isfinite().all():
        raise ReverseError("the logits hold NaN or Inf: find out which module made them.")
    if ((labels < 0) | (labels >= logits.shape[1])).any():
        raise ReverseError(
            f"the labels run from {int(labels.min())} to {int(labels.max())}: "
            f"with {logits.shape[1]} logits they must lie in 0 .. {logits.shape[1] - 1}."
        )
