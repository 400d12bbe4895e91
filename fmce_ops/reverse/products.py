"""A module at a point: its value and the products of its Jacobian with vectors."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fmce_ops.errors import ReverseError
from fmce_ops.reverse.checks import culprit, first_line
from fmce_ops.reverse.relus import Rectifier, Relus
from fmce_ops.reverse.solver import norms

_SAME = 1e-5  # part of the largest output that rounding may change
_APART = 1e-2  # part of an inner product that rounding may change
_HALVINGS = 20  # of a path, to find where an output leaves what it was
_BACKWARD_HOOKS = "_backward_hooks", "_backward_pre_hooks"
_CHECKPOINTED = "the module keeps what it needs for its derivative in a way of its own"
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_RELUS = {F.relu, torch.relu, torch.Tensor.relu}
_RELUS_IN_PLACE = {torch.relu_, torch.Tensor.relu_}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode, nothing in place, no gradients for parameters, no hooks on the way back.

    All is as before afterwards.
    """
    plain = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    training = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    inplace = [part for part in plain if getattr(part, "inplace", False) is True]
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hooks = [(part, name, getattr(part, name)) for part in plain for name in _BACKWARD_HOOKS]
    try:
        module.eval()
        _set_learning(learning, False)
        _set_inplace(inplace, False)
        for part, name, _ in hooks:
            setattr(part, name, OrderedDict())
        yield
    finally:
        for part, mode in training:
            part.training = mode
        _set_learning(learning, True)
        _set_inplace(inplace, True)
        for part, name, own in hooks:
            setattr(part, name, own)


