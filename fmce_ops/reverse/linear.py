"""Linear maps: the least-norm least-squares step, to the precision of the data type."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.reverse.circulant import Twin, preconditioned, twin_of
from fmce_ops.reverse.dense import dense_step
from fmce_ops.reverse.products import Linearised
from fmce_ops.reverse.solver import each, least_squares, norms, spread
from fmce_ops.reverse.wide import widened

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
_ROUNDS = 4
_ITERATIONS = 300  # of the solver in one round
_PATIENCE = 8000  # iterations in float64 for the samples that this does not finish


def is_plain(module: nn.Module) -> bool:
    """Whether nothing but the module's own forward makes its output."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and "forward" not in vars(module)


def is_linear(module: nn.Module) -> bool:
    """Whether the module, in eval mode, is known to be linear up to a constant."""
    known = type(module) in _LINEAR
    inside = type(module) is nn.Sequential and all(is_linear(child) for child in module)
    return (known or inside) and is_plain(module)


@dataclass
class Step:
    """Where the solver of a linear map stands.

    Attributes
    ----------
    step : (n, ...) in float64.
    iterations : (n,).
    finished : (n,) whether the step is the answer to the precision that was asked for.
    """

    step: Tensor
    iterations: Tensor
    finished: Tensor


@dataclass(frozen=True)
class _System:
    """argmin |A d - rest|^2 + damping^2 |d|^2 for n samples: A in its own type and in float64."""

    cheap: Linearised
    exact: Linearised
    rest: Tensor
    damping: Tensor
    precision: float

    def left(self, step: Tensor) -> Tensor:
        return self.rest - self.exact.push(step.to(self.exact.dtype))

    def merit(self, rest: Tensor, step: Tensor) -> Tensor:
        return (norms(rest).square() + (self.damping * norms(step)).square()).sqrt()


def linear_step(
    module: nn.Module, x0: Tensor, target: Tensor, damping: Tensor, precision: float
) -> Step:
    """argmin |f(x0 + d) - target|^2 + damping^2 |d|^2 of least norm, f linear up to its bias.

    What is missing at x0 is taken in float64: the rounding of an output, however small, comes back
    as large as the map is badly conditioned. Batch norm is divided channel by channel, a map of up
    to about a thousand inputs and outputs is factored, everything else is solved by products and
    refined with residuals in float64.

    Parameters
    ----------
    x0, target : (n, ...) and (n, ...).
    damping : (n,).
    precision : relative error of d that is good enough.
    """
    difference = target.double() - widened(module)(x0.double())
    none = torch.zeros_like(damping, dtype=torch.long)
    if type(module) in _NORMS:
        return Step(_divided(module, difference, damping), none, ~none.bool())
    known = dense_step(module, x0, difference, damping)
    if known is not None:
        return Step(known, none, ~none.bool())
    return _refined(module, x0, difference, damping, precision)


def _divided(norm: Any, difference: Tensor, damping: Tensor) -> Tensor:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    weak = scale.abs() <= torch.finfo(difference.dtype).eps * scale.abs().amax()
    scale = scale.masked_fill(weak, 0).view(1, -1, *[1] * (difference.ndim - 2))
    inverse = scale / (scale.square() + spread(damping, difference).square())
    return difference * torch.where(scale == 0, 0, inverse)


def _refined(
    module: nn.Module, x0: Tensor, difference: Tensor, damping: Tensor, precision: float
) -> Step:
    """First the fast way in the input's own type; what that does not finish, in float64."""
    none = torch.zeros_like(damping, dtype=torch.long)
    found = Step(torch.zeros_like(x0, dtype=torch.float64), none, none.bool())
    cheap = Linearised(module, x0)
    twin = twin_of(module, x0, difference, bool((damping > 0).all()))
    if twin:
        system = _System(cheap, cheap, difference, damping, precision)
        _by_twin(system, twin, found)
    elif x0.dtype != torch.float64:
        exact = Linearised(widened(module), x0.double())
        _by_products(_System(cheap, exact, difference, damping, precision), found, _ITERATIONS)
    rows = (~found.finished).nonzero()[:, 0]
    if len(rows):
        exact = Linearised(widened(module), x0[rows].double())
        system = _System(exact, exact, difference[rows], damping[rows], precision)
        part = _better_than_nothing(system, found, rows)
        coarse = precision > 1e-5  # a start for the search, which is not worth thousands
        _by_products(system, part, _ITERATIONS if coarse else _PATIENCE)
        for name, column in vars(found).items():
            column[rows] = getattr(part, name)
    return found


