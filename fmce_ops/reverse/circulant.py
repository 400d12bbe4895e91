"""Convolutions of stride 1: conjugate gradients, preconditioned by their periodic twins."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.reverse.products import Linearised
from fmce_ops.reverse.solver import norms, spread

_CONDITION = 1e-6  # least over largest eigenvalue of the twin's Gram matrix that is worth it


@dataclass(frozen=True)
class Twin:
    """The same convolution on a torus, known by its Gram matrix at every frequency.

    A convolution of stride 1 with zeros around it differs from its twin at the edge alone, so the
    twin's inverse, which the Fourier transform gives, leaves the solver little to do.

    Attributes
    ----------
    vectors : (groups, frequencies, c, c), c the lesser number of channels of a group: the
        eigenvectors of A A^H where the output is not larger than the input, else of A^H A.
    adjoint : their inverse, the conjugate transpose.
    values : (groups, frequencies, c, 1) their eigenvalues.
    sides : of the torus.
    wide : whether the output is not larger than the input.
    """

    vectors: Tensor
    adjoint: Tensor
    values: Tensor
    sides: tuple[int, ...]
    wide: bool

    def solve(self, rest: Tensor, shift: Tensor) -> Tensor:
        """(n, channels, ...) -> the same shape, times (Gram matrix + shift (n,))^-1."""
        axes, inside = tuple(range(2, rest.ndim)), rest.shape[2:]
        waves = torch.fft.rfftn(rest, self.sides, axes)
        groups, _, size, _ = self.vectors.shape
        rows = waves.view(len(rest), groups, size, -1).permute(1, 3, 2, 0)
        parts = self.adjoint @ rows.contiguous() / (self.values + shift.to(self.values.dtype))
        waves = (self.vectors @ parts).permute(3, 0, 2, 1).reshape(waves.shape)
        whole = torch.fft.irfftn(waves, self.sides, axes)
        return whole[(..., *(slice(side) for side in inside))]


def twin_of(module: Any, x: Tensor, y: Tensor, damped: bool) -> Twin | None:
    """The twin of a convolution of stride 1 that is far from singular or damped, else None.

    Parameters
    ----------
    x, y : an input and an output of the module, for their shapes.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or set(module.stride) != {1}:
        return None
    if module.padding_mode != "zeros":
        return None
    sides = tuple(
        max(a, b) + d * (k - 1)
        for a, b, d, k in zip(
            x.shape[2:], y.shape[2:], module.dilation, module.kernel_size, strict=True
        )
    )
    # By all values and not by channels: padding makes more outputs than inputs, and then A A^T is
    # singular.
    twin = _twin(module, sides, x.dtype, y[0].numel() <= x[0].numel())
    if twin is None:
        return None
    well = twin.values.amin() > _CONDITION * twin.values.amax()
    return twin if damped or well else None


def forget_twins() -> None:
    """Twins are kept while nothing can change their modules, and no longer."""
    _twin.cache_clear()


@lru_cache(maxsize=4)
def _twin(module: Any, sides: tuple[int, ...], dtype: torch.dtype, wide: bool) -> Twin | None:
    weight = module.weight.detach().to(dtype).unflatten(0, (module.groups, -1))
    waves = _waves(weight, module.dilation, sides)
    gram = (waves @ waves.mH if wide else waves.mH @ waves).conj()
    if not gram.isfinite().all():
        return None  # its squares overflow
    values, vectors = torch.linalg.eigh(gram.flatten(1, -3))
    adjoint = vectors.mH.resolve_conj().contiguous()
    return Twin(vectors.contiguous(), adjoint, values.clamp(min=0)[..., None], sides, wide)


def _waves(weight: Tensor, dilation: tuple[int, ...], sides: tuple[int, ...]) -> Tensor:
    """(groups, o, i, *kernel) -> (groups, *frequencies, o, i)."""
    kernel = weight.shape[3:]
    spaced = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    wide = weight.new_zeros(*weight.shape[:3], *spaced)
    places = [slice(None)] * 3 + [slice(None, None, d) for d in dilation]
    wide[tuple(places)] = weight
    waves = torch.fft.rfftn(wide, sides, tuple(range(3, 3 + len(sides))))
    return waves.movedim((1, 2), (-2, -1)).contiguous()


def preconditioned(
    operator: Linearised,
    twin: Twin,
    goal: Tensor,
    shift: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """Solve (G + shift) y = goal, G = A A^T where the twin is wide, else A^T A.

    Parameters
    ----------
    goal : (n, ...) of the output, or of the input.
    shift : (n,) non-negative.
    tolerance : of the equation's residual against its right side.

    Returns
    -------
    y (n, ...) and the iterations (n,).
    """
    found, left = torch.zeros_like(goal), goal.clone()
    start = norms(goal)
    count = torch.zeros_like(start, dtype=torch.long)
    direction, gamma = torch.zeros_like(goal), torch.ones_like(start)
    for _ in range(max_iterations):
        live = norms(left) > tolerance * start
        if not live.any():
            break
        eased = twin.solve(left, shift)
        previous, gamma = gamma, _products(left, eased)
        ratio = torch.where(count > 0, gamma / previous, 0)
        direction = eased + spread(ratio, direction) * direction
        image = (
            operator.push(operator.pull(direction))
            if twin.wide
            else operator.pull(operator.push(direction))
        )
        image = torch.addcmul(image, spread(shift, direction), direction)
        curvature = _products(direction, image)
        length = torch.where(live & (curvature > 0), gamma / curvature, 0)
        found = torch.addcmul(found, spread(length, found), direction)
        left = torch.addcmul(left, spread(length, left), image, value=-1)
        count += live
    return found, count


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(n,) inner products, summed in float64."""
    return (a * b).flatten(1).sum(1, dtype=torch.float64)
