"""FMCE-Net: parameters counted by hand, shapes, precision, and that it can learn."""

import pytest
import torch
import torch.nn.functional as F
from fmce_ops.models import FmceNet


def count(net: FmceNet) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_the_network_of_the_paper_for_1024_channels() -> None:
    # 1024 -> 512 -> 256 by 3x3 with biases, side 7 -> 3 -> 1, then 256 -> 10.
    by_hand = (1024 * 512 * 9 + 512) + (512 * 256 * 9 + 256) + (256 * 10 + 10)
    assert count(FmceNet((1024, 7, 7), 10)) == by_hand == 5_901_578


def test_wider_maps_are_first_brought_to_1024_channels() -> None:
    reduction = 2048 * 1024 + 1024
    assert count(FmceNet((2048, 7, 7), 10)) == 5_901_578 + reduction


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ((64, 4, 4), 1),
        ((64, 2, 2), 1),
        ((64, 1, 1), 1),
        ((64, 14, 14), 9),
        ((64, 7, 2), 1),
        ((3, 8, 8), 4),
    ],
)
def test_a_side_of_one_is_not_pooled(shape: tuple[int, int, int], left: int) -> None:
    net = FmceNet(shape, 10)
    channels = max(1, shape[0] // 2 // 2)
    assert net.head.in_features == channels * left
    assert net(torch.rand(2, *shape)).shape == (2, 10)


def test_half_precision_maps_are_computed_in_float32() -> None:
    net = FmceNet((16, 4, 4), 3)
    maps = torch.rand(5, 16, 4, 4).half()
    assert net(maps).dtype == torch.float32
    assert torch.equal(net(maps), net(maps.float()))


def test_pooling_comes_before_the_relu_and_the_forward_pass_is_the_rule() -> None:
    net = FmceNet((8, 7, 7), 4)
    maps = torch.randn(3, 8, 7, 7)
    first, second = (layer for layer in net.layers if isinstance(layer, torch.nn.Conv2d))
    x = maps
    for conv in (first, second):
        x = F.relu(F.max_pool2d(F.conv2d(x, conv.weight, conv.bias, padding=1), 2))
    torch.testing.assert_close(net(maps), x.flatten(1) @ net.head.weight.T + net.head.bias)


def test_phases_that_differ_in_their_channels_are_learned() -> None:
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    maps = torch.rand(120, 12, 4, 4)
    maps[torch.arange(120), labels] += 1
    net = FmceNet((12, 4, 4), 3)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(maps), labels).backward()
        optimizer.step()
    assert (net(maps).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize("shape", [(64, 1, 1), (64, 2, 2), (64, 3, 3), (64, 7, 7), (64, 1, 3)])
def test_small_maps_get_what_a_convolution_gives(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    net, maps = FmceNet(shape, 10).double(), torch.rand(5, *shape)
    plain = torch.nn.Sequential(
        *[
            torch.nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1).double()
            if isinstance(layer, torch.nn.Conv2d)
            else layer
            for layer in net.layers
        ]
    )
    plain.load_state_dict(net.layers.state_dict())
    made, wanted = net.layers(maps.double()), plain(maps.double())
    torch.testing.assert_close(made, wanted)
    assert list(net.state_dict()) == [
        *[f"layers.{name}" for name in plain.state_dict()],
        "head.weight",
        "head.bias",
    ]
    wanted.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in plain.parameters()]
    made.square().sum().backward()
    found = [parameter.grad for parameter in net.layers.parameters()]
    torch.testing.assert_close(found, gradients)
