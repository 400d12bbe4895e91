"""The judge: from what is read of feature maps to a score of maturity, with an interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fmce_ops.errors import ModelError
from fmce_ops.maturity.descriptors import CHANNELS, COUNT, DESCRIPTORS, EACH, VIEWED

SIZES = (1, 16, 64, 256)  # counts of images for which intervals are known
FEW = SIZES[1]  # fewer images are read through their views
DEPTHS = 3  # where intervals are known: in the first half of a network, the second, at its end
SHIPPED = Path(__file__).with_name("judge.safetensors")
COVERAGE = 0.9  # the probability with which an interval holds the truth of a new run
FEWEST = 9  # runs that bear such an interval: COVERAGE / (1 - COVERAGE)
READ = 3 * DESCRIPTORS  # numbers that are read of a module, see :func:`reading`
ONE, VIEWS_OF_ONE, SEVERAL = range(3)  # what is read: a map, the views of images, many images
_KINDS = 3
_LIMIT = 5.0  # standard deviations; what lies farther out is none of what the judge has seen
_SUREST = 1e-3  # how near to 0 and to 1 a vote is taken to be at most
_FLOOR = 0.02  # of doubt, however much the votes agree


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


class Members(nn.Module):
    """Small networks that read the same numbers, ``columns`` of :func:`reading` and the depth."""

    columns: Tensor

    def __init__(self, columns: Tensor, width: int, members: int) -> None:
        super().__init__()
        shapes = list(pairwise([len(columns), width, width, 1]))
        self.weights = nn.ParameterList(torch.randn(members, a, b) * a**-0.5 for a, b in shapes)
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for _, b in shapes)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, usual: Tensor, keep: Tensor | float = 1.0) -> Tensor:
        """Maturity (members, N) that each sees in standardised inputs without what is unusual.

        ``keep`` is what hidden units are multiplied with.
        """
        hidden = usual[:, self.columns].expand(len(self.biases[0]), -1, -1)
        layers = list(zip(self.weights, self.biases, strict=True))
        for matrix, bias in layers[:-1]:
            hidden = F.gelu(torch.baddbmm(bias, hidden, matrix)) * keep
        return torch.baddbmm(layers[-1][1], hidden, layers[-1][0])[..., 0].sigmoid()


class Electorate(nn.Module):
    """All who vote on rows of one kind, and what is usual there."""

    mean: Tensor
    std: Tensor

    def __init__(self, kind: int, width: int, members: int) -> None:
        super().__init__()
        self.patterns = nn.ModuleList(Members(c, width, members) for c in _columns(kind))
        self.register_buffer("mean", torch.zeros(READ + 1))
        self.register_buffer("std", torch.ones(READ + 1))

    def standardised(self, rows: Tensor, depth: Tensor) -> Tensor:
        """Rows and depth, NaN for what is not known: (N, READ), (N,) -> (N, READ + 1)."""
        return (torch.cat([rows, depth[:, None]], dim=1) - self.mean) / self.std

    def votes(self, inputs: Tensor, keep: Tensor | float = 1.0) -> Tensor:
        """Votes (patterns, members, N) on standardised inputs; ``keep`` as in ``Members``."""
        usual = inputs.clamp(-_LIMIT, _LIMIT).nan_to_num(0.0)
        return torch.stack([members(usual, keep) for members in self._patterns()])

    def able(self, inputs: Tensor) -> Tensor:
        """Whether all that a pattern reads is known (patterns, N); else its members abstain."""
        return torch.stack([~inputs[:, m.columns].isnan().any(1) for m in self._patterns()])

    def forward(self, rows: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """Maturity and doubt, both (N,), as in ``Judge``."""
        inputs = self.standardised(rows, depth)
        votes = self.votes(inputs)
        taken = self.able(inputs)[:, None].expand_as(votes)

        def mean(values: Tensor) -> Tensor:
            return (values * taken).sum((0, 1)) / taken.sum((0, 1))

        spread = mean((votes - mean(votes)).square()).sqrt()
        return mean(votes.logit(_SUREST)).sigmoid(), _FLOOR + spread

    def _patterns(self) -> list[Members]:
        return cast(list[Members], list(self.patterns))


class Judge(nn.Module):
    """Small networks that vote on the maturity behind the descriptors of a module's maps.

    It knows no channel and no size of map, so that it judges networks that it has not seen. A
    single map, the views of an image and many images have members of their own. All are told how
    many channels and images there are and where the module lies. They read, in turn: the module and
    the mean of its network's modules; the module and its change since the network's random start;
    the same, of what lies between maps alone; and that without the start. With its network in sight
    a module of a known one is judged best, while what lies between maps carries over to those that
    are not known. The score is the mean of all log odds (logarithmic opinion pool; Genest, Zidek
    1986), in which small differences near 0 and 1 still tell checkpoints apart. Where members
    disagree the judge is in doubt, and the interval is wide. All that it needs is in its
    ``state_dict``: weights, mean and standard deviation of what is read, and the margins of the
    intervals, in doubts.

    Parameters
    ----------
    width : of the two hidden layers.
    members : how many networks of each pattern vote.
    """

    margins: Tensor

    def __init__(self, width: int = 64, members: int = 2) -> None:
        super().__init__()
        self.width, self.members = width, members
        self.kinds = nn.ModuleList(Electorate(kind, width, members) for kind in range(_KINDS))
        self.register_buffer("margins", torch.full((2, len(SIZES) + 1, DEPTHS), torch.inf))

    def forward(self, rows: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """Maturity, 0 to 1, and doubt: the standard deviation of the votes and a little more.

        Parameters
        ----------
        rows : (N, READ), of :func:`reading`.
        depth : (N,), where the module lies: 0 the first of its network, 1 the last.

        Returns
        -------
        (N,) and (N,)
        """
        found, of = rows.new_zeros(2, len(rows)), kinds(rows)
        for kind in of.unique().tolist():
            chosen = of == kind
            found[:, chosen] = torch.stack(self.electorate(kind)(rows[chosen], depth[chosen]))
        return found[0], found[1]

    def electorate(self, kind: int) -> Electorate:
        """Those who vote on rows of a kind."""
        return cast(Electorate, self.kinds[kind])

    @torch.no_grad()
    def scores(self, rows: Tensor, depth: Tensor) -> list[Score]:
        """Maturity with its interval for each row; both as in :meth:`forward`."""
        values, doubts = self(rows, depth)
        halves = self.margins[cells(rows, depth)] * doubts
        return [
            Score(value, max(0.0, value - half), min(1.0, value + half))
            for value, half in zip(values.tolist(), halves.tolist(), strict=True)
        ]


def _columns(kind: int) -> list[Tensor]:
    """What members of each pattern read of rows of a kind."""
    all_ = list(range(EACH if kind == ONE else CHANNELS))
    between = list(range(EACH) if kind == ONE else range(EACH, CHANNELS))

    def columns(own: list[int], start: list[int], network: list[int]) -> Tensor:
        start = [DESCRIPTORS + place for place in start]
        network = [2 * DESCRIPTORS + place for place in network]
        told = CHANNELS, COUNT, READ  # the last is the depth
        return torch.tensor([*own, *told, *start, *network])

    return [
        columns(all_, [], all_),
        columns(all_, all_, []),
        columns(between, between, []),
        columns(between, [], []),
    ]


def reading(
    descriptors: Tensor, *, start: Tensor | None = None, network: Tensor | None = None
) -> Tensor:
    """What is read of modules: their descriptors, the change since their start, their network.

    Parameters
    ----------
    descriptors : (..., M, DESCRIPTORS)
    start : the same of the same modules with random weights; None: not known.
    network : (..., m, DESCRIPTORS) of all modules of the network, of which the mean is read; None:
        not known.

    Returns
    -------
    (..., M, READ)
        NaN where something is not known.
    """
    unknown = torch.full_like(descriptors, torch.nan)
    change = unknown if start is None else descriptors - start
    mean = unknown if network is None else network.mean(-2, keepdim=True).expand_as(descriptors)
    return torch.cat([descriptors, change, mean], dim=-1)


def kinds(rows: Tensor) -> Tensor:
    """Of which kind each row is (N,): ONE, VIEWS_OF_ONE or SEVERAL.

    Fewer than FEW maps without views tell no more than each by itself.
    """
    several = 2 ** rows[:, COUNT] > FEW - 0.5
    return torch.where(rows[:, VIEWED] > 0, VIEWS_OF_ONE, several * SEVERAL)


def cells(rows: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of ``margins`` holds for each row (N,): whether it is alone, the size, the depth.

    Alone is a module without its network or its start. The sizes are a map, the views of one image,
    and SIZES from FEW on; a count of images between two of them has the wider interval. The depths
    are the first half of the network, the second, and its last module.
    """
    counts = 2 ** rows[:, COUNT]
    several = torch.tensor(SIZES[1:], device=counts.device)
    size = 1 + (counts[:, None] >= several - 0.5).sum(1)
    size = torch.where(kinds(rows) == SEVERAL, size, kinds(rows))
    part = (depth * (DEPTHS - 1)).long()
    return rows.isnan().any(1).long(), size, part


