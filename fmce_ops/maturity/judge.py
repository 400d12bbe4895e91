"""The judge: from what is read of feature maps to a score of maturity, with an interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fmce_ops.errors import ModelError
from fmce_ops.maturity.descriptors import ALONE, DESCRIPTORS

SIZES = (1, 16, 64, 256)  # counts of images for which intervals are known
DEPTHS = 3  # parts of a network, first to last, for which intervals are known
SHIPPED = Path(__file__).with_name("judge.safetensors")
COVERAGE = 0.9  # the probability with which an interval holds the truth of a new run
FEWEST = 9  # runs that bear such an interval: COVERAGE / (1 - COVERAGE)
READ = 2 * DESCRIPTORS  # numbers that are read of a module: its own, and those of its network
_LIMIT = 5.0  # standard deviations; what lies farther out is none of what the judge has seen


@dataclass(frozen=True)
class Score:
    """The maturity of a module: 0 as at the start of training, 1 as at its convergence.

    Attributes
    ----------
    value : of the judge.
    low, high : the interval that holds nine of ten runs that the judge has never seen.
    """

    value: float
    low: float
    high: float


class Judge(nn.Module):
    """Small networks that vote on the maturity behind the descriptors of a module's maps.

    It knows no channel, no count of channels and no size of map, so that it judges networks that
    it has not seen. A module is read beside the mean of its network's modules; without them it is
    judged alone, with intervals of its own. Half of the members read less, see :meth:`seen`. All
    that it needs is in its ``state_dict``: weights, the mean and standard deviation of what is
    read, and half the width of the intervals.

    Parameters
    ----------
    width : of the two hidden layers.
    members : how many networks vote.
    """

    mean: Tensor
    std: Tensor
    half_widths: Tensor

    def __init__(self, width: int = 64, members: int = 4) -> None:
        super().__init__()
        sides = [READ + 1, width, width, 1]
        shapes = list(pairwise(sides))
        self.weights = nn.ParameterList(torch.randn(members, a, b) * a**-0.5 for a, b in shapes)
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for _, b in shapes)
        self.register_buffer("mean", torch.zeros(READ + 1))
        self.register_buffer("std", torch.ones(READ + 1))
        self.register_buffer("half_widths", torch.ones(2, len(SIZES), DEPTHS))

    def standardised(self, rows: Tensor, depth: Tensor) -> Tensor:
        """What the networks take, 0 for what is not known: (N, READ), (N,) -> (N, READ + 1)."""
        inputs = (torch.cat([rows, depth[:, None]], dim=1) - self.mean) / self.std
        return inputs.clamp(-_LIMIT, _LIMIT).nan_to_num(0.0)

    def seen(self, rows: Tensor) -> Tensor:
        """What each member reads of rows (N, READ): bool (members, N, READ + 1).

        The first half reads all. The others read what carries over to other families: the module
        without its network, and of several maps only what lies between them.
        """
        place = torch.arange(READ + 1, device=rows.device)
        several = rows[:, DESCRIPTORS - 1 : DESCRIPTORS] > 0
        numbers = (place < DESCRIPTORS - 1) & ((place >= ALONE) == several)
        less = numbers | (place == DESCRIPTORS - 1) | (place == READ)  # the count and the depth
        members = len(self.weights[0])
        all_of_it = torch.ones_like(less).expand(members - members // 2, *less.shape)
        return torch.cat([all_of_it, less.expand(members // 2, *less.shape)])

    def votes(self, inputs: Tensor, seen: Tensor, drop: float = 0.0) -> Tensor:
        """Logits of the maturity, (members, N), of standardised inputs (N, READ + 1)."""
        hidden = inputs * seen
        layers = list(zip(self.weights, self.biases, strict=True))
        for weight, bias in layers[:-1]:
            hidden = F.dropout(F.gelu(torch.baddbmm(bias, hidden, weight)), drop, drop > 0)
        return torch.baddbmm(layers[-1][1], hidden, layers[-1][0])[..., 0]

    def forward(self, rows: Tensor, depth: Tensor) -> Tensor:
        """Maturity (N,), 0 to 1.

        Parameters
        ----------
        rows : (N, READ), of :func:`beside` or :func:`alone`.
        depth : (N,), where the module lies: 0 the first of its network, 1 the last.
        """
        votes = self.votes(self.standardised(rows, depth), self.seen(rows))
        return votes.sigmoid().mean(0)

    @torch.no_grad()
    def scores(self, rows: Tensor, depth: Tensor) -> list[Score]:
        """Maturity with its interval for each row; both as in :meth:`forward`."""
        values = self(rows, depth)
        halves = self.half_widths[cells(rows, depth)]
        return [
            Score(value, max(0.0, value - half), min(1.0, value + half))
            for value, half in zip(values.tolist(), halves.tolist(), strict=True)
        ]


def beside(descriptors: Tensor, modules: Tensor | None = None) -> Tensor:
    """What is read of modules of a network: (..., M, DESCRIPTORS) -> (..., M, READ).

    Their own descriptors, and the mean over all ``modules`` of the network; None: these M.
    """
    network = (descriptors if modules is None else modules).mean(-2, keepdim=True)
    return torch.cat([descriptors, network.expand_as(descriptors)], dim=-1)


def alone(descriptors: Tensor) -> Tensor:
    """What is read of a module whose network is not known: (..., DESCRIPTORS) -> (..., READ)."""
    return torch.cat([descriptors, torch.full_like(descriptors, torch.nan)], dim=-1)


def cells(rows: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of ``half_widths`` holds for each row: (N,) whether it is alone, size, depth.

    A count of images between two of SIZES has the wider interval.
    """
    counts = 2 ** rows[:, DESCRIPTORS - 1]
    sizes = torch.tensor(SIZES, device=counts.device)
    size = (counts[:, None] >= sizes - 0.5).sum(1) - 1
    part = (depth * DEPTHS).long().clamp(0, DEPTHS - 1)
    return rows[:, -1].isnan().long(), size.clamp_min(0), part


