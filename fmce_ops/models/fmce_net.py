"""FMCE-Net: which phase of training does a feature map come from?"""

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
            layers += [nn.Conv2d(channels, halved, 3, padding=1), nn.MaxPool2d(window), nn.ReLU()]
            channels, height, width = halved, height // window[0], width // window[1]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels * height * width, phases)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits (N, K) of maps (N, C, H, W) in float16 or float32; computed in float32."""
        return self.head(self.layers(maps.float()).flatten(1))
