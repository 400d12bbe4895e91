"""A gated classifier with what was learnt about its paths: the model that is served."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmce_ops.pathways.gates import attach, gated_layers, recorded


@dataclass(frozen=True)
class PathAnswer:
    """What a `PathNetwork` says of N images.

    Attributes
    ----------
    logits : (N, K).
    codes : (N, gates) bool.
    adversarial : (N,) score 0 to 1 of the detector.
    """

    logits: Tensor
    codes: Tensor
    adversarial: Tensor


class PathNetwork(nn.Module):
    """A gated classifier, the profile of each class, and a detector of adversarial inputs.

    Parameters
    ----------
    classifier : without gates.
    modules : the convolutions that get gates; None: as `attach` chooses.
    """

    profiles: Tensor

    def __init__(
        self, classifier: nn.Module, classes: int, modules: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.gated = attach(classifier, modules)
        gates = sum(gated.conv.out_channels for gated in gated_layers(self.gated).values())
        self.register_buffer("profiles", torch.zeros(classes, gates))
        self.detector = nn.Linear(gates, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 3, H, W)."""
        return self.gated(x)

    def answer(self, x: Tensor) -> PathAnswer:
        """Logits, paths and detector's scores from one forward pass."""
        with recorded(self.gated) as layers:
            logits = self.gated(x)
        codes = torch.cat([layer.gates > 0 for layer in layers.values()], dim=1)
        return PathAnswer(logits, codes, self.detector(codes.float()).sigmoid()[:, 0])
