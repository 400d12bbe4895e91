"""Where the gates of a network belong: its convolutions, what normalises and what feeds them."""

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from fmce_ops.errors import ModelError

_SHORTCUT = "downsample"  # torchvision's name for the convolution beside a residual block
# What lies between two convolutions and keeps a channel of zeros a channel of zeros.
_KEEPS_ZERO = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.Dropout, nn.Identity),
)
_KEEPS_ZERO_CALLS = (F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, F.dropout)


@dataclass(frozen=True)
class Site:
    """A convolution that gets gates.

    Attributes
    ----------
    name : of the convolution.
    place : how many sites run before it.
    norm : of the batch norm that alone reads it, or None.
    fed_by : of the gated convolution whose gated output is all that this one reads and that
        nothing else reads, or None; the filters closed there need no input here.
    """

    name: str
    place: int
    norm: str | None
    fed_by: str | None


def find_sites(network: nn.Module, names: Sequence[str] | None = None) -> list[Site]:
    """The convolutions in the order in which they run, once each, without those on a shortcut.

    One whose weights are made of others (`torch.nn.utils.parametrize`), or that is called with
    keywords, gets no gates.

    Parameters
    ----------
    names : of the convolutions to take instead.

    Raises
    ------
    ModelError
        The network cannot be traced, has no such convolution or none at all, or runs it twice.
    """
    graph = _traced(network)
    shared = _shared(network, graph)
    found: dict[fx.Node, Site] = {}
    for node in graph.nodes:
        if not _wanted(network, node, names) or node.target in shared:
            continue
        norm = _norm(network, node)
        norm = None if norm in shared else norm
        site = Site(str(node.target), len(found), norm, _feeder(network, node, found))
        found[_end(node, site)] = site
    _refuse_missing(network, [site.name for site in found.values()], shared, names)
    return list(found.values())


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode; afterwards each of its modules is in its own."""
    modes = [(part, part.training) for part in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _traced(network: nn.Module) -> fx.Graph:
    try:
        with evaluating(network):
            return fx.Tracer().trace(network)
    except Exception as error:  # tracing runs the user's code on stand-ins: anything may happen
        raise ModelError(
            f"a {type(network).__name__} cannot be traced ({' '.join(str(error).split())}): "
            "give a network whose forward does not depend on the values of its input."
        ) from error


def _shared(network: nn.Module, graph: fx.Graph) -> set[str]:
    """Modules that run more than once, or go by several names: no other can take their place."""
    runs = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    names = Counter(id(part) for _, part in network.named_modules(remove_duplicate=False))
    return {
        name
        for name, count in runs.items()
        if count > 1 or names[id(network.get_submodule(name))] > 1
    }


def _module(network: nn.Module, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _wanted(network: nn.Module, node: fx.Node, names: Sequence[str] | None) -> bool:
    module = _module(network, node)
    if not isinstance(module, nn.Conv2d) or node.kwargs or is_parametrized(module):
        return False
    name = str(node.target)
    return name in names if names is not None else _SHORTCUT not in name.split(".")


def _norm(network: nn.Module, node: fx.Node) -> str | None:
    users = list(node.users)
    alone = len(users) == 1 and isinstance(_module(network, users[0]), nn.BatchNorm2d)
    return str(users[0].target) if alone else None


def _end(node: fx.Node, site: Site) -> fx.Node:
    """Where the gated output is read."""
    return next(iter(node.users)) if site.norm else node


def _feeder(network: nn.Module, node: fx.Node, found: dict[fx.Node, Site]) -> str | None:
    module = _module(network, node)
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return None  # each filter reads channels of its own
    before = node.all_input_nodes[0]
    while before not in found and _keeps_zero(network, before) and len(before.users) == 1:
        before = before.all_input_nodes[0]
    alone = before in found and len(before.users) == 1
    return found[before].name if alone else None


def _keeps_zero(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _KEEPS_ZERO_CALLS
    return isinstance(_module(network, node), _KEEPS_ZERO)


def _refuse_missing(
    network: nn.Module, found: list[str], shared: set[str], names: Sequence[str] | None
) -> None:
    if names is not None and not names:
        raise ModelError("no convolution is named: name some, or give None for all of them.")
    if not found and names is None:
        raise ModelError(
            f"a {type(network).__name__} has no convolution that could get gates: "
            "give a convolutional network."
        )
    for name in names or ():
        if name in shared:
            raise ModelError(
                f"the convolution {name!r} is used more than once, and gates are for one use: "
                "name others."
            )
        if name not in found:
            known = [site.name for site in find_sites(network)]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0) or known[:3]
            raise ModelError(
                f"there is no convolution {name!r} that runs: perhaps {' or '.join(near)}."
            )
