"""Max pooling backwards: lower what exceeds the target, raise what must reach it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_Pools = dict[type[nn.Module], int]
_MAX: _Pools = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_ADAPTIVE: _Pools = {nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3}
POOLINGS: _Pools = {**_MAX, **_ADAPTIVE}  # with the number of dimensions that they pool


def unpool(module: Any, target: Tensor, x0: Tensor) -> Tensor:
    """(n, C, *out) target -> (n, C, *in): a small change with that target as its maxima.

    Entries above the target of a window that they lie in are lowered to it. Where all entries of
    a window are below its target, the largest of those that no other window holds down is raised.

    It is the smallest where no windows overlap. Targets of those that do may contradict one
    another; then some stay out of reach.
    """
    dims = POOLINGS[type(module)]
    windows = _windows(module, x0.shape[-dims:], target.shape[-dims:]).to(x0.device)
    inside = windows >= 0
    flat, goal = x0.flatten(-dims).flatten(0, -2), target.flatten(-dims).flatten(0, -2)
    place = windows.clamp(min=0).flatten().expand(len(flat), -1)
    shape = (len(flat), *windows.shape)
    caps = goal[:, :, None].masked_fill(~inside, torch.inf)
    limit = torch.full_like(flat, torch.inf).scatter_reduce(1, place, caps.flatten(1), "amin")
    lowered = torch.minimum(flat, limit)
    seen = lowered.gather(1, place).view(shape).masked_fill(~inside, -torch.inf)
    free = inside & (limit.gather(1, place).view(shape) >= goal[:, :, None])
    best, which = seen.masked_fill(~free, -torch.inf).max(dim=2)
    raised = place.view(shape).gather(2, which[:, :, None])[:, :, 0]
    rise = torch.where(best.isfinite(), goal, -torch.inf)
    return lowered.scatter_reduce(1, raised, rise, "amax").view(x0.shape)


def _windows(module: Any, sizes: Sequence[int], outs: Sequence[int]) -> Tensor:
    """(L, K) flat positions that each of L outputs sees, -1 beyond the edge."""
    windows = torch.zeros(1, 1, dtype=torch.long)
    for axis, (size, out) in enumerate(zip(sizes, outs, strict=True)):
        own = _axis_windows(module, axis, size, out)
        joined = windows[:, None, :, None] * size + own[None, :, None, :]
        joined.masked_fill_((windows[:, None, :, None] < 0) | (own[None, :, None, :] < 0), -1)
        windows = joined.flatten(2).flatten(0, 1)
    return windows


def _axis_windows(module: Any, axis: int, size: int, out: int) -> Tensor:
    """(out, k) positions along one axis, -1 beyond the edge."""
    index = torch.arange(out)[:, None]
    if type(module) in _ADAPTIVE:
        start, end = index * size // out, -((-(index + 1) * size) // out)
        seen = start + torch.arange(int((end - start).max()))
        return seen.masked_fill(seen >= end, -1)
    kernel, stride, padding, dilation = (
        value if isinstance(value, int) else value[axis]
        for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    seen = index * stride - padding + dilation * torch.arange(kernel)
    return seen.masked_fill((seen < 0) | (seen >= size), -1)
