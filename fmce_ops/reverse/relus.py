"""How ReLUs count in a linearised module: a unit at rest has no derivative, though it may wake."""

from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fmce_ops.reverse.solver import norms, spread

_REACH = 3  # widths of a kink that a unit may rest below it and be woken


class Rectifier(Protocol):
    """Stands in for every ReLU of a run; z is what goes in, (n * k, ...)."""

    def rectify(self, z: Tensor, number: int) -> Tensor:
        """What comes out of the ReLU of this number in the run."""
        ...


class Relus(Rectifier, Protocol):
    """One that a module is linearised with."""

    def awake(self, z: Tensor, target: Tensor) -> Tensor:
        """(n, ...) which units of a last ReLU shall move; the others are left at rest."""
        ...

    def take(self, rows: Tensor) -> "Relus":
        """The same for some of the samples."""
        ...


@dataclass(frozen=True)
class Smooth:
    """The values of ReLUs with the derivatives of smooth ones, 0 or 1 but near the kink.

    Attributes
    ----------
    width : (n,) of the kink, in units of the root mean square of what goes in.
    """

    width: Tensor

    def rectify(self, z: Tensor, number: int) -> Tensor:
        if len(z) % len(self.width):
            return F.relu(z)
        slope = torch.sigmoid(z.detach() / _kinks(z.detach(), self.width))
        return F.relu(z.detach()) + (z - z.detach()) * slope

    def awake(self, z: Tensor, target: Tensor) -> Tensor:
        return (z > 0) | ((target > 0) & (z > -_REACH * _kinks(z, self.width)))

    def take(self, rows: Tensor) -> "Smooth":
        return Smooth(self.width[rows])


@dataclass(frozen=True)
class Wanted:
    """ReLUs as they are; a backward pass of the loss finds which units at rest should wake.

    Attributes
    ----------
    width : (n,) how far below the kink, in units of the root mean square of what goes in.
    masks : (n * k, ...) of each ReLU of the run: the units that are awake, or near and wanted.
    """

    width: Tensor
    masks: list[Tensor] = field(default_factory=list)

    def rectify(self, z: Tensor, number: int) -> Tensor:
        y, known = F.relu(z), z.detach()
        mask = known > 0
        self.masks.append(mask)
        if y.requires_grad and not len(z) % len(self.width):
            near = known > -_kinks(known, self.width)
            y.register_hook(partial(_want, mask, near))
        return y


def _want(mask: Tensor, near: Tensor, slope: Tensor) -> None:
    mask |= near & (slope < 0)


@dataclass(frozen=True)
class Awake:
    """Each unit passes on what goes in, below 0 too, if it is awake, and else 0.

    Attributes
    ----------
    masks : (n * k, ...) of each ReLU of a run, as `Wanted` found them.
    samples : n.
    """

    masks: list[Tensor]
    samples: int

    def rectify(self, z: Tensor, number: int) -> Tensor:
        mask = self.masks[number] if number < len(self.masks) else z[:0]
        return torch.where(mask, z, 0) if mask.shape == z.shape else F.relu(z)

    def awake(self, z: Tensor, target: Tensor) -> Tensor:
        return self.masks[-1] if self.masks[-1].shape == z.shape else z > 0

    def take(self, rows: Tensor) -> "Awake":
        return Awake([self._rows(mask, rows) for mask in self.masks], len(rows))

    def _rows(self, mask: Tensor, rows: Tensor) -> Tensor:
        if len(mask) % self.samples:
            return mask
        return mask.unflatten(0, (self.samples, -1))[rows].flatten(0, 1)


def _kinks(z: Tensor, width: Tensor) -> Tensor:
    """(n * k, ...) into a ReLU -> (n * k, 1, ...) the width of its kink."""
    rows = width.repeat_interleave(len(z) // len(width))
    scale = rows * norms(z) / z[:1].numel() ** 0.5
    return spread(scale.clamp(min=torch.finfo(z.dtype).tiny), z)
