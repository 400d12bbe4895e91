"""Networks: classifiers cut at their feature map, FMCE-Net, and weights on disk."""

from fmce_ops.models.backbones import (
    Classifier,
    build,
    feature_shape,
    functional_modules,
    make_network,
)
from fmce_ops.models.fmce_net import FmceNet
from fmce_ops.models.weights import load_checkpoint, load_into, load_weights, save_weights

__all__ = [
    "Classifier",
    "FmceNet",
    "build",
    "feature_shape",
    "functional_modules",
    "load_checkpoint",
    "load_into",
    "load_weights",
    "make_network",
    "save_weights",
]
