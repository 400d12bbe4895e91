"""How the present champion does on the data that a new classifier is judged on."""

from collections.abc import Callable
from pathlib import Path

import torch

from fmce_ops.data import Images
from fmce_ops.tracking.registry import load_network
from fmce_ops.tracking.serving import Network
from fmce_ops.training.posttrain import judge_images


def on_validation(
    network: Network, images: Images, device: torch.device
) -> Callable[[Path], float | None]:
    """How accurate the network in a model folder is on validation; None if it answers otherwise."""

    def accuracy(folder: Path) -> float | None:
        standing, champion = load_network(folder)
        if (standing.kind, standing.input_shape) != (network.kind, network.input_shape):
            return None
        if standing.spec["classes"] != network.spec["classes"]:
            return None
        size = standing.spec["image_size"]
        return judge_images(champion, images, "val", size, device).accuracy

    return accuracy
