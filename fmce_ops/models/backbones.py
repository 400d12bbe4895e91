"""Classifiers D(x) = F(C(x)): any network cut at its feature map, with a head of its own."""

import difflib
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.errors import ModelError
from fmce_ops.models.cutting import cut_at

# By the name of the class, so that torchvision is imported only where a network is built: it takes
# seconds, and those who judge feature maps need none.
_DEFAULT_CUTS = {
    "AlexNet": "features",
    "ConvNeXt": "features",
    "DenseNet": "features",
    "EfficientNet": "features",
    "GoogLeNet": "inception5b",
    "Inception3": "Mixed_7c",
    "MNASNet": "layers",
    "MobileNetV2": "features",
    "MobileNetV3": "features",
    "RegNet": "trunk_output",
    "ResNet": "layer4",  # also ResNeXt and Wide ResNet
    "ShuffleNetV2": "conv5",
    "SqueezeNet": "features",
    "VGG": "features",
}


class Classifier(nn.Module):
    """A backbone C and a head F: global average pooling and a linear layer.

    Parameters
    ----------
    backbone
        Maps images (N, 3, H, W) to a feature map (N, C, h, w).
    channels
        C of the feature map.
    classes
        Number of logits.
    """

    def __init__(self, backbone: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, classes)
        )

    def features(self, x: Tensor) -> Tensor:
        """Feature map (N, C, h, w) of images (N, 3, H, W)."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        return self.head(self.features(x))


def build(
    backbone: str,
    classes: int,
    *,
    stem: str = "standard",
    cut: str | None = None,
    in_size: int,
) -> Classifier:
    """An untrained classifier; seed torch before, for the weights are drawn here.

    Only what lies before the cut is kept of the network. Where its layers form a chain the
    classifier's ``backbone`` is an ``nn.Sequential`` of its own modules under their own names.

    Parameters
    ----------
    backbone
        A classification network of torchvision, such as ``shufflenet_v2_x0_5``, or
        ``package.module:factory``; the factory is called with ``num_classes`` and returns a
        module.
    classes
        Number of classes.
    stem
        ``standard``, or ``small`` for images of 28 to 64 px (ResNet and ShuffleNet V2): first
        convolution with stride 1, no max pooling, so that the map is 1/8 of the image.
    cut
        Dotted name of the submodule whose output is the feature map; the usual families have a
        default.
    in_size
        Side of the images in pixels.

    Raises
    ------
    ModelError
        There is no such network, stem or cut, or the cut does not give a map (N, C, h, w).

    Examples
    --------
    >>> feature_shape(build("resnet18", 10, stem="small", in_size=32), 32)
    (512, 4, 4)
    """
    from torchvision import models

    network = make_network(backbone, classes)
    if stem == "small":
        _shrink_stem(backbone, network)
    elif stem != "standard":
        raise ModelError(f"There is no stem {stem!r}: choose 'standard' or 'small'.")
    if isinstance(network, models.DenseNet):
        # Its forward applies this ReLU as a function, behind the module that is the cut.
        network.features.add_module("relu", nn.ReLU())
    body, channels = cut_at(backbone, network, cut or _default_cut(network), in_size)
    classifier = Classifier(body, channels, classes)
    if "head" in _chain(classifier):
        raise ModelError(
            f"The backbone {backbone!r} has a module 'head' before its cut, which is the name of "
            "the classifier's own: give the module another name."
        )
    return classifier


def functional_modules(classifier: Classifier) -> dict[str, nn.Module]:
    """The modules that an image passes one after another, by name; the last is the ``head``.

    A backbone whose layers do not form a chain is one module, ``backbone``.
    """
    return {**_chain(classifier), "head": classifier.head}


def _chain(classifier: Classifier) -> dict[str, nn.Module]:
    """The functional modules of the backbone."""
    body = classifier.backbone
    prefix = ""
    while isinstance(body, nn.Sequential) and len(body) == 1 and isinstance(body[0], nn.Sequential):
        ((name, body),) = body.named_children()
        prefix += f"{name}."
    if not isinstance(body, nn.Sequential):
        return {"backbone": classifier.backbone}
    return {prefix + name: module for name, module in body.named_children()}


def feature_shape(classifier: Classifier, size: int) -> tuple[int, int, int]:
    """(C, h, w) of the feature map for images of ``size`` pixels."""
    parameter = next(classifier.parameters())
    mode = classifier.training
    classifier.eval()
    try:
        with torch.no_grad():
            image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
            _, channels, height, width = classifier.features(image).shape
    finally:
        classifier.train(mode)
    return channels, height, width


def _default_cut(network: nn.Module) -> str | None:
    from torchvision import models

    cuts = _DEFAULT_CUTS.items()
    return next((cut for kind, cut in cuts if isinstance(network, getattr(models, kind))), None)


def make_network(name: str, classes: int | None = None) -> nn.Module:
    """A whole untrained network, as its maker makes it; the terms are those of :func:`build`.

    Raises
    ------
    ModelError
        There is no such network.
    """
    if ":" in name:
        return _from_factory(name, classes)
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["resnet18", "shufflenet_v2_x0_5"]
        raise ModelError(
            f"There is no backbone {name!r} in torchvision: perhaps {' or '.join(near)}, "
            "or give your own as package.module:factory."
        )
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads lie outside the backbone; the usual initialisation is asked for
        # by name because torchvision warns otherwise.
        options |= {"aux_logits": False, "init_weights": True}
    return models.get_model(name, weights=None, **options)


def _from_factory(name: str, classes: int | None) -> nn.Module:
    module, _, factory = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except Exception as error:  # whatever the module's own code makes of it
        raise ModelError(
            f"The backbone {name!r} could not be found ({type(error).__name__}: {error}): "
            "give package.module:factory of a module that Python can import."
        ) from error
    try:
        network = make() if classes is None else make(num_classes=classes)
    except TypeError as error:
        raise ModelError(
            f"The backbone {name!r} could not be made ({error}): "
            "give a function that takes num_classes."
        ) from error
    except Exception as error:  # whatever the factory's own code makes of it
        raise ModelError(
            f"The backbone {name!r} could not be made ({type(error).__name__}: {error}): "
            "see to its factory."
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"The backbone {name!r} made a {type(network).__name__}: return a torch.nn.Module."
        )
    return network


def _shrink_stem(name: str, network: nn.Module) -> None:
    from torchvision import models

    if isinstance(network, models.ResNet):
        old = network.conv1
        network.conv1 = nn.Conv2d(
            old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False
        )
        # As torchvision initialises every convolution of a ResNet.
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(network, models.ShuffleNetV2):
        network.conv1[0].stride = (1, 1)
    else:
        raise ModelError(
            f"The backbone {name!r} has no small stem: "
            "use stem 'standard', or a ResNet or ShuffleNet V2."
        )
    network.maxpool = nn.Identity()
