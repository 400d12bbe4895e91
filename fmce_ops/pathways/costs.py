"""What a path costs: multiply-adds of an image, with and without its gates."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fmce_ops.pathways.gates import detach, gated_layers
from fmce_ops.pathways.sites import evaluating


@dataclass(frozen=True)
class LayerCosts:
    """Of one gated convolution.

    Attributes
    ----------
    pair : multiply-adds of one filter and one of its input channels.
    inputs, filters : channels that a filter reads, filters.
    fed_by : number of the gated convolution whose open filters are the input, or None.
    controller : multiply-adds of its controller.
    """

    pair: int
    inputs: int
    filters: int
    fed_by: int | None
    controller: int


@dataclass(frozen=True)
class Costs:
    """Of a network on images of one size.

    Attributes
    ----------
    rest : multiply-adds of everything without gates.
    """

    rest: int
    layers: tuple[LayerCosts, ...]

    @property
    def dense(self) -> int:
        """Multiply-adds of an image in the network without gates."""
        return self.rest + sum(layer.pair * layer.inputs * layer.filters for layer in self.layers)

    def multiply_adds(self, codes: Tensor, *, controllers: bool = True) -> Tensor:
        """Of every image, (N,) int64, from its code (N, gates).

        Parameters
        ----------
        controllers : whether those are run, too; a path that is fixed needs none.
        """
        opened = [
            part.sum(1) for part in codes.long().split([at.filters for at in self.layers], dim=1)
        ]
        total = torch.full((len(codes),), self.rest, dtype=torch.int64, device=codes.device)
        for layer, filters in zip(self.layers, opened, strict=True):
            inputs = layer.inputs if layer.fed_by is None else opened[layer.fed_by]
            total += layer.pair * filters * inputs + controllers * layer.controller
        return total


@torch.no_grad()
def measure_costs(network: nn.Module, example: Tensor) -> Costs:
    """Run one image ``example`` (1, 3, H, W) through what `attach` returned, and count."""
    layers = gated_layers(network)
    positions: dict[str, int] = {}
    handles = [
        gated.mask.register_forward_hook(
            lambda mask, given, out, name=name: positions.update({name: math.prod(out.shape[2:])})
        )
        for name, gated in layers.items()
    ]
    try:
        with evaluating(network):
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    numbers = {name: number for number, name in enumerate(layers)}
    found = []
    for name, gated in layers.items():
        filters, inputs, *kernel = gated.conv.weight.shape
        fed_by = numbers[gated.site.fed_by] if gated.site.fed_by else None
        control = sum(p.numel() for p in gated.controller.parameters() if p.ndim == 2)
        pair = positions[name] * math.prod(kernel)
        found.append(LayerCosts(pair, inputs, filters, fed_by, control))
    with FlopCounterMode(display=False) as counter:
        detach(network).eval()(example)
    whole = counter.get_total_flops() // 2
    return Costs(whole - sum(at.pair * at.inputs * at.filters for at in found), tuple(found))
