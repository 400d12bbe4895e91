"""How long a network takes for an image."""

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer


@torch.inference_mode()
def milliseconds(network: nn.Module, images: Tensor, seconds: float = 0.2) -> float:
    """Median wall-clock of an image when (N, 3, H, W) are sent together, all threads."""
    timer = Timer(
        "network(images)",
        globals={"network": network.eval(), "images": images},
        num_threads=torch.get_num_threads(),
    )
    return float(timer.blocked_autorange(min_run_time=seconds).median) / len(images) * 1e3
