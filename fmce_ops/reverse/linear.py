"""Linear maps: the least-norm least-squares step, to the precision of the data type."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.reverse.circulant import Twin, preconditioned, twin_of
from fmce_ops.reverse.products import Linearised
from fmce_ops.reverse.solver import least_squares, norms, spread

TRIVIAL = {nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
_CONVOLUTIONS = {nn.Conv1d, nn.Conv2d, nn.Conv3d}
_LINEAR = {
    *TRIVIAL,
    *_NORMS,
    *_CONVOLUTIONS,
    nn.Linear,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
}
_FACTORED = 512  # least side up to which a matrix is factored; above, products are cheaper
_ROUNDS = 4
_ITERATIONS = 300  # of the solver in one round


def is_plain(module: nn.Module) -> bool:
    """Whether nothing but the module's own forward makes its output."""
    return not module._forward_hooks and not module._forward_pre_hooks


def is_linear(module: nn.Module) -> bool:
    """Whether the module, in eval mode, is known to be linear up to a constant."""
    known = type(module) in _LINEAR
    inside = type(module) is nn.Sequential and all(is_linear(child) for child in module)
    return (known or inside) and is_plain(module)


def linear_step(
    module: nn.Module, x0: Tensor, difference: Tensor, damping: Tensor, precision: float
) -> tuple[Tensor, Tensor]:
    """argmin |A d - difference|^2 + damping^2 |d|^2 of least norm, A the module without its bias.

    A small `Linear` or 1x1 convolution is factored, batch norm is divided channel by channel,
    everything else is solved by products and refined with residuals in float64.

    Parameters
    ----------
    x0 : (n, ...) any input, for its shape and type.
    difference : (n, ...) target minus output.
    damping : (n,).
    precision : relative error of d that is good enough.

    Returns
    -------
    d (n, ...) in float64 and the iterations (n,).
    """
    if type(module) in _NORMS:
        return _divided(module, difference, damping), torch.zeros_like(damping, dtype=torch.long)
    if _is_dense(module):
        step = _factored(module, x0, difference, damping)
        return step, torch.zeros_like(damping, dtype=torch.long)
    return _refined(module, x0, difference, damping, precision)


def _divided(norm: Any, difference: Tensor, damping: Tensor) -> Tensor:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    weak = scale.abs() <= torch.finfo(difference.dtype).eps * scale.abs().amax()
    scale = scale.masked_fill(weak, 0).view(1, -1, *[1] * (difference.ndim - 2))
    inverse = scale / (scale.square() + spread(damping, difference.double()).square())
    return difference * torch.where(scale == 0, 0, inverse)


def _is_dense(module: Any) -> bool:
    if type(module) in _CONVOLUTIONS:
        one = set(module.kernel_size) == {1} and not any(_margins(module.padding))
        least = min(module.out_channels, module.in_channels) // module.groups
        return one and least <= _FACTORED
    return type(module) is nn.Linear and min(module.weight.shape) <= _FACTORED


def _margins(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    return () if isinstance(padding, str) else padding


def _factored(module: Any, x0: Tensor, difference: Tensor, damping: Tensor) -> Tensor:
    """One matrix for all positions: (n, groups, positions, channels) from both sides."""
    convolution = type(module) in _CONVOLUTIONS
    groups = module.groups if convolution else 1
    weight = module.weight.detach().double()
    u, s, v = torch.linalg.svd(weight.reshape(groups, -1, weight.shape[1]), full_matrices=False)
    noise = torch.finfo(module.weight.dtype).eps * max(u.shape[1], v.shape[2])
    s = s.where(s > noise * s.amax(), 0)[:, None]
    gain = s / (s.square() + damping.double().square().view(-1, 1, 1, 1))
    gain = torch.where(s == 0, 0, gain)
    rows = difference.double()
    if not convolution:
        return ((rows.reshape(len(x0), 1, -1, rows.shape[-1]) @ u * gain) @ v).reshape(x0.shape)
    columns = rows.reshape(len(x0), groups, u.shape[1], -1).transpose(2, 3)
    seen = ((columns @ u * gain) @ v).transpose(2, 3)
    step = torch.zeros_like(x0, dtype=torch.float64)
    places = (slice(None), slice(None), *(slice(None, None, stride) for stride in module.stride))
    step[places] = seen.reshape(step[places].shape)
    return step


def _refined(
    module: nn.Module, x0: Tensor, difference: Tensor, damping: Tensor, precision: float
) -> tuple[Tensor, Tensor]:
    """Solves in the input's own type, residuals between them in float64 where no twin helps."""
    cheap = Linearised(module, x0)
    twin = twin_of(module, x0, difference, bool((damping > 0).all()))
    exact = cheap if twin or x0.dtype == torch.float64 else _widened(module, x0)
    tolerance = max(precision, torch.finfo(x0.dtype).eps ** 0.5)
    wide, shift = difference.double(), damping.double().square()
    step = torch.zeros_like(x0, dtype=torch.float64)
    dual = torch.zeros_like(wide)
    count = torch.zeros_like(damping, dtype=torch.long)
    live, last = torch.ones_like(count, dtype=torch.bool), torch.full_like(damping, torch.inf)
    for _ in range(_ROUNDS):
        rest = (wide - exact.push(step.to(exact.dtype))) * spread(live, wide)
        if twin and twin.wide:
            rest = rest - spread(shift * live, wide) * dual
            more, spent = _eased(cheap, twin, rest, shift, tolerance)
            dual, correction = dual + more, exact.pull(more.to(exact.dtype))
        else:
            gradient = exact.pull(rest.to(exact.dtype)) - spread(shift * live, step) * step
            if twin:
                correction, spent = _eased(cheap, twin, gradient, shift, tolerance)
            else:
                correction, spent = _scaled(cheap, gradient, rest, damping, tolerance)
        step, count, size = step + correction, count + spent, norms(correction)
        live = live & (tolerance * size > precision * norms(step)) & (size < last / 2)
        last = size
        if not live.any():
            break
    return step, count


def _widened(module: nn.Module, x0: Tensor) -> Linearised:
    return Linearised(copy.deepcopy(module).double(), x0.double())


def _eased(
    cheap: Linearised, twin: Twin, goal: Tensor, shift: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    scale = norms(goal).clamp(min=torch.finfo(torch.float64).tiny)
    unit = (goal / spread(scale, goal)).to(cheap.dtype)
    found, spent = preconditioned(cheap, twin, unit, shift, tolerance, _ITERATIONS)
    return found * spread(scale, goal), spent


def _scaled(
    cheap: Linearised, gradient: Tensor, rest: Tensor, damping: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    scale = norms(gradient).clamp(min=torch.finfo(torch.float64).tiny)
    unit = (gradient / spread(scale, gradient)).to(cheap.dtype)
    found = least_squares(cheap, unit, norms(rest) / scale, damping, tolerance, _ITERATIONS)
    return found.step * spread(scale, gradient), found.iterations
