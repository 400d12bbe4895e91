"""The loss of decoupling (arXiv 1906.01166, section 3.3): four parts over all gated layers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmce_ops.pathways.gates import Layer

PARTS = ("cross_entropy", "information", "alignment", "sparsity")


@dataclass(frozen=True)
class Weights:
    """Of the parts beside the cross-entropy; ``ratio`` is the share of gates to stay open."""

    information: float
    alignment: float
    sparsity: float
    ratio: float


class PathLoss(nn.Module):
    """Cross-entropy, and what makes paths tell of the input and be narrow.

    information : sum over layers of the cross-entropy of a linear reading V_l of the gates, a
        lower bound of the mutual information between path and class.
    alignment : sum of KL(softmax(mean output of each filter) || softmax(gates)).
    sparsity : sum of | mean number of open gates - ratio x filters |.

    Parameters
    ----------
    filters : of each gated layer, in their order.
    classes : number of logits.
    """

    def __init__(self, filters: list[int], classes: int, weights: Weights) -> None:
        super().__init__()
        self.weights = weights
        self.readings = nn.ModuleList(nn.Linear(f, classes, bias=False) for f in filters)

    def forward(self, logits: Tensor, labels: Tensor, layers: Mapping[str, Layer]) -> Tensor:
        """The four parts (4,) in the order of ``PARTS``, without their weights.

        Parameters
        ----------
        logits, labels : (N, K) and (N,).
        layers : what `recorded` caught in the same forward pass.
        """
        zero = logits.new_zeros(())
        information, alignment, sparsity = zero, zero, zero
        for reading, layer in zip(self.readings, layers.values(), strict=True):
            gates = layer.gates
            information = information + F.cross_entropy(reading(gates), labels)
            alignment = alignment + F.kl_div(
                gates.log_softmax(1),
                layer.outputs.log_softmax(1),
                reduction="batchmean",
                log_target=True,
            )
            wanted = self.weights.ratio * gates.shape[1]
            sparsity = sparsity + (gates.sum(1).mean() - wanted).abs()
        return torch.stack([F.cross_entropy(logits, labels), information, alignment, sparsity])

    def total(self, parts: Tensor) -> Tensor:
        """The loss: the parts with their weights."""
        weights = self.weights
        factors = [1.0, weights.information, weights.alignment, weights.sparsity]
        return parts @ parts.new_tensor(factors)