def _set_learning(parameters: list[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)


def _set_inplace(parts: list[Any], value: bool) -> None:
    for part in parts:
        part.inplace = value


@dataclass(frozen=True)
class Output:
    """What a module made of a batch; where it ends in a ReLU, targets below 0 count as 0.

    Attributes
    ----------
    value : (n, ...).
    entry : (n, ...) what went into the ReLU that made the value, or None.
    rectified : how many ReLUs there were.
    """

    value: Tensor
    entry: Tensor | None
    rectified: int

    def rest(self, target: Tensor) -> Tensor:
        """(n, ...) what is missing to the target."""
        return (target if self.entry is None else target.clamp(min=0)) - self.value

    def distance(self, target: Tensor) -> Tensor:
        """(n,) |target - output|."""
        return norms(target - self.value)


def output_of(module: nn.Module, x: Tensor, relus: Rectifier | None = None) -> Output:
    """Run the module on (n, ...), with a graph, and the derivatives that `Linearised` needs.

    A module with checkpoints has its own: they run it again, where nothing is rewritten.
    """
    with torch.enable_grad():  # a checkpoint is none without
        try:
            with (
                disable_saved_tensors_hooks(_CHECKPOINTED),
                sdpa_kernel(SDPBackend.MATH),
                _Rewritten(relus) as rewritten,
            ):
                y = module(x.clone())  # its first operation may be in place
        except RuntimeError as error:
            if str(error) != _CHECKPOINTED:
                raise
            return Output(module(x.clone()), None, 0)
    return Output(y, rewritten.entry if rewritten.exit is y else None, rewritten.rectified)


class Linearised:
    """The Jacobian J of ``module`` at x: (n, ...) -> (n, ...), one block per sample.

    ``pull`` is one backward pass. ``push`` is the derivative of ``pull``, which is linear: one more
    backward pass on a graph that is built once, and cheaper than forward mode, which repeats the
    module for every vector. Forward mode steps in where an operation has no second derivative.

    A unit that a ReLU holds at rest has no derivative, though a step may wake it. With ``target``
    and ``relus`` these stand in for the ReLUs, and J is that of their equations.

    Parameters
    ----------
    module : maps one tensor to one tensor, sample by sample.
    target : (n, ...) where the output shall go.
    relus : what stands in for the ReLUs.

    Attributes
    ----------
    output : what the module made of x.
    rest : (n, ...) what is missing to the target, or in the equations.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        target: Tensor | None = None,
        relus: Relus | None = None,
    ) -> None:
        self._module, self._target, self._relus = module, target, relus
        self._x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            self.output = output_of(module, self._x, relus)
            self._y, self.rest = self._before(self.output)
        self._pulled: tuple[Tensor, Tensor] | None = None  # a vector, and J^T of it with its graph

    def _before(self, made: Output) -> tuple[Tensor, Tensor]:
        if self._target is None or self._relus is None:
            return made.value, torch.zeros_like(made.value)
        value, rest = self._relus.equations(made.value, made.entry, self._target)
        return value, rest.detach()

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors that it multiplies."""
        return self._x.dtype

    def take(self, rows: Tensor) -> "Linearised":
        """The same for some of the samples."""
        target = None if self._target is None else self._target[rows]
        relus = None if self._relus is None else self._relus.take(rows)
        return Linearised(self._module, self._x[rows], target, relus)

    def pull(self, u: Tensor) -> Tensor:
        """J^T u: (n, ...) of the output -> (n, ...) of the input."""
        if self._pulled is None:
            return self._first(u)[1].detach()
        return gradient(self._y, self._x, u)

    def _first(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The first J^T u, whose graph every ``push`` is the derivative of, whatever u is."""
        seed = u.detach().clone().requires_grad_()
        self._pulled = seed, gradient(self._y, self._x, seed, create_graph=True)
        return self._pulled

    def push(self, v: Tensor) -> Tensor:
        """J v: (n, ...) of the input -> (n, ...) of the output."""
        seed, pulled = self._pulled or self._first(torch.zeros_like(self._y))
        with suppress(RuntimeError):
            found = _derivative(pulled, seed, v)
            if found is not None:
                return found
        return self._forward_mode(v)

    def _forward_mode(self, v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(self._x.detach(), v)
            made = output_of(self._module, dual, self._relus)
            tangent = forward_ad.unpack_dual(self._before(made)[0]).tangent
        return torch.zeros_like(self._y) if tangent is None else tangent


def has_products(module: nn.Module, x: Tensor) -> bool:
    """Whether J v can be had at x, (n, ...), beside J^T u; refuse a module without that."""
    pulled = _fitting(module, x)
    if pulled is None or not pulled.any():
        _check_gradient(module, x)
    return pulled is not None


def _fitting(module: nn.Module, x: Tensor) -> Tensor | None:
    """J^T u for some u, or None where there is no J v, or none that fits it."""
    try:
        here = Linearised(module, x)
        u = _wave(here.output.value)
        pulled = here.pull(u)
        size = pulled.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)  # its square may be 0
        seed = pulled / size
        back, forth = _inner(pulled, seed), _inner(u, here.push(seed))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the module's own code makes of it
        return None
    return pulled if (back - forth).abs() <= _APART * back else None


def _check_gradient(module: nn.Module, x: Tensor) -> None:
    try:
        y, pulled = _generic_pull(module, x)
        if not pulled.any() and _steps(module, x, y):
            raise RuntimeError("its output changes, and autograd takes its derivative for 0")
    except (ReverseError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the module's own code makes of it
        raise ReverseError(
            f"{type(module).__name__} has no derivative to search by ({first_line(error)}): only "
            "modules that autograd differentiates can be reversed."
        ) from error


def _generic_pull(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the module makes of x, and J^T u for some u."""
    leaf = x.detach().clone().requires_grad_()
    y = output_of(module, leaf).value
    if not y.requires_grad:
        with torch.enable_grad():
            name, _ = culprit(module, leaf, lambda made: made.requires_grad)
        raise ReverseError(
            f"{name} returned a tensor that no gradient comes back from: "
            "only differentiable modules can be reversed."
        )
    return y.detach(), gradient(y, leaf, _wave(y))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()


def _wave(like: Tensor) -> Tensor:
    """Numbers that cancel out for no module, of the shape of ``like``."""
    count = torch.arange(like.numel(), device=like.device)
    return count.to(like.dtype).cos().view_as(like)


def _steps(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether the output has no derivative even where it leaves y, what it is around x.

    So it is with steps (rounding, signs) and with what autograd takes for constant (quantised
    weights); units at rest that wake, and clipped values that come free, have a derivative there.
    """
    rms = x.square().mean().sqrt()
    path = 2 * _wave(x) * torch.where(rms > 0, rms, 1)
    least = torch.finfo(x.dtype).tiny / torch.finfo(x.dtype).eps  # of which a part is no 0

    def changed(part: float) -> bool:
        try:
            change = (module(x + part * path) - y).abs().amax()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it takes no such input, so nothing is known
            return False
        return bool(change > (_SAME * y.abs().amax()).clamp(min=least))

    if not changed(1.0):
        return False
    inside, outside = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if changed(middle) else (middle, outside)
    return not _generic_pull(module, x + outside * path)[1].any()


def gradient(y: Tensor, x: Tensor, u: Tensor, create_graph: bool = False) -> Tensor:
    """J^T u, (n, ...), where y was made of x."""
    found = _derivative(y, x, u, create_graph)
    return torch.zeros_like(x) if found is None else found


def _derivative(y: Tensor, x: Tensor, u: Tensor, create_graph: bool = False) -> Tensor | None:
    found: Tensor | None = torch.autograd.grad(
        y, x, u, retain_graph=True, create_graph=create_graph, allow_unused=True
    )[0]
    return found


class _Rewritten(TorchFunctionMode):
    """Same values; convolution and batch norm get second derivatives as cheap as the first.

    PyTorch's own cost two to ten times that. Batch norm right behind a convolution is
    differentiated as a part of it. Counts ReLUs and remembers what went in and out of the last;
    ``relus`` stand in for them.
    """

    def __init__(self, relus: Rectifier | None) -> None:
        super().__init__()
        self.relus, self.rectified = relus, 0
        self.entry = self.exit = torch.empty(0)
        self.convolved: _Convolved | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in _RELUS:
            return self._relu(*args, **given)
        if func in _RELUS_IN_PLACE:
            return self._relu(args[0], inplace=True)
        if func is F.batch_norm and not given.get("training"):
            return self._batch_norm(*args, **given)
        if func in _CONVOLUTIONS:
            return self._convolve(func, *args, **given)
        if func in _RECURRENT:  # cuDNN's have no derivative in eval mode, and no second one
            with torch.backends.cudnn.flags(enabled=False):
                return func(*args, **given)
        return func(*args, **given)

    def _relu(self, input: Tensor, inplace: bool = False) -> Tensor:
        self.entry = input.clone() if inplace else input
        if self.relus is None:
            self.exit = F.relu(input, inplace)
        else:
            y = self.relus.rectify(self.entry, self.rectified)
            self.exit = input.copy_(y) if inplace else y
        self.rectified += 1
        return self.exit

    def _convolve(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        odd = input.ndim < weight.ndim or input.is_complex() or not _constant(weight)
        if isinstance(padding, str) or odd:
            return func(input, weight, bias, stride, padding, dilation, groups)
        dims = weight.ndim - 2
        steps, margins, gaps = (_of_each(value, dims) for value in (stride, padding, dilation))
        kernel = _Kernel(weight.detach(), input.detach(), steps, margins, gaps, groups)
        y: Tensor = _Convolution.apply(input, kernel, False)
        if bias is not None:
            y = y + bias.view(-1, *[1] * dims)
        self.convolved = None
        if _constant(bias):
            self.convolved = _Convolved(input, input._version, y, y._version, y.grad_fn, kernel)
        return y

    def _batch_norm(
        self,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        channels = (1, -1) + (1,) * (x.ndim - 2)

        def normalised(x: Tensor) -> Tensor:
            return x * scale.view(channels) + shift.view(channels)

        known = _constant(mean, variance, weight, bias)
        if not known or self.convolved is None or not self.convolved.made(x):
            return normalised(x)
        input, kernel = self.convolved.input, replace(self.convolved.kernel, factors=scale.detach())
        made: Tensor = _Convolution.apply(input, kernel, False, lambda: normalised(x.detach()))
        return made


def _constant(*tensors: Tensor | None) -> bool:
    """Whether none of them depends on what the module is differentiated by."""
    given = [tensor for tensor in tensors if tensor is not None]
    tangents = (forward_ad.unpack_dual(tensor).tangent for tensor in given)
    return not any(tensor.requires_grad for tensor in given) and all(t is None for t in tangents)


def _of_each(value: int | Sequence[int], dims: int) -> list[int]:
    """A setting for each dimension, where one may stand for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


@dataclass(frozen=True)
class _Kernel:
    """A convolution without its bias: `push` applies it, `pull` its adjoint.

    Attributes
    ----------
    unscaled : (outputs, inputs / groups, ...) weight, without the factors.
    like : (n, inputs, ...) of the shape of what goes in.
    factors : (outputs,) of the weight, or None.
    """

    unscaled: Tensor
    like: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    factors: Tensor | None = None

    @cached_property
    def weight(self) -> Tensor:
        if self.factors is None:
            return self.unscaled
        return self.unscaled * self.factors.view(-1, *[1] * (self.unscaled.ndim - 1))

    @property
    def _settings(self) -> tuple[Any, ...]:
        zeros = [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, False, zeros, self.groups

    def push(self, v: Tensor) -> Tensor:
        return torch.convolution(v, self.weight, None, *self._settings)

    def pull(self, u: Tensor) -> Tensor:
        if self._turned is not None:
            return self._turned.push(u)
        wanted = True, False, False  # no derivative of weight and bias
        given = u, self.like, self.weight, None, *self._settings, wanted
        found: Tensor = torch.ops.aten.convolution_backward(*given)[0]
        return found

    @cached_property
    def _turned(self) -> "_Kernel | None":
        """The adjoint as a convolution, where it is one: the quicker way on a CPU."""
        sides = zip(self.weight.shape[2:], self.padding, self.dilation, strict=True)
        padding = [dilation * (side - 1) - padding for side, padding, dilation in sides]
        if self.groups > 1 or any(step > 1 for step in self.stride) or min(padding) < 0:
            return None
        weight = self.weight.transpose(0, 1).flip(*range(2, self.weight.ndim)).contiguous()
        return replace(self, unscaled=weight, padding=padding, factors=None)


@dataclass(frozen=True)
class _Convolved:
    """What went into a convolution and what came out, each with its version then."""

    input: Tensor
    input_version: int
    output: Tensor
    output_version: int
    node: Any
    kernel: _Kernel

    def made(self, x: Tensor) -> bool:
        """Whether x is what came out, with its derivative, and nothing was changed in place."""
        same = self.input._version == self.input_version and x._version == self.output_version
        learning = x.requires_grad or not (torch.is_grad_enabled() and self.input.requires_grad)
        hooked = bool(x._backward_hooks)
        return same and x is self.output and x.grad_fn is self.node and learning and not hooked


class _Convolution(torch.autograd.Function):
    """A convolution or its adjoint, each the derivative of the other; the kernel is constant.

    With ``value`` that is the result, of which the convolution is the derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        kernel: _Kernel,
        adjoint: bool,
        value: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        ctx.kernel, ctx.adjoint = kernel, adjoint
        return _Convolution._product(ctx, v, adjoint) if value is None else value()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Convolution.apply(grad, ctx.kernel, not ctx.adjoint), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Convolution._product(ctx, tangent, ctx.adjoint)

    @staticmethod
    def _product(ctx: Any, v: Tensor, adjoint: bool) -> Tensor:
        kernel: _Kernel = ctx.kernel
        return kernel.pull(v) if adjoint else kernel.push(v)
