"""What paths tell: the filters that a class takes and needs, and how alike paths are."""

import torch
from torch import Tensor


def profiles(codes: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How often each gate is open for each class, (K, gates) in 0..1; 0 for a class without images.

    Parameters
    ----------
    codes, labels : (N, gates) bool and (N,) class numbers.
    """
    members = torch.nn.functional.one_hot(labels, classes).T.float()  # (K, N)
    return members @ codes.float() / members.sum(1, keepdim=True).clamp(min=1)


def similarity(codes: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean share of gates in which two different images agree, (K, K) by their classes.

    Gates that are the same for all images tell nothing and are left out; where none is left, and
    for a class of one image against itself, the value is NaN.
    """
    varying = codes.any(0) & ~codes.all(0)
    on = profiles(codes[:, varying], labels, classes).double()
    agree = (on @ on.T + (1 - on) @ (1 - on).T) / varying.sum()
    counts = torch.bincount(labels, minlength=classes).double()
    # Within a class every image would also be compared with itself.
    within = (counts * agree.diagonal() - 1) / (counts - 1)
    agree = agree.diagonal_scatter(within.where(counts > 1, torch.nan))
    missing = counts == 0
    agree[missing] = torch.nan
    agree[:, missing] = torch.nan
    return agree


def needed_filters(found: Tensor, label: int, count: int) -> Tensor:
    """The gates that a class opens more often than the others do, at most ``count`` of them.

    Parameters
    ----------
    found : (K, gates) `profiles`.

    Returns
    -------
    Gate numbers, the most telling first.
    """
    others = (found.sum(0) - found[label]) / max(1, len(found) - 1)
    lead = found[label] - others
    order = lead.argsort(descending=True, stable=True)[:count]
    return order[lead[order] > 0]


def nearest_classes(code: Tensor, found: Tensor) -> Tensor:
    """(K,) mean share of gates in which an image of each class is expected to agree with a path.

    Parameters
    ----------
    code : (gates,) bool.
    found : (K, gates) `profiles`.
    """
    return torch.where(code, found, 1 - found).mean(1)
