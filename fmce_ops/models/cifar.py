"""ResNets for images of 32 px, as in section 4.2 of arXiv 1512.03385; for ``model.backbone``.

Name them as a factory and cut them behind their last stage:
``backbone: fmce_ops.models.cifar:resnet20``, ``stem: standard``, ``cut: layer3``.
"""

from collections import OrderedDict

from torch import nn


def resnet20(num_classes: int) -> nn.Module:
    """Three stages of 3 basic blocks, 16 to 64 channels: .27 million weights."""
    return _resnet(3, num_classes)


def resnet56(num_classes: int) -> nn.Module:
    """Three stages of 9 basic blocks, 16 to 64 channels: .85 million weights."""
    return _resnet(9, num_classes)


def wide_resnet20(num_classes: int) -> nn.Module:
    """ResNet-20 with twice the channels, 32 to 128: 1.1 million weights."""
    return _resnet(3, num_classes, first=32)


def _resnet(blocks: int, classes: int, first: int = 16) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(3, first, 3, padding=1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(first)
    layers["relu"] = nn.ReLU(inplace=True)
    channels = first
    for number, width in enumerate((first, 2 * first, 4 * first), start=1):
        layers[f"layer{number}"] = _stage(channels, width, blocks)
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten(1)
    layers["fc"] = nn.Linear(channels, classes)
    network = nn.Sequential(layers)
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return network


def _stage(channels: int, width: int, blocks: int) -> nn.Sequential:
    # Imported here: torchvision takes seconds, and not all who import models build one.
    from torchvision.models.resnet import BasicBlock

    shortcut = None
    if channels != width:
        conv = nn.Conv2d(channels, width, 1, stride=2, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
    first = BasicBlock(channels, width, 1 if channels == width else 2, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))
