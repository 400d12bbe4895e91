"""The classifier that params.yaml asks for, and how it is described for those who load it."""

from collections.abc import Callable
from pathlib import Path

import torch

from fmce_ops.data import Images
from fmce_ops.models import Classifier, build
from fmce_ops.stages.params import Params
from fmce_ops.tracking.registry import load_network
from fmce_ops.tracking.serving import Network
from fmce_ops.training.posttrain import judge_images


def build_classifier(params: Params, classes: int) -> Classifier:
    """The classifier with the random weights of ``train.seed``."""
    torch.manual_seed(params.train.seed)
    model = params.model
    return build(
        model.backbone, classes, stem=model.stem, cut=model.cut, in_size=params.data.image_size
    )


def describe_classifier(params: Params, images: Images, digest: str) -> Network:
    """What a logged classifier says of itself; ``digest`` is that of the images."""
    spec = {
        **params.model.model_dump(),
        "dataset": images.dataset,
        "classes": list(images.classes),
        "image_size": params.data.image_size,
        "channels": images.channels,
        "side": images.side,
        "mean": list(images.mean),
        "std": list(images.std),
    }
    return Network("classifier", spec, {"images": digest})


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
