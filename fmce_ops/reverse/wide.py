"""The same module in float64, for what float32 is too coarse for."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def widened(module: nn.Module) -> nn.Module:
    """A module with copies of its tensors in float64 that no gradient comes back to.

    Whatever else it holds is shared with the original, and may be nothing that can be copied.
    """
    wide = copy.copy(module)
    loose = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    vars(wide).update(
        _each(_double, loose),
        _parameters=_each(_constant, module._parameters),
        _buffers=_each(_double, module._buffers),
        _modules=_each(widened, module._modules),
    )
    return wide


def _each(change: Callable[[Any], Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else change(value) for name, value in values.items()}


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(_double(value), requires_grad=False)


def _double(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.detach().to(torch.float64, copy=True)
