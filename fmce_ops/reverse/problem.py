"""What a search for the input is asked, and where it stands."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fmce_ops.reverse.solver import norms


@dataclass(frozen=True)
class Problem:
    """Bring module(x) to ``target`` from ``x0``, n samples.

    Attributes
    ----------
    damping, goal, bound : (n,); |x - x0| stays within the last.
    products : whether the Jacobian's products are to be had from both sides, or J^T u alone.
    """

    module: nn.Module
    target: Tensor
    x0: Tensor
    damping: Tensor
    goal: Tensor
    bound: Tensor
    products: bool = True

    def take(self, rows: Tensor) -> "Problem":
        columns = "target", "x0", "damping", "goal", "bound"
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def merit(self, rest: Tensor, x: Tensor) -> Tensor:
        """(n,) what Gauss-Newton lowers: what is missing to the target, and the damped change."""
        return (norms(rest).square() + (self.damping * norms(x - self.x0)).square()).sqrt()

    def cost(self, search: "Search") -> Tensor:
        """(n,) what the answer shall make small."""
        change = self.damping * norms(search.x - self.x0)
        return search.distance.square() + change.square()


@dataclass
class Search:
    """Where the search stands.

    Attributes
    ----------
    x : (n, ...) the best inputs so far.
    distance : (n,) |module(x) - target|.
    iterations : (n,) of the least-squares solver and L-BFGS.
    stationary : (n,) whether the linearised module knows no better input near x.
    """

    x: Tensor
    distance: Tensor
    iterations: Tensor
    stationary: Tensor

    def take(self, rows: Tensor) -> "Search":
        return Search(*(column[rows] for column in vars(self).values()))

    def put(self, rows: Tensor, part: "Search") -> None:
        for name, column in vars(self).items():
            column[rows] = getattr(part, name)
