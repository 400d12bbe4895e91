"""The classifier that params.yaml asks for, and how it is described for those who load it."""

import torch

from fmce_ops.data import Images
from fmce_ops.models import Classifier, build, load_into
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import CHECKPOINTS
from fmce_ops.stages.work import vouched
from fmce_ops.tracking.serving import Network


def build_classifier(params: Params, classes: int) -> Classifier:
    """The classifier with the random weights of ``train.seed``."""
    torch.manual_seed(params.train.seed)
    model = params.model
    return build(
        model.backbone, classes, stem=model.stem, cut=model.cut, in_size=params.data.image_size
    )


def trained_classifier(params: Params, classes: int) -> Classifier:
    """The classifier as the stage ``train`` left it, in evaluation mode."""
    classifier = build_classifier(params, classes)
    load_into(classifier, vouched(CHECKPOINTS)[-1])
    return classifier.eval()


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
