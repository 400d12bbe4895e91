"""Device, precision and processes, all through Lightning Fabric."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils import deterministic

from fmce_ops.data import Images
from fmce_ops.errors import TrainingError

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def launch(precision: Precision = "32-true") -> Fabric:
    """A launched Fabric: one process, or those that ``fabric run`` started.

    Work is deterministic: the same seed, machine and inputs give the same bytes.
    """
    warnings.filterwarnings("ignore", module="lightning_fabric")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
    torch.use_deterministic_algorithms(True, warn_only=True)
    setting: Any = deterministic  # which has no types
    setting.fill_uninitialized_memory = False  # costs a tenth of a step, and nothing reads it
    several = bool(os.environ.get("LT_CLI_USED"))
    fabric = Fabric(precision=precision, devices="auto" if several else 1)
    if not several:  # 'fabric run' has launched its processes, and Fabric refuses a second time
        fabric.launch()
    return fabric


def load(
    fabric: Fabric, images: Images, split: str, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Images and labels of a split, or its first ``count``, on the device.

    Images that would fill more than half of a GPU's free memory stay mapped from the disk.
    """
    pixels, labels = (part[:count] for part in images.load(split))
    if _fits(fabric.device, pixels):
        pixels = pixels.to(fabric.device)
    return pixels, labels.to(fabric.device)


def _fits(device: torch.device, values: Tensor) -> bool:
    return device.type != "cuda" or values.nbytes <= torch.cuda.mem_get_info(device)[0] / 2


def total(fabric: Fabric, mine: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    summed = fabric.all_reduce(mine, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed


def same_start(fabric: Fabric, step: int, folder: Path) -> None:
    """Refuse to go on where processes would begin behind different steps.

    Only the first process writes state, so every machine must see its folder.

    Raises
    ------
    TrainingError
        Another process found another number of steps in its ``folder``.
    """
    steps = fabric.all_gather(torch.tensor(step, device=fabric.device))
    assert isinstance(steps, Tensor)
    if (steps != step).any():
        raise TrainingError(
            f"{folder} holds {steps.min()} steps for one process and {steps.max()} for another: "
            "keep the project in one folder that all machines share."
        )
