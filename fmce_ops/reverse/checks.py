"""What cannot be reversed is refused with one sentence."""

import torch
from torch import Tensor, nn

from fmce_ops.errors import ReverseError

_TYPES = (torch.float32, torch.float64)


def check_settings(damping: float, max_iterations: int, tolerance: float, bound: float) -> None:
    """Refuse settings out of range."""
    if not 0 <= damping < float("inf"):
        raise ReverseError(f"damping is {damping}: give a finite number that is not negative.")
    if max_iterations < 1:
        raise ReverseError(f"max_iterations is {max_iterations}: give at least 1.")
    if not 0 < tolerance < 1:
        raise ReverseError(f"tolerance is {tolerance}: give a relative residual in (0, 1).")
    if not 0 < bound < float("inf"):
        raise ReverseError(f"max_change is {bound}: give a finite number above 0.")


def check_tensors(module: nn.Module, target: Tensor, x0: Tensor) -> None:
    """Refuse what does not fit before anything is computed."""
    name = type(module).__name__
    for what, tensor in (("input", x0), ("target", target)):
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or tensor.dtype not in _TYPES:
            given = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else ""
            raise ReverseError(
                f"the {what} of {name} is {given or type(tensor).__name__}: give a tensor "
                "(N, ...) of float32 or float64."
            )
        if not tensor.isfinite().all():
            raise ReverseError(f"the {what} of {name} holds NaN or Inf: find out what made it.")
    if (len(target), target.dtype, target.device) != (len(x0), x0.dtype, x0.device):
        raise ReverseError(
            f"{name} got {len(x0)} inputs of {x0.dtype} on {x0.device} and {len(target)} targets "
            f"of {target.dtype} on {target.device}: give as many of the same type in one place."
        )


def check_module(module: nn.Module) -> None:
    """Refuse what ties the samples of a batch to one another."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ReverseError(
                f"{type(module).__name__} holds a {type(part).__name__} that normalises by the "
                "statistics of the batch, which ties its samples together: track running ones."
            )


def check_output(module: nn.Module, y: object, target: Tensor) -> None:
    """Refuse an output that is not one tensor of the target's shape."""
    name = type(module).__name__
    if not isinstance(y, Tensor):
        raise ReverseError(
            f"{name} returned a {type(y).__name__}: only modules that map one tensor to one tensor "
            "can be reversed, so wrap it."
        )
    if y.ndim < 1 or len(y) != len(target):
        count = len(y) if y.ndim else "no"
        raise ReverseError(
            f"{name} made {count} samples of {len(target)}: a module that changes the number "
            "of samples cannot be reversed."
        )
    if y.shape != target.shape:
        raise ReverseError(
            f"{name} returned {tuple(y.shape)} and the target is {tuple(target.shape)}: give "
            "targets of the output's shape."
        )
