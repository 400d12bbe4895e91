"""Device, precision and processes, all through Lightning Fabric."""

import os
import warnings
from typing import Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def launch(precision: Precision = "32-true") -> Fabric:
    """A launched Fabric: one process, or those that ``fabric run`` started.

    Work is deterministic: the same seed, machine and inputs give the same bytes.
    """
    warnings.filterwarnings("ignore", module="lightning_fabric")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
    torch.use_deterministic_algorithms(True, warn_only=True)
    several = bool(os.environ.get("LT_CLI_USED"))
    fabric = Fabric(precision=precision, devices="auto" if several else 1)
    if not several:  # 'fabric run' has launched its processes, and Fabric refuses a second time
        fabric.launch()
    return fabric


def total(fabric: Fabric, mine: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    summed = fabric.all_reduce(mine, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed
