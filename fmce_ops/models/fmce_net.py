"""FMCE-Net: which phase of training does a feature map come from?"""

import torch.nn.functional as F
from torch import Tensor, nn

_WIDEST = 1024  # channels of the maps for which the paper describes the network


class FmceNet(nn.Module):
    """Classifier of feature maps by their phase (arXiv 2405.04041, section FMCE-Net).

    Two 3x3 convolutions, each followed by max pooling and ReLU, each halving the side and the
    channels; then a linear layer. Wider maps are first brought to 1024 channels by a 1x1
    convolution (the paper adds one convolution there and does not state its size). A side of 1
    is not pooled further.

    Parameters
    ----------
    shape
        (C, H, W) of the feature maps.
    phases
        Number of phases K.

    Examples
    --------
    >>> import torch
    >>> FmceNet((1024, 7, 7), 10)(torch.zeros(2, 1024, 7, 7)).shape
    torch.Size([2, 10])
    """

    def __init__(self, shape: tuple[int, int, int], phases: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        if channels > _WIDEST:
            layers += [nn.Conv2d(channels, _WIDEST, 1), nn.ReLU()]
            channels = _WIDEST
        for _ in range(2):
            halved = max(1, channels // 2)
            window = (min(2, height), min(2, width))
            layers += [_Convolution(channels, halved), nn.MaxPool2d(window), nn.ReLU()]
            channels, height, width = halved, height // window[0], width // window[1]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels * height * width, phases)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits (N, K) of maps (N, C, H, W) in float16 or float32; computed in float32."""
        return self.head(self.layers(maps.float()).flatten(1))


class _Convolution(nn.Conv2d):
    """3x3, padding 1; one matrix product where a map on a CPU has at most nine positions.

    There the library's convolution trains two to nine times slower (benchmarks/fmce_net.md).
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        n, _, height, width = input.shape
        positions = height * width
        if input.device.type != "cpu" or positions > 9:
            return super().forward(input)
        patches = F.unfold(input, 3, padding=1).transpose(1, 2)
        made = F.linear(patches.flatten(0, 1), self.weight.flatten(1), self.bias)
        return made.view(n, positions, -1).transpose(1, 2).reshape(n, -1, height, width)
