"""Run a path with only its filters: weights are gathered, nothing is computed to be masked."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from fmce_ops.errors import ModelError
from fmce_ops.pathways.gates import Controller, Gated, gated_layers, split_code


class Gather(nn.Module):
    """The channels ``open`` of a feature map (N, C, H, W)."""

    open: Tensor

    def __init__(self, open: Tensor) -> None:
        super().__init__()
        self.register_buffer("open", open)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.open]


class Scatter(nn.Module):
    """Channels put to their places ``open`` among ``channels``; the others are zero."""

    open: Tensor

    def __init__(self, open: Tensor, channels: int) -> None:
        super().__init__()
        self.register_buffer("open", open)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return _scattered(x, self.open, self.channels)


class Narrow(nn.Module):
    """A gated convolution that computes only the filters that some image of the batch opens.

    The norm is folded into the weights. Where it alone feeds another one it hands over just the
    filters that were computed, and the other one reads which they are.
    """

    def __init__(self, gated: Gated, feeder: "Narrow | None", feeds: bool) -> None:
        super().__init__()
        self.conv = _fused(gated)
        if not isinstance(gated.controller, Controller):
            raise ModelError(
                "the gates of this network are the same for every image: use fixed in place of "
                "compact."
            )
        self.controller = gated.controller
        self.feeds = feeds
        self._feeder = (feeder,)  # in a tuple, so that it is no submodule of this one
        self.open = torch.zeros(0, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        feeder = self._feeder[0]
        inputs = feeder.open if feeder else None
        gates = _scores(self.controller, x, inputs) > 0
        open = gates.any(0).nonzero()[:, 0]
        masked = len(x) > 1 or not len(open)
        self.open = open = open if len(open) else open.new_zeros(1)  # closed by its gate
        y = self._filters(x, open, inputs)
        if masked:
            y = y * gates[:, open, None, None]
        return y if self.feeds else _scattered(y, open, self.conv.out_channels)

    def _filters(self, x: Tensor, open: Tensor, inputs: Tensor | None) -> Tensor:
        conv, bias = self.conv, self.conv.bias
        assert bias is not None
        if conv.groups > 1 and not _is_depthwise(conv):
            return conv(x)[:, open]
        weight, groups = conv.weight[open], 1
        if _is_depthwise(conv):
            x, groups = x[:, open], len(open)
        elif inputs is not None:
            weight = weight[:, inputs]
        padding = conv.padding
        if conv.padding_mode != "zeros":
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0, 0)
        return F.conv2d(x, weight, bias[open], conv.stride, padding, conv.dilation, groups)


def compact(network: nn.Module) -> nn.Module:
    """A copy for evaluation that computes only what the gates leave open, with the same answers.

    Of a batch every filter is computed that some image opens, so images of like paths belong
    together; one image costs just its own path.

    Parameters
    ----------
    network : what `attach` returned.

    Raises
    ------
    ModelError
        Its gates never change, or a norm takes its statistics from the batch.
    """
    narrow = copy.deepcopy(network).eval()
    layers = gated_layers(narrow)
    feeders = {gated.site.fed_by for gated in layers.values()}
    made: dict[str, Narrow] = {}
    for name, gated in layers.items():
        feeder = made[gated.site.fed_by] if gated.site.fed_by else None
        made[name] = Narrow(gated, feeder, name in feeders)
        narrow.set_submodule(name, made[name])
    return narrow.requires_grad_(False)


def fixed(network: nn.Module, code: Tensor) -> nn.Module:
    """A plain network of the filters in ``code`` (gates,) bool alone, the same for every image.

    It has no gates and no controllers: smaller convolutions with their norms folded in, and
    channels put in their places where others add to them. With all gates open it is the dense
    network, folded.
    """
    plain = copy.deepcopy(network).eval()
    layers = gated_layers(plain)
    feeders = {gated.site.fed_by for gated in layers.values()}
    codes = split_code(network, code)
    opened = {name: _indices(part) for name, part in codes.items()}
    for name, gated in layers.items():
        inputs = opened[gated.site.fed_by] if gated.site.fed_by else None
        parts = _smaller(_fused(gated), codes[name], inputs)
        if name not in feeders and not codes[name].all():
            parts.append(Scatter(opened[name], gated.conv.out_channels))
        plain.set_submodule(name, parts[0] if len(parts) == 1 else nn.Sequential(*parts))
    return plain.requires_grad_(False)


def _indices(open: Tensor) -> Tensor:
    """Of the filters that are on; where none is, of one that then answers zero."""
    return open.nonzero()[:, 0] if open.any() else torch.zeros(1, dtype=torch.long)


def _smaller(conv: nn.Conv2d, open: Tensor, inputs: Tensor | None) -> list[nn.Module]:
    """Modules that compute the filters ``open`` of a convolution from the channels ``inputs``.

    The convolution itself is changed.
    """
    filters = _indices(open)
    assert conv.bias is not None
    if open.all() and inputs is None:
        return [conv]
    with torch.no_grad():
        conv.weight.mul_(open[:, None, None, None])
        conv.bias.mul_(open)
    if conv.groups > 1 and not _is_depthwise(conv):
        return [conv, Gather(filters)]
    weight = conv.weight[filters] if inputs is None else conv.weight[filters][:, inputs]
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(conv.bias[filters])
    if _is_depthwise(conv):
        conv.in_channels = conv.out_channels = conv.groups = len(filters)
        return [Gather(filters), conv]
    conv.out_channels, conv.in_channels = weight.shape[:2]
    return [conv]


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels > 1


def _fused(gated: Gated) -> nn.Conv2d:
    """The convolution with its norm folded in, and with a bias."""
    if isinstance(gated.norm, nn.BatchNorm2d):
        if gated.norm.running_mean is None:
            raise ModelError(
                f"the norm behind {gated.site.name} takes its statistics from the batch and cannot "
                "be folded into the filters: train it with track_running_stats."
            )
        return fuse_conv_bn_eval(copy.deepcopy(gated.conv).eval(), gated.norm.eval())
    conv = copy.deepcopy(gated.conv)
    if conv.bias is None:
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
    return conv


def _scores(controller: Controller, x: Tensor, inputs: Tensor | None) -> Tensor:
    """The controller's scores where only the channels ``inputs`` are at hand; others are zero."""
    if inputs is None:
        return controller.scores(x)
    reduce = controller.reduce
    hidden = F.linear(x.mean((2, 3)), reduce.weight[:, inputs], reduce.bias)
    return controller.score(hidden.relu())


def _scattered(x: Tensor, open: Tensor, channels: int) -> Tensor:
    whole = x.new_zeros(len(x), channels, *x.shape[2:])
    return whole.index_copy_(1, open, x)
