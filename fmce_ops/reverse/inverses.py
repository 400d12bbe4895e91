"""Closed forms: the nearest input for the modules whose inverse can be written down."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.reverse.linear import TRIVIAL, is_plain
from fmce_ops.reverse.pooling import POOLINGS, unpool

Inverse = Callable[[Any, Tensor, Tensor], Tensor]

_HALVINGS = 100  # float64 is exhausted after them
_TINY = 1e-150
_ALMOST = 1e-4  # part of the change that layer norm is asked for


def inverse_of(module: nn.Module) -> Inverse | None:
    """The closed form ``(module, target, x0) -> x``, where there is one.

    Target, x0 and x are (n, ...). Where no input reaches the target the output of x is the nearest
    to it; of several inputs x is the one nearest to x0.
    """
    found = _INVERSES.get(type(module))
    if found is None or not is_plain(module):
        return None
    if isinstance(module, nn.LeakyReLU) and module.negative_slope <= 0:
        return None  # folds, or is a ReLU
    if isinstance(module, nn.Softmax) and module.dim in (0, None):
        return None
    if isinstance(module, nn.LayerNorm) and module.elementwise_affine and not module.weight.all():
        return None  # what a weight of 0 hides is free, and the others hang on it
    return found


def _reshape(_: Any, target: Tensor, x0: Tensor) -> Tensor:
    return target.reshape(x0.shape)


def _relu(_: Any, target: Tensor, x0: Tensor) -> Tensor:
    return torch.where(target > 0, target, x0.clamp(max=0))


def _relu6(_: Any, target: Tensor, x0: Tensor) -> Tensor:
    return torch.where(target < 6, _relu(_, target, x0), x0.clamp(min=6))


def _leaky_relu(module: Any, target: Tensor, x0: Tensor) -> Tensor:
    return torch.where(target >= 0, target, target / module.negative_slope)


def _sigmoid(_: Any, target: Tensor, x0: Tensor) -> Tensor:
    """Beyond (0, 1) the limit is only approached: as near as the data type can tell."""
    eps = torch.finfo(target.dtype).eps
    exact = target.log() - (-target).log1p()
    edge = torch.tensor(eps, dtype=target.dtype, device=target.device).logit()
    below, above = torch.minimum(x0, edge), torch.maximum(x0, -edge)
    return torch.where(target <= 0, below, torch.where(target >= 1 - eps, above, exact))


def _softmax(module: Any, target: Tensor, x0: Tensor) -> Tensor:
    """log t plus the constant nearest to x0, t first brought onto the simplex."""
    dim = module.dim
    logs = _onto_simplex(target, dim).clamp(min=torch.finfo(target.dtype).eps).log()
    return logs + (x0 - logs).mean(dim, keepdim=True)


def _onto_simplex(target: Tensor, dim: int) -> Tensor:
    """The nearest point with entries >= 0 and sum 1 (Held, Wolfe and Crowder 1974)."""
    target = target - target.amax(dim, keepdim=True)  # the same point; no large sums
    ordered = target.movedim(dim, -1).sort(dim=-1, descending=True).values
    ranks = torch.arange(1, ordered.shape[-1] + 1, device=target.device)
    thresholds = (ordered.cumsum(-1) - 1) / ranks
    last = (ordered > thresholds).sum(-1, keepdim=True) - 1
    return (target - thresholds.gather(-1, last).movedim(-1, dim)).clamp(min=0)


def _valley(module: Any, target: Tensor, x0: Tensor) -> Tensor:
    """GELU and SiLU: they fall, then rise; the branch whose preimage is nearer to x0."""
    wide, start = target.double(), x0.double()
    bottom = _bottom(module, wide)
    rising = _bisect(module, wide, bottom.expand_as(wide), wide.clamp(min=0) + 1)
    falling = _bisect(module, wide, bottom.expand_as(wide), torch.full_like(wide, -40.0))
    two = (wide < 0) & ((falling - start).abs() < (rising - start).abs())
    reached = torch.where(two, falling, rising).to(x0.dtype)
    same = (module(x0) - target).abs() <= torch.finfo(x0.dtype).eps * target.abs().clamp(min=1)
    return torch.where(same, x0, reached)


def _bottom(module: Any, like: Tensor) -> Tensor:
    """() where the derivative vanishes."""
    low, high = like.new_tensor(-3.0), like.new_tensor(0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        with torch.enable_grad():
            leaf = middle.clone().requires_grad_()
            (slope,) = torch.autograd.grad(module(leaf), leaf)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return (low + high) / 2


def _bisect(module: Any, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x between ``low``, where the module is lowest, and ``high`` with module(x) = target."""
    for _ in range(_HALVINGS // 2):
        middle = (low + high) / 2
        above = module(middle) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _layer_norm(module: Any, target: Tensor, x0: Tensor) -> Tensor:
    """The nearest normalised vector, with the mean and scale that are nearest to x0.

    The greater the scale, the nearer its length comes to sqrt(size), by eps: the length tells the
    scale, as exactly as a part of the change that is asked for is worth.
    """
    width = len(module.normalized_shape)
    rows, wide = x0.double().flatten(-width), target.double().flatten(-width)
    gamma, beta = _flat(module.weight, wide, 1.0), _flat(module.bias, wide, 0.0)
    centred, root = rows - rows.mean(-1, keepdim=True), rows.shape[-1] ** 0.5
    own = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    normal = _onto_ball(gamma, wide - beta, root)
    length = normal.norm(dim=-1, keepdim=True) / root
    unit = normal / (root * length).clamp(min=_TINY)
    worth = _ALMOST * (normal - own).norm(dim=-1, keepdim=True) / root
    scale = (unit * centred).sum(-1, keepdim=True) / root
    scale = scale.clamp(_scale(length - worth, module.eps), _scale(length + worth, module.eps))
    return (rows - centred + unit * scale * root).reshape(x0.shape).to(x0.dtype)


def _scale(length: Tensor, eps: float) -> Tensor:
    """Standard deviation of what is normalised to a length, in units of sqrt(size)."""
    short = length.clamp(0, 1)
    return eps**0.5 * short / (1 - short.square()).sqrt()


def _flat(parameter: Tensor | None, like: Tensor, default: float) -> Tensor:
    if parameter is None:
        return like.new_full(like.shape[-1:], default)
    return parameter.detach().flatten().to(like.dtype)


def _onto_ball(gamma: Tensor, t: Tensor, radius: float) -> Tensor:
    """argmin |gamma u - t|^2 subject to sum u = 0, |u| <= radius; gamma has no 0.

    u = (gamma t - nu) / (gamma^2 + mu), nu by the sum, mu >= 0 by bisection: |u| falls with mu.
    """
    squared, product = gamma.square(), gamma * t

    def point(mu: Tensor) -> Tensor:
        weight = 1 / (squared + mu).clamp(min=_TINY)
        nu = (weight * product).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
        return weight * (product - nu)

    high = product.norm(dim=-1, keepdim=True) / radius
    low = torch.zeros_like(high)
    free = point(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        outside = point(middle).norm(dim=-1, keepdim=True) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return torch.where(free.norm(dim=-1, keepdim=True) <= radius, free, point(high))


_INVERSES: dict[type[nn.Module], Inverse] = {
    **dict.fromkeys(TRIVIAL, _reshape),
    **dict.fromkeys(POOLINGS, unpool),
    nn.ReLU: _relu,
    nn.ReLU6: _relu6,
    nn.LeakyReLU: _leaky_relu,
    nn.GELU: _valley,
    nn.SiLU: _valley,
    nn.Sigmoid: _sigmoid,
    nn.Softmax: _softmax,
    nn.LayerNorm: _layer_norm,
}
