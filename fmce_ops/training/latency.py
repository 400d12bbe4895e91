"""How long a network takes for an image."""

import statistics
import time

import torch
from torch import Tensor, nn

_WARM = 3  # calls that are not counted


@torch.inference_mode()
def milliseconds(network: nn.Module, images: Tensor, seconds: float = 0.3) -> float:
    """Median wall-clock of an image when (N, 3, H, W) are sent together, all threads."""
    network.eval()
    taken: list[float] = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(taken) <= _WARM:
        started = time.perf_counter()
        network(images)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[_WARM:]) / len(images) * 1e3
