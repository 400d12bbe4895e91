"""The reverse step of a module, and of a network module by module."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fmce_ops.errors import ReverseError
from fmce_ops.reverse.checks import (
    check_apart,
    check_module,
    check_settings,
    check_tensors,
    first_line,
    made,
)
from fmce_ops.reverse.circulant import forget_twins
from fmce_ops.reverse.dense import forget_factors
from fmce_ops.reverse.descent import FIRST, descend, start_anew
from fmce_ops.reverse.linear import is_linear
from fmce_ops.reverse.pooling import POOLINGS
from fmce_ops.reverse.problem import Problem, Search
from fmce_ops.reverse.products import frozen, has_products
from fmce_ops.reverse.result import Propagation, Reversal, Status
from fmce_ops.reverse.shortcuts import Known, chain, shortcut
from fmce_ops.reverse.solver import each, norms

_SLICE = 2**22  # elements of inputs and targets that are worked on at a time
_AT_BOUND = 0.999  # part of max_change at which an answer is held by it
_ROUNDING = 32  # outputs that differ by so many units in the last place are the same


@dataclass(frozen=True)
class Settings:
    """How far a reverse step may go."""

    damping: float
    max_iterations: int
    tolerance: float
    max_change: float
    shortcuts: bool = True


def reverse(
    module: nn.Module,
    target: Tensor,
    x0: Tensor,
    *,
    damping: float = 0.0,
    max_iterations: int = 9,
    tolerance: float = 1e-3,
    max_change: float = 10.0,
) -> Reversal:
    """The smallest change of ``x0`` that brings the module's output to ``target``.

    x = x0 + argmin_d |f(x0 + d) - t|^2 + damping^2 |d|^2, of least norm (feature-level reverse
    propagation, arXiv 2506.07188); where f ends in a ReLU, targets below 0 count as 0. Linear maps,
    common activations, pooling, normalisation and Sequentials of these have closed forms or direct
    solves; everything else is answered by damped Gauss-Newton, which finds the nearest point
    downhill of x0; with more than 500 iterations L-BFGS goes on from there, units that ReLUs hold
    at rest are woken where it ends short, a Sequential is searched backwards part by part, and the
    search is begun anew beside x0. A module that autograd differentiates only once, and not in
    forward mode, or wrongly the second time, is left to L-BFGS from the start, and its units at
    rest are not woken.

    Parameters
    ----------
    module : differentiable, one tensor to one tensor, each sample by itself. It is run in eval
        mode; its mode and its parameters are as before afterwards.
    target : (N, ...) of the output's shape, finite.
    x0 : (N, ...) the input of the forward pass, float32 or float64.
    damping : Tikhonov weight of the change, in units of output per input.
    max_iterations : of the least-squares solver and of L-BFGS, over all starts, for each sample;
        one costs about three forward passes. What a damped answer is searched with, a part of a
        Sequential, and what follows on its parts, comes on top, as many each. Linear maps take
        what they need.
    tolerance : relative residual at which a target counts as reached. Linear maps are solved to the
        precision of the data type whatever it is.
    max_change : bound on |x - x0| / |x0|; an answer beyond it is replaced by a damped one, and
        L-BFGS keeps within it.

    Raises
    ------
    ReverseError
        The module returns several tensors or integers, changes the number of samples, makes of a
        sample by itself something else than in the batch (seen on the first and the last), is not
        differentiable, or fails at a point that the search tries; shapes or types do not fit,
        settings are out of range, inputs, parameters or buffers are not finite.

    Examples
    --------
    >>> half = nn.Linear(2, 1, bias=False)
    >>> half.weight.data = torch.tensor([[1.0, 1.0]])
    >>> reverse(half, torch.tensor([[2.0]]), torch.zeros(1, 2)).x
    tensor([[1., 1.]])
    """
    settings = Settings(damping, max_iterations, tolerance, max_change)
    return reverse_with(settings, module, target, x0)


def reverse_with(settings: Settings, module: nn.Module, target: Tensor, x0: Tensor) -> Reversal:
    """`reverse`; with ``settings.shortcuts`` off the search answers for every module."""
    check_settings(
        settings.damping, settings.max_iterations, settings.tolerance, settings.max_change
    )
    check_tensors(module, target, x0)
    check_module(module, x0)
    size = max(1, _SLICE // max(1, x0[:1].numel() + target[:1].numel()))
    with torch.inference_mode(False), torch.no_grad(), _exact(x0), frozen(module):
        pieces = zip(target.clone().split(size), x0.clone().split(size), strict=True)
        try:
            return _joined([_reverse_slice(settings, module, *piece) for piece in pieces])
        finally:
            forget_twins()
            forget_factors()


def propagate(
    modules: Sequence[nn.Module],
    target: Tensor,
    activations: Sequence[Tensor],
    *,
    damping: float = 0.0,
    max_iterations: int = 9,
    tolerance: float = 1e-3,
    max_change: float = 10.0,
) -> Propagation:
    """Targets at every boundary of a network, from its output back to its input.

    The reverse step of module n brings its output to ``target``, and what it answers is the target
    of module n-1 (arXiv 2506.07188). A sample whose target equals its own activation is done: no
    module in front of it is reversed for it. Before anything is solved, every module is run on the
    first two samples of its activation, to see that each fits the next.

    Parameters
    ----------
    modules : n modules that make up the network in this order.
    target : (N, K) targets of the last output, for example from `nearest_logits`.
    activations : n tensors (N, ...): the input of each module in the forward pass.
    damping, max_iterations, tolerance, max_change : of every reverse step, see `reverse`.

    Raises
    ------
    ReverseError
        As `reverse`, or if there is not one activation for each module, or an activation is not of
        the shape that the module before it makes.
    """
    for what, given in (("modules", modules), ("activations", activations)):
        if not (hasattr(given, "__len__") and hasattr(given, "__iter__")):
            raise ReverseError(f"the {what} are a {type(given).__name__}: give a list of them.")
    modules, activations = list(modules), list(activations)
    check_settings(damping, max_iterations, tolerance, max_change)
    if not modules or len(modules) != len(activations):
        raise ReverseError(
            f"there are {len(modules)} modules and {len(activations)} activations: "
            "give the input of each module."
        )
    settings = Settings(damping, max_iterations, tolerance, max_change)
    targets, results = [target], list[Reversal]()
    outputs = [*activations[1:], None]
    links = list(zip(modules, activations, outputs, strict=True))
    for number, (module, x0, output) in enumerate(links):
        with _placed(number, len(links)):
            _check_link(module, x0, target if output is None else output, output is None)
    with torch.no_grad():
        for number, (module, x0, output) in reversed(list(enumerate(links))):
            with _placed(number, len(links)):
                results.append(_reverse_changed(settings, module, targets[-1], x0, output))
            targets.append(results[-1].x)
    return Propagation(tuple(reversed(targets)), tuple(reversed(results)))


@contextmanager
def _placed(number: int, count: int) -> Iterator[None]:
    """An error says which of the modules it is about."""
    try:
        yield
    except ReverseError as error:
        raise ReverseError(f"module {number + 1} of {count}: {error}") from error


def _exact(x: Tensor) -> torch.autocast:
    """Everything in the type of the input, whatever is around the call."""
    return torch.autocast(x.device.type, enabled=False)


def _check_link(module: nn.Module, x0: Tensor, following: Tensor, last: bool) -> None:
    check_tensors(module, following, x0)
    check_module(module, x0)
    if not len(x0):
        return
    with torch.inference_mode(False), torch.no_grad(), _exact(x0), frozen(module):
        made(module, x0[:2], following[:2], "the target" if last else "the next activation")


def _reverse_changed(
    settings: Settings, module: nn.Module, target: Tensor, x0: Tensor, output: Tensor | None
) -> Reversal:
    """The reverse step of the samples whose target is not their output, where that is known."""
    if output is None or output.shape != target.shape:
        return reverse_with(settings, module, target, x0)
    check_tensors(module, target, x0)
    rows = (target != output).flatten(1).any(1).nonzero()[:, 0]
    if not len(rows):
        return _untouched(x0)
    return _filled(x0, rows, reverse_with(settings, module, target[rows], x0[rows]))


def _untouched(x0: Tensor) -> Reversal:
    zeros = x0.new_zeros(len(x0))
    return Reversal(x0.clone(), zeros, zeros.clone(), zeros.long(), zeros.long())


def _filled(x0: Tensor, rows: Tensor, part: Reversal) -> Reversal:
    whole = _untouched(x0)
    for name, column in vars(whole).items():
        column[rows] = getattr(part, name)
    return whole


def _joined(parts: list[Reversal]) -> Reversal:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Reversal(*map(torch.cat, columns))


def _reverse_slice(settings: Settings, module: nn.Module, target: Tensor, x0: Tensor) -> Reversal:
    if not len(x0):
        made(module, x0.new_zeros(1, *x0.shape[1:]), target.new_zeros(1, *target.shape[1:]))
        return _untouched(x0)
    y = made(module, x0, target)
    check_apart(module, x0, y)
    gap, size = norms(target - y), torch.maximum(norms(y), norms(target))
    same = gap.isfinite() & (gap <= _ROUNDING * torch.finfo(x0.dtype).eps * size)
    rows = (~same).nonzero()[:, 0]
    if not len(rows):
        return _untouched(x0)
    with _searched(module):
        return _filled(x0, rows, _answer(settings, module, target[rows], x0[rows], gap[rows]))


@contextmanager
def _searched(module: nn.Module) -> Iterator[None]:
    """What the module's own code refuses behind x0 is told in one sentence."""
    try:
        yield
    except (ReverseError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ReverseError(
            f"{type(module).__name__} took x0, and failed on the way to the target "
            f"({first_line(error)}): give a smaller max_change or a nearer target, or wrap it to "
            "take any input of that shape."
        ) from error


def _answer(
    settings: Settings, module: nn.Module, target: Tensor, x0: Tensor, gap: Tensor
) -> Reversal:
    """What the search finds; where that breaks a bound, what damping finds; else x0."""
    size = norms(x0)
    size = torch.where(size > 0, size, 1)
    damping, bound = torch.full_like(gap, settings.damping), torch.full_like(gap, torch.inf)
    problem = Problem(module, target, x0, damping, gap * settings.tolerance, bound)
    found = _search(settings, problem, gap, size)
    broken = (found.status == Status.KEPT).nonzero()[:, 0]
    if len(broken) and gap[broken].isfinite().any():
        # For a linear map |d| <= |r| / (2 damping), so this damping keeps the bound.
        heavy = (gap / (2 * settings.max_change * size)).nan_to_num(posinf=1.0)
        bound = settings.max_change * size
        held = replace(problem, damping=torch.maximum(problem.damping, heavy), bound=bound)
        part = held.take(broken)
        second = _search(settings, part, gap[broken], size[broken])
        second.status[:] = Status.KEPT
        second.status[second.change > 0] = Status.DAMPED
        second.iterations.add_(found.iterations[broken])
        for name, column in vars(found).items():
            column[broken] = getattr(second, name)
    return found


def _search(settings: Settings, problem: Problem, gap: Tensor, size: Tensor) -> Reversal:
    """The shortcut's answer if there is one, and what Newton makes of it; KEPT beyond the bounds.

    Parameters
    ----------
    gap, size : (n,) |f(x0) - t| and |x0|.
    """
    search = _start(settings, problem, gap)
    answered = settings.shortcuts and is_linear(problem.module)  # nothing is better, good or bad
    if not answered and not search.stationary.all():
        problem = replace(problem, products=has_products(problem.module, problem.x0[:1]))
        reach = settings.max_change * size
        left = search.iterations + settings.max_iterations * ~search.stationary
        descend(problem, search, settings.max_iterations, reach)
        left -= search.iterations
        if settings.shortcuts:
            _chained(settings, problem, search, reach)
        if settings.max_iterations > FIRST:
            start_anew(problem, search, left, reach)
    status = torch.full_like(search.iterations, Status.UNFINISHED)
    status[search.stationary] = Status.NEAREST
    status[search.distance <= problem.goal] = Status.REACHED
    change = norms(search.x - problem.x0) / size
    status[(status == Status.NEAREST) & (change >= _AT_BOUND * settings.max_change)] = Status.DAMPED
    sound = (search.distance <= gap) & gap.isfinite() & (change <= settings.max_change)
    status[~sound] = Status.KEPT
    x = search.x.where(each(sound, search.x), problem.x0)
    return Reversal(
        x,
        torch.where(sound, search.distance / gap, 1).to(x.dtype),
        torch.where(sound, change, 0).to(x.dtype),
        search.iterations,
        status,
    )


def _start(settings: Settings, problem: Problem, gap: Tensor) -> Search:
    """The shortcut's answer where there is one, else x0."""
    module, x0 = problem.module, problem.x0
    none = torch.zeros_like(gap, dtype=torch.long)
    search = Search(x0.clone(), gap.clone(), none, none.bool())
    known = shortcut(module, problem.target, x0, problem.damping) if settings.shortcuts else None
    if known and is_linear(module):
        distance = norms(problem.target - module(known.x.clone()))
        return Search(known.x, distance, known.iterations, known.finished)
    if known:
        taken = _take(problem, search, torch.arange(len(x0), device=x0.device), known)
        # A closed form is the nearest there is, but for windows that overlap.
        search.stationary[taken] = type(module) not in POOLINGS
    return search


def _chained(settings: Settings, problem: Problem, search: Search, reach: Tensor) -> None:
    """Samples that the search did not bring to the target get the chain's start, and go on."""
    rows = (search.distance > problem.goal).nonzero()[:, 0]
    if not len(rows) or problem.damping.any():
        return
    part = problem.take(rows)
    link = partial(_search_link, settings) if settings.max_iterations > FIRST else None
    try:
        with _searched(part.module):
            known = chain(part.module, part.target, part.x0, settings.tolerance, link)
    except ReverseError:  # of a part by itself: there is no way back part by part
        return
    if known is None:
        return
    within = norms(known.x - part.x0) <= reach[rows]
    taken = _take(problem, search, rows[within], known.take(within))
    again = taken[search.distance[taken] > problem.goal[taken]]
    if len(again):
        second = search.take(again)
        descend(problem.take(again), second, settings.max_iterations, reach[again])
        search.put(again, second)


def _search_link(
    settings: Settings, link: nn.Module, target: Tensor, own: Tensor, wanted: Tensor
) -> Known:
    """What the search finds for a part of a Sequential, for the samples that are wanted.

    It starts at the target where the part keeps the shape: what ends short of it from ``own`` is
    often a residual block that adds something bounded, whose answer lies about the target.
    """
    y = link(own.clone())
    check_apart(link, own, y)
    gap = distance = norms(target - y)
    start = own
    if target.shape == own.shape:
        there = norms(target - link(target.clone()))
        sound = there.isfinite() & (gap > 0)
        start, distance = target.where(each(sound, target), own), there.where(sound, gap)
    none = torch.zeros_like(gap, dtype=torch.long)
    unbounded = torch.full_like(gap, torch.inf)
    goal = gap * settings.tolerance / 10
    undamped, products = torch.zeros_like(gap), has_products(link, own[:1])
    problem = Problem(link, target, own, undamped, goal, unbounded, products)
    search = Search(start.clone(), distance, none, ~wanted)
    descend(problem, search, settings.max_iterations, unbounded)
    left = (settings.max_iterations - search.iterations) * wanted
    start_anew(problem, search, left, unbounded)
    return Known(search.x, search.iterations, search.distance <= settings.tolerance * gap)


def _take(problem: Problem, search: Search, rows: Tensor, known: Known) -> Tensor:
    """Put what is known about ``rows`` into the search where it is nearer; returns those rows."""
    search.iterations[rows] += known.iterations
    if not len(rows):
        return rows
    distance = norms(problem.target[rows] - problem.module(known.x.clone()))
    better = distance < search.distance[rows]
    taken = rows[better]
    search.x[taken], search.distance[taken] = known.x[better], distance[better]
    search.stationary[taken] = False
    return taken
