"""Plain pruning by magnitude, the control beside learnt gates."""

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import LnStructured

from fmce_ops.pathways.costs import Costs
from fmce_ops.pathways.gates import gated_layers

_HALVINGS = 20


def magnitude_code(network: nn.Module, costs: Costs, multiply_adds: float) -> Tensor:
    """The gates (gates,) bool of the largest filters by L1 norm within a budget.

    The same share of every layer is kept, the largest that costs at most ``multiply_adds`` an
    image without controllers, and at least one filter of each.

    Parameters
    ----------
    network : what `fmce_ops.pathways.attach` returned.
    """
    low, high = 0.0, 1.0  # of the share that goes
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        spent = int(costs.multiply_adds(_code(network, middle)[None], controllers=False))
        low, high = (low, middle) if spent <= multiply_adds else (middle, high)
    return _code(network, high)


def _code(network: nn.Module, amount: float) -> Tensor:
    parts = []
    for gated in gated_layers(network).values():
        weight = gated.conv.weight.detach()
        gone = min(round(amount * len(weight)), len(weight) - 1)
        method = LnStructured(amount=gone, n=1, dim=0)
        mask = method.compute_mask(weight, torch.ones_like(weight))
        parts.append(mask.flatten(1).any(1))
    return torch.cat(parts)
