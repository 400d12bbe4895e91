"""How ReLUs count in a linearised module: a unit at rest has no derivative, though it may wake."""

from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fmce_ops.reverse.solver import norms, spread

_REACH = 3  # widths of a kink that a unit may rest below it and be woken
_WEIGHT = 0.3  # of a unit that shall come up, beside an output that shall stay
_ABOVE = 0.02  # how far above the kink, in root mean squares of what goes in


class Rectifier(Protocol):
    """Stands in for every ReLU of a run; z is what goes in, (n * k, ...)."""

    def rectify(self, z: Tensor, number: int) -> Tensor:
        """What comes out of the ReLU of this number in the run."""
        ...


class Relus(Rectifier, Protocol):
    """One that a module is linearised with."""

    def equations(
        self, value: Tensor, entry: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What shall be fulfilled behind a run: values (n, m) or (n, ...), and what they lack.

        Parameters
        ----------
        value, entry, target : (n, ...) output, what went into its last ReLU if it ends in one, and
            where the output shall go.
        """
        ...

    def take(self, rows: Tensor) -> "Relus":
        """The same for some of the samples."""
        ...


@dataclass(frozen=True)
class Smooth:
    """The values of ReLUs with the derivatives of smooth ones, 0 or 1 but near the kink.

    The output goes to the target; before a last ReLU, where units that rest and are not to wake are
    left alone.

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

    def equations(
        self, value: Tensor, entry: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        if entry is None:
            return value, target - value
        z = entry.detach()
        awake = (z > 0) | ((target > 0) & (z > -_REACH * _kinks(z, self.width)))
        awake = awake.to(z.dtype)
        return entry * awake, (target.clamp(min=0) - z) * awake

    def take(self, rows: Tensor) -> "Smooth":
        return Smooth(self.width[rows])


@dataclass(frozen=True)
class Wanted:
    """ReLUs as they are; a backward pass of the loss finds which units at rest should wake.

    Attributes
    ----------
    width : (n,) how far below the kink, in units of the root mean square of what goes in.
    wants : (n * k, ...) of each ReLU of the run: by how much the loss would fall, to first order,
        if the unit grew by that root mean square; 0 of units that are awake, far or not wanted.
    """

    width: Tensor
    wants: list[Tensor] = field(default_factory=list)

    def rectify(self, z: Tensor, number: int) -> Tensor:
        y, known = F.relu(z), z.detach()
        want = torch.zeros_like(known)
        self.wants.append(want)
        if y.requires_grad and not len(z) % len(self.width):
            unit = _kinks(known, torch.ones_like(self.width))
            near = (known <= 0) & (known > -_kinks(known, self.width))
            y.register_hook(partial(_want, want, near * unit))
        return y

    def masks(self, share: Tensor) -> list[Tensor]:
        """The units that are wanted more than ``share``, (n,), of the sample's most wanted one."""
        most = torch.zeros_like(share)
        for want in self.wants:
            if not len(want) % len(share):
                most = most.maximum(want.reshape(len(share), -1).amax(1))
        return [
            want > spread((share * most).repeat_interleave(len(want) // len(share)), want)
            if not len(want) % len(share)
            else want > 0
            for want in self.wants
        ]


def _want(want: Tensor, unit: Tensor, slope: Tensor) -> None:
    want += unit * (-slope).clamp(min=0)


@dataclass(frozen=True)
class Raised:
    """ReLUs as they are; units at rest shall come up to their kinks, and the output stay.

    Attributes
    ----------
    masks : (n * k, ...) of each ReLU of a run: the units, as `Wanted` found them.
    samples : n.
    entries : what goes into each ReLU of the run.
    """

    masks: list[Tensor]
    samples: int
    entries: list[Tensor] = field(default_factory=list)

    def rectify(self, z: Tensor, number: int) -> Tensor:
        if number == 0:
            self.entries.clear()
        self.entries.append(z)
        return F.relu(z)

    def equations(
        self, value: Tensor, entry: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        values, lacks = [value.flatten(1)], [torch.zeros_like(value).flatten(1)]
        scale = _WEIGHT * norms(value) / value[:1].numel() ** 0.5
        for z, mask in zip(self.entries, self.masks, strict=True):
            if mask.any():
                unit = _kinks(z.detach(), torch.ones_like(scale))
                weight = mask * spread(scale.repeat_interleave(len(z) // len(scale)), z) / unit
                values.append(self._by_sample(z * weight))
                lacks.append(self._by_sample((_ABOVE * unit - z.detach()) * weight))
        return torch.cat(values, 1), torch.cat(lacks, 1)

    def _by_sample(self, z: Tensor) -> Tensor:
        return z.unflatten(0, (self.samples, -1)).flatten(1)

    def take(self, rows: Tensor) -> "Raised":
        return Raised([self._rows(mask, rows) for mask in self.masks], len(rows))

    def _rows(self, mask: Tensor, rows: Tensor) -> Tensor:
        if len(mask) % self.samples:
            return mask
        return mask.unflatten(0, (self.samples, -1))[rows].flatten(0, 1)


def _kinks(z: Tensor, width: Tensor) -> Tensor:
    """(n * k, ...) into a ReLU -> (n * k, 1, ...) the width of its kink."""
    rows = width.repeat_interleave(len(z) // len(width))
    scale = rows * norms(z) / z[:1].numel() ** 0.5
    return spread(scale.clamp(min=torch.finfo(z.dtype).tiny), z)