def depths(modules: int) -> Tensor:
    """Where each of a network's modules lies: (modules,), 0 to 1; a single one is the last."""
    return torch.linspace(0, 1, modules) if modules > 1 else torch.ones(1)


def half_width(errors: Sequence[Tensor], coverage: float = COVERAGE) -> float:
    """Half the width of an interval that holds the truth of a new run with this probability.

    Errors of one run hang together, so a new run is compared with whole runs: each run counts the
    same, whatever its number of errors, and one that is worse than all is added (hierarchical
    conformal prediction; Dunn, Wasserman, Ramdas, arXiv 1809.07441). With fewer than
    ``coverage / (1 - coverage)`` runs nothing is known, and the width is that of the whole scale.

    Parameters
    ----------
    errors : of each run, the absolute errors of a judge that never saw it.

    Returns
    -------
    float
        At most 1.
    """
    values = torch.cat([error.flatten() for error in errors]).double()
    shares = [1 / error.numel() / (len(errors) + 1) for error in errors]
    counts = torch.tensor([error.numel() for error in errors])
    weights = torch.tensor(shares, dtype=torch.float64).repeat_interleave(counts)
    order = values.argsort()
    reached = weights[order].cumsum(0) >= coverage - 1e-9
    if not reached.any():
        return 1.0
    return min(1.0, values[order][reached][0].item())


def load_judge(path: Path = SHIPPED) -> Judge:
    """A judge from its safetensors; without a path, the one that comes with this package.

    Raises
    ------
    ModelError
        The file is missing, damaged or no judge.
    """
    return _loaded(path)


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Judge:
    try:
        state = load_file(path)
        members, _, width = state["weights.0"].shape
        judge = Judge(width, members)
        judge.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path} is no judge of maturity ({reason}): make it again.") from error
    return judge.eval()
