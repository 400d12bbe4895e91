"""Small linear maps: one singular value decomposition answers every sample."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.reverse.wide import widened

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LEAST, _MOST = 512, 1024  # sides of a matrix that is factored; above, products are cheaper
_CHUNK = 64  # unit vectors that run through a module at a time


@dataclass(frozen=True)
class Factors:
    """A = U diag(s) V for each group of channels, in float64, noise in s set to 0.

    Attributes
    ----------
    u : (groups, outputs, k).
    s : (groups, 1, k).
    v : (groups, k, inputs).
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def solve(self, rows: Tensor, damping: Tensor) -> Tensor:
        """(n, groups, positions, outputs) -> (n, groups, positions, inputs), damping (n,)."""
        # Divided by s first: s^2 alone overflows before its quotient does.
        gain = 1 / (self.s + damping.double().square().view(-1, 1, 1, 1) / self.s)
        return (rows @ self.u * torch.where(self.s == 0, 0, gain)) @ self.v


def dense_step(module: Any, x0: Tensor, difference: Tensor, damping: Tensor) -> Tensor | None:
    """The step of `linear_step` (n, ...) in float64, or None where the map is too large for it.

    `Linear` and 1x1 convolutions are one matrix for all positions, other convolutions a matrix for
    each of their groups; any other map is a matrix of all its inputs and outputs.
    """
    if _is_pointwise(module) and _fits(*_weight(module).shape[1:]):
        if type(module) is nn.Linear:
            rows = difference.reshape(len(x0), 1, -1, difference.shape[-1])
            return (
                _factors(module, None, x0.dtype, x0.device).solve(rows, damping).reshape(x0.shape)
            )
        return _at_every_position(module, x0, difference, damping)
    groups = _groups(module)
    side = max(x0[0].numel(), difference[0].numel()) // groups
    if groups * side**3 > _MOST**3:
        return None
    factors = _factors(module, x0.shape[1:], x0.dtype, x0.device)
    return factors.solve(difference.reshape(len(x0), groups, 1, -1), damping).reshape(x0.shape)


def forget_factors() -> None:
    """Factors are kept while nothing can change their modules, and no longer."""
    _factors.cache_clear()


def _is_pointwise(module: Any) -> bool:
    if type(module) not in _CONVOLUTIONS:
        return type(module) is nn.Linear
    margins = () if isinstance(module.padding, str) else module.padding
    return set(module.kernel_size) == {1} and not any(margins)


def _groups(module: Any) -> int:
    return int(module.groups) if type(module) in _CONVOLUTIONS else 1


def _fits(outputs: int, inputs: int) -> bool:
    return min(outputs, inputs) <= _LEAST or max(outputs, inputs) <= _MOST


def _weight(module: Any) -> Tensor:
    """(groups, outputs, inputs) of a pointwise module."""
    weight: Tensor = module.weight.detach()
    return weight.reshape(_groups(module), -1, weight.shape[1])


def _at_every_position(module: Any, x0: Tensor, rows: Tensor, damping: Tensor) -> Tensor:
    columns = rows.reshape(len(x0), module.groups, rows.shape[1] // module.groups, -1)
    seen = (
        _factors(module, None, x0.dtype, x0.device)
        .solve(columns.transpose(2, 3), damping)
        .transpose(2, 3)
    )
    step = torch.zeros_like(x0, dtype=torch.float64)
    places = (slice(None), slice(None), *(slice(None, None, stride) for stride in module.stride))
    step[places] = seen.reshape(step[places].shape)
    return step


@lru_cache(maxsize=4)
def _factors(
    module: Any, shape: torch.Size | None, dtype: torch.dtype, device: torch.device
) -> Factors:
    """Of the module's weight, or of all that it does to inputs of ``shape``."""
    matrix = _weight(module).double() if shape is None else _matrix(module, shape, device)
    if not matrix.isfinite().all():
        matrix = torch.zeros_like(matrix)  # it overflows: the step is 0, and the input is kept
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    # What an input rounded to its type cannot make use of is noise, and so is the error of the SVD.
    side = max(matrix.shape[1:])
    noise = max(torch.finfo(dtype).eps * side**0.5, torch.finfo(torch.float64).eps * side)
    return Factors(u, s.where(s > noise * s.amax(), 0)[:, None], v)


def _matrix(module: nn.Module, shape: torch.Size, device: torch.device) -> Tensor:
    """(groups, outputs, inputs) from the images of unit vectors, the same in every group."""
    wide = widened(module)
    for part in wide.modules():
        for name in ("bias", "running_mean"):  # what is constant; weights may be tiny to it
            if (constant := getattr(part, name, None)) is not None:
                constant.zero_()
    groups = _groups(module)
    inputs = shape.numel() // groups
    units = torch.eye(inputs, dtype=torch.float64, device=device).repeat(1, groups)
    images = [wide(some.view(-1, *shape)) for some in units.split(_CHUNK)]
    return torch.cat(images).reshape(inputs, groups, -1).permute(1, 2, 0)