def _better_than_nothing(system: _System, found: Step, rows: Tensor) -> Step:
    """The samples in ``rows``, from 0 again where the fast way has led astray."""
    part = Step(*(column[rows] for column in vars(found).values()))
    merit = system.merit(system.left(part.step), part.step)
    astray = ~(merit < norms(system.rest))  # NaN too
    part.step[astray] = 0
    return part


def _by_twin(system: _System, twin: Twin, found: Step) -> None:
    """Finished when the next correction, were it made, would be below the precision."""
    tolerance = max(system.precision, torch.finfo(system.cheap.dtype).eps ** 0.5)
    shift, dual = system.damping.square(), torch.zeros_like(system.rest)
    live, last = ~found.finished, torch.full_like(shift, torch.inf)
    for _ in range(_ROUNDS):
        rest = system.left(found.step) * spread(live, system.rest)
        if twin.wide:
            rest = rest - spread(shift * live, rest) * dual
            more, spent = _eased(system.cheap, twin, rest, shift, tolerance)
            dual, correction = dual + more, system.exact.pull(more.to(system.exact.dtype)).double()
        else:
            gradient = system.exact.pull(rest.to(system.exact.dtype)).double()
            gradient = gradient - spread(shift * live, gradient) * found.step
            correction, spent = _eased(system.cheap, twin, gradient, shift, tolerance)
        found.step += correction
        found.iterations += spent
        size = norms(correction)
        solved = live & (spent < _ITERATIONS)
        found.finished |= solved & (tolerance * size <= system.precision * norms(found.step))
        live = solved & ~found.finished & (size < last / 2)
        last = size
        if not live.any():
            break


def _eased(
    cheap: Linearised, twin: Twin, goal: Tensor, shift: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    scale = norms(goal).clamp(min=torch.finfo(torch.float64).tiny)
    unit = (goal / spread(scale, goal)).to(cheap.dtype)
    found, spent = preconditioned(cheap, twin, unit, shift, tolerance, _ITERATIONS)
    return found * spread(scale, goal), spent


def _by_products(system: _System, found: Step, patience: int) -> None:
    """CGLS from ``found``, a step in the range of A^T: so is the sum, and the least norm stays.

    Finished when nothing is missing to the precision, or when what is missing is normal to the
    range of A (Paige and Saunders 1982, the second test of LSQR).

    Parameters
    ----------
    patience : iterations of a sample in all rounds.
    """
    least = torch.finfo(system.cheap.dtype).eps ** 0.5
    normal = max(system.precision * 1e-3, 1e-12)
    size, steepest = norms(system.rest), norms(system.exact.pull(system.rest))
    spent = torch.zeros_like(found.iterations)
    live, known, best = ~found.finished, found.step, torch.full_like(size, torch.inf)
    for _ in range(_ROUNDS + 1):
        rest = system.left(found.step)
        merit = system.merit(rest, found.step)
        worse = live & ~(merit <= best * (1 + 1e-9))  # rounding has the last word
        found.step = known.where(each(worse, known), found.step)
        gradient = system.exact.pull(rest)
        gradient = gradient - spread(system.damping.square(), gradient) * found.step
        goal = normal * steepest * merit / size
        slope = norms(gradient)
        found.finished |= live & ~worse & ((merit <= system.precision * size) | (slope <= goal))
        live = live & ~worse & ~found.finished & (spent < patience)
        if not live.any():
            return
        tolerance = (goal / slope).clamp(min=least, max=0.5)
        known, best = found.step, merit
        gradient = gradient * spread(live, gradient)
        correction, count = _scaled(system, gradient, merit, tolerance, patience - spent)
        found.step = found.step + correction
        found.iterations += count
        spent += count


def _scaled(
    system: _System, gradient: Tensor, length: Tensor, tolerance: Tensor, most: Tensor
) -> tuple[Tensor, Tensor]:
    """A gradient of length 1 keeps float32 away from its limits."""
    scale = norms(gradient).clamp(min=torch.finfo(torch.float64).tiny)
    unit = (gradient / spread(scale, gradient)).to(system.cheap.dtype)
    found = least_squares(system.cheap, unit, length / scale, system.damping, tolerance, most)
    return found.step * spread(scale, gradient), found.iterations
