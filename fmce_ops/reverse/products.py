"""A module at a point: its value and the products of its Jacobian with vectors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fmce_ops.errors import ReverseError
from fmce_ops.reverse.solver import norms

_SLOPE = 0.1  # of units that rest and may wake
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients for parameters, nothing in place; all as before afterwards."""
    training = [(part, part.training) for part in module.modules()]
    inplace = [part for part in module.modules() if getattr(part, "inplace", False) is True]
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        module.eval().requires_grad_(False)
        _set_inplace(inplace, False)
        yield
    finally:
        for part, mode in training:
            part.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)
        _set_inplace(inplace, True)


def _set_inplace(parts: list[Any], value: bool) -> None:
    for part in parts:
        part.inplace = value


@dataclass(frozen=True)
class Output:
    """What a module made of a batch.

    Where it ends in a ReLU, targets below 0 count as 0. A unit that rests there has no derivative
    even where its target is above 0. With ``hinge`` the value is therefore taken before the ReLU:
    such a unit is pulled up, and one that shall rest and does is left alone. The ReLUs before the
    last keep their values and get the derivative of a leaky one, so that their units can wake.
    """

    value: Tensor
    rests: bool  # a ReLU was on the way
    rectified: bool  # and it was the last operation
    hinge: bool

    def rest(self, target: Tensor) -> Tensor:
        """(n, ...) what is missing to the target."""
        if not self.rectified:
            return target - self.value
        rest = target.clamp(min=0) - self.value
        return rest * self.pulled(target) if self.hinge else rest

    def pulled(self, target: Tensor) -> Tensor:
        """(n, ...) before a ReLU: the units that do not yet rest as they should."""
        return (target > 0) | (self.value > 0)

    def distance(self, target: Tensor) -> Tensor:
        """(n,) |target - output|."""
        hidden = self.rectified and self.hinge
        return norms(target - (self.value.clamp(min=0) if hidden else self.value))


def output_of(module: nn.Module, x: Tensor, hinge: bool = False) -> Output:
    """Run the module on (n, ...) with the derivatives that `Linearised` needs."""
    with sdpa_kernel(SDPBackend.MATH), _Rewritten(hinge) as rewritten:
        y = module(x.clone())  # its first operation may be in place
    rectified = rewritten.output is y
    value = rewritten.input if rectified and hinge else y
    return Output(value, rewritten.output.numel() > 0, rectified, hinge)


class Linearised:
    """The Jacobian J of ``module`` at x: (n, ...) -> (n, ...), one block per sample.

    ``pull`` is one backward pass. ``push`` is the derivative of ``pull``, which is linear: one more
    backward pass on a graph that is built once, and cheaper than forward mode, which repeats the
    module for every vector. Forward mode steps in where an operation has no second derivative.

    Parameters
    ----------
    module : maps one tensor to one tensor, sample by sample.
    target : where the module's output shall go; needed with ``hinge`` alone.
    hinge : see `Output`.
    """

    def __init__(
        self, module: nn.Module, x: Tensor, target: Tensor | None = None, hinge: bool = False
    ) -> None:
        self._module, self._target, self._hinge = module, target, hinge
        self._x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            made = output_of(module, self._x, hinge)
            y = self._kept(made, made.value)
        if not y.requires_grad:
            raise ReverseError(
                f"{type(module).__name__} returned a tensor that no gradient comes back from: "
                "only differentiable modules can be reversed."
            )
        self._y, self.output = y, replace(made, value=made.value.detach())
        self._seed: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors that it multiplies."""
        return self._x.dtype

    def take(self, rows: Tensor) -> "Linearised":
        """The same for some of the samples."""
        target = None if self._target is None else self._target[rows]
        return Linearised(self._module, self._x[rows], target, self._hinge)

    def pull(self, u: Tensor) -> Tensor:
        """J^T u: (n, ...) of the output -> (n, ...) of the input."""
        return _gradient(self._y, self._x, u)

    def push(self, v: Tensor) -> Tensor:
        """J v: (n, ...) of the input -> (n, ...) of the output."""
        if self._seed is None:
            self._seed = torch.zeros_like(self._y, requires_grad=True)
            self._pulled = _gradient(self._y, self._x, self._seed, create_graph=True)
        with suppress(RuntimeError):
            return _gradient(self._pulled, self._seed, v)
        return self._forward_mode(v)

    def _forward_mode(self, v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            made = output_of(self._module, forward_ad.make_dual(self._x.detach(), v), self._hinge)
            tangent = forward_ad.unpack_dual(made.value).tangent
        return torch.zeros_like(self._y) if tangent is None else self._kept(made, tangent)

    def _kept(self, made: Output, values: Tensor) -> Tensor:
        if self._target is None or not (made.rectified and made.hinge):
            return values
        return values * made.pulled(self._target)


def _gradient(y: Tensor, x: Tensor, u: Tensor, create_graph: bool = False) -> Tensor:
    found = torch.autograd.grad(
        y, x, u, retain_graph=True, create_graph=create_graph, allow_unused=True
    )[0]
    return torch.zeros_like(x) if found is None else found


class _Rewritten(TorchFunctionMode):
    """Same values; convolution and batch norm get second derivatives as cheap as the first.

    PyTorch's own cost two to ten times that. Remembers what went in and out of the last ReLU.
    With ``leaky`` the derivatives of ReLUs are those of leaky ones.
    """

    def __init__(self, leaky: bool) -> None:
        super().__init__()
        self.leaky = leaky
        self.input = self.output = torch.empty(0)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in (F.relu, torch.relu) and not given.get("inplace"):
            self.input, self.output = args[0], func(args[0])
            if self.leaky:
                leaky = F.leaky_relu(args[0], _SLOPE)
                self.output = leaky + (self.output - leaky).detach()
            return self.output
        if func is F.batch_norm and not given.get("training"):
            return _batch_norm(*args, **given)
        if func in _CONVOLUTIONS and not given and not isinstance(args[4], str):
            return _convolve(*args)
        return func(*args, **given)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    settings = (list(stride), list(padding), list(dilation), groups)
    y = _Convolution.apply(x, weight, x, settings, False)
    return y if bias is None else y + bias.view(-1, *[1] * (weight.ndim - 2))


class _Convolution(torch.autograd.Function):
    """A convolution or its adjoint, each the derivative of the other; the weight is constant."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, weight: Tensor, like: Tensor, settings: Any, adjoint: bool
    ) -> Tensor:
        ctx.weight, ctx.like = weight.detach(), like.detach()
        ctx.settings, ctx.adjoint = settings, adjoint
        return _Convolution._product(ctx, v, adjoint)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product = _Convolution.apply(grad, ctx.weight, ctx.like, ctx.settings, not ctx.adjoint)
        return product, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Convolution._product(ctx, tangent, ctx.adjoint)

    @staticmethod
    def _product(ctx: Any, v: Tensor, adjoint: bool) -> Tensor:
        stride, padding, dilation, groups = ctx.settings
        zeros = [0] * len(stride)
        if adjoint:
            return torch.ops.aten.convolution_backward(
                v,
                ctx.like,
                ctx.weight,
                None,
                stride,
                padding,
                dilation,
                False,
                zeros,
                groups,
                (True, False, False),
            )[0]
        return torch.convolution(
            v, ctx.weight, None, stride, padding, dilation, False, zeros, groups
        )


def _batch_norm(
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
    return x * scale.view(channels) + shift.view(channels)