def depths(modules: int) -> Tensor:
    """Where each of a network's modules lies: (modules,), 0 to 1; a single one is the last."""
    return torch.linspace(0, 1, modules) if modules > 1 else torch.ones(1)


def margin(errors: Sequence[Tensor], coverage: float = COVERAGE) -> float:
    """How far an interval reaches to either side to hold a new run with this probability.

    Errors of one run hang together, so a new run is compared with whole runs: each run counts the
    same, whatever its number of errors, and one that is worse than all is added (hierarchical
    conformal prediction; Dunn, Wasserman, Ramdas, arXiv 1809.07441). With fewer than
    ``coverage / (1 - coverage)`` runs nothing is known, and the margin is infinite.

    Parameters
    ----------
    errors : of each run, the absolute errors of a judge that never saw it, in any unit.
    """
    values = torch.cat([error.flatten() for error in errors]).double()
    shares = [1 / error.numel() / (len(errors) + 1) for error in errors]
    counts = torch.tensor([error.numel() for error in errors])
    weights = torch.tensor(shares, dtype=torch.float64).repeat_interleave(counts)
    order = values.argsort()
    reached = weights[order].cumsum(0) >= coverage - 1e-9
    if not reached.any():
        return torch.inf
    return values[order][reached][0].item()


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
        members, _, width = state["kinds.0.patterns.0.weights.0"].shape
        with torch.random.fork_rng(devices=[]):  # its first weights are none of the user's
            judge = Judge(width, members)
        judge.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path} is no judge of maturity ({reason}): make it again.") from error
    return judge.eval()
