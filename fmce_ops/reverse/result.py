"""What a reverse step answers."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Status(IntEnum):
    """How the reverse step of one sample ended."""

    UNCHANGED = 0
    """The module's output is the target already: x0 is the answer and nothing was solved."""
    REACHED = 1
    """The residual is within the tolerance."""
    NEAREST = 2
    """No input near x is known to bring the output nearer to the target."""
    DAMPED = 3
    """The answer broke a bound; this one is held near x0 by damping, or ends at the bound."""
    KEPT = 4
    """Nothing better than x0 was found within the bounds, so that is returned."""
    UNFINISHED = 5
    """The iterations ran out while the output was still coming nearer, or before it was."""


@dataclass(frozen=True)
class Reversal:
    """The input that a module should have had, with what is known about it.

    Attributes
    ----------
    x : (N, ...) the input; finite always.
    residual : (N,) |f(x) - t| / |f(x0) - t|, at most 1; 0 where nothing was to do.
    change : (N,) |x - x0| / |x0|; |x - x0| where x0 is 0.
    iterations : (N,) of the least-squares solver and L-BFGS; 0 where a closed form answered.
    status : (N,) values of `Status`.
    """

    x: Tensor
    residual: Tensor
    change: Tensor
    iterations: Tensor
    status: Tensor


@dataclass(frozen=True)
class Propagation:
    """Targets at every boundary of a network.

    Attributes
    ----------
    targets : n + 1 tensors; targets[i] is the target of module i's input, targets[n] the logits'.
    results : n results, one for each module.
    """

    targets: tuple[Tensor, ...]
    results: tuple[Reversal, ...]
