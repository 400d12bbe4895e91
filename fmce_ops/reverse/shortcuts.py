"""Answers without a search: linear maps and closed forms; and Sequentials, part by part."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmce_ops.reverse.checks import check_kind
from fmce_ops.reverse.inverses import inverse_of
from fmce_ops.reverse.linear import TRIVIAL, is_linear, is_plain, linear_step


@dataclass(frozen=True)
class Known:
    """An answer.

    Attributes
    ----------
    x : (n, ...).
    iterations : (n,) of the solver.
    finished : (n,) whether they were enough.
    """

    x: Tensor
    iterations: Tensor
    finished: Tensor

    def take(self, rows: Tensor) -> "Known":
        return Known(self.x[rows], self.iterations[rows], self.finished[rows])


# (link, target, its input, (n,) whether the sample is wanted) -> an answer
LinkSearch = Callable[[nn.Module, Tensor, Tensor, Tensor], Known]


def shortcut(module: nn.Module, target: Tensor, x0: Tensor, damping: Tensor) -> Known | None:
    """The answer that is known without a search, or None.

    Linear maps are answered to the precision of the data type, with damping too; closed forms know
    no damping. A Sequential of one part that does anything is that part.
    """
    if is_linear(module):
        return _linear(module, target, x0, damping, _precision(x0))
    links = list(_links(module))
    inverse = inverse_of(links[0]) if len(links) == 1 else None
    if inverse is None or damping.any():
        return None
    none = torch.zeros_like(damping, dtype=torch.long)
    return Known(inverse(links[0], target, x0), none, ~none.bool())


def chain(
    module: nn.Module, target: Tensor, x0: Tensor, tolerance: float, search: LinkSearch | None
) -> Known | None:
    """A Sequential backwards, from its last link to its first, or None where a link has no answer.

    It gets past dead units, far targets and what the links hide from one another, but takes the
    change of every link instead of the smallest of the whole, and may fall short of the target.

    Parameters
    ----------
    search : answers the links that have neither a closed form nor a direct solve.

    Raises
    ------
    ReverseError
        A link by itself cannot be reversed, though the whole can: it does not map one tensor to
        one.
    """
    links = list(_links(module))
    known = all(is_linear(link) or inverse_of(link) for link in links)
    if len(links) < 2 or not (known or search):
        return None
    inputs = [x0]
    for link in links[:-1]:
        inputs.append(link(inputs[-1].clone()))
        check_kind(link, x0, inputs[-1])
    none = x0.new_zeros(len(x0), dtype=torch.float64)
    count, finished = none.long(), ~none.bool()
    for link, own in zip(reversed(links), reversed(inputs), strict=True):
        inverse = inverse_of(link)
        if inverse:
            target = inverse(link, target, own)
            continue
        if search and not is_linear(link):
            answer = search(link, target, own, finished)
        else:
            answer = _linear(link, target, own, none, tolerance / 10)
        target, count, finished = answer.x, count + answer.iterations, finished & answer.finished
    return Known(target, count, finished)


def _precision(x0: Tensor) -> float:
    return 8 * torch.finfo(x0.dtype).eps ** (1.0 if x0.dtype == torch.float32 else 0.8)


def _linear(
    module: nn.Module, target: Tensor, x0: Tensor, damping: Tensor, precision: float
) -> Known:
    found = linear_step(module, x0, target, damping, precision)
    return Known((x0 + found.step).to(x0.dtype), found.iterations, found.finished)


def _links(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of nested Sequentials, neighbouring linear ones as one map."""
    run: list[nn.Module] = []
    for part in _parts(module):
        if is_linear(part):
            run += [part] if type(part) not in TRIVIAL or type(part) is nn.Flatten else []
            continue
        if run:
            yield nn.Sequential(*run) if len(run) > 1 else run[0]
            run = []
        yield part
    if run:
        yield nn.Sequential(*run) if len(run) > 1 else run[0]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential and is_plain(module):
        for child in module:
            yield from _parts(child)
    else:
        yield module
