"""The original task: train D(x) = F(C(x)) and record losses and weights at every point.

A point is the end of an epoch, or of one of ``points_per_epoch`` equal parts of it. A run that was
killed goes on behind its last recorded point and ends with the same bytes, because every random
draw follows from (seed, epoch, step) alone.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from fmce_ops.convergence import ConvergenceMonitor
from fmce_ops.data import TrainBatches, derive_seed, to_input
from fmce_ops.errors import TrainingError
from fmce_ops.models import load_into, save_weights
from fmce_ops.training.devices import same_start, total
from fmce_ops.training.losses import Point
from fmce_ops.training.reporter import Reporter, Row
from fmce_ops.training.state import load_state, save_state

_OPTIMIZERS: dict[str, Any] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Plan:
    """How to train; ``lr`` follows half a cosine, or stays ``constant``.

    Attributes
    ----------
    horizon : epochs of the half cosine; None: all. A longer one is cut before it comes to rest.
    """

    epochs: int
    points_per_epoch: int
    optimizer: str
    lr: float
    weight_decay: float
    schedule: str
    seed: int
    horizon: int | None = None

    @property
    def points(self) -> int:
        """How many points are recorded."""
        return self.epochs * self.points_per_epoch

    def learning_rate(self, epoch: int) -> float:
        """Of the 0-based ``epoch``; cosine annealing steps once an epoch."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * epoch / (self.horizon or self.epochs))) / 2


@dataclass
class _Progress:
    """What a resumption needs besides the weights of the last point."""

    history: list[Point] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)  # images per second
    times: list[int] = field(default_factory=list)  # ms since 1970
    optimizer: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)  # the scale of half precision


@dataclass(frozen=True)
class Validation:
    """Images and labels that no step learns from; the labels are on the network's device."""

    images: Tensor  # uint8 (n, c, s, s)
    labels: Tensor  # int64 (n,)
    size: int
    mean: Sequence[float]
    std: Sequence[float]

    def batches(self, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of the network and labels."""
        parts = zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)
        for images, labels in parts:
            near = images.to(labels.device)
            yield to_input(near, size=self.size, mean=self.mean, std=self.std), labels


def train_classifier(
    fabric: Fabric,
    network: nn.Module,
    batches: TrainBatches,
    validation: Validation,
    plan: Plan,
    folder: Path,
    reporter: Reporter,
) -> list[Point]:
    """Train, record each point's weights in ``folder``, and return the loss curve.

    Raises
    ------
    TrainingError
        A loss is not finite, there are more points than steps in an epoch, the network cannot take
        so few images, or processes do not see the same ``folder``.
    """
    if plan.points_per_epoch > batches.steps:
        raise TrainingError(
            f"train.points_per_epoch is {plan.points_per_epoch} but an epoch has {batches.steps} "
            "steps: ask for fewer points or make train.batch_size smaller."
        )
    progress = _resume(folder, network)
    same_start(fabric, len(progress.history), folder)
    module, optimizer = _set_up(fabric, network, plan, progress)
    monitor = ConvergenceMonitor()
    reporter.begin("train", plan.points)
    for i in range(len(progress.history)):
        reporter.row(replace(_row(progress, i, monitor), again=True))
    for point in range(len(progress.history) + 1, plan.points + 1):
        _train_point(fabric, module, optimizer, batches, validation, plan, point, progress)
        if fabric.is_global_zero:
            _record(fabric, folder, network, optimizer, progress)
        reporter.row(_row(progress, point - 1, monitor))
    return progress.history


def point_file(folder: Path, point: int) -> Path:
    """The weights of a 1-based point."""
    return folder / f"point-{point:05d}.safetensors"


def _set_up(
    fabric: Fabric, network: nn.Module, plan: Plan, progress: _Progress
) -> tuple[nn.Module, Optimizer]:
    # On its device before the optimizer's state is loaded, which follows the weights there.
    network.to(fabric.device).to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"fused": True}
    if plan.optimizer == "sgd":
        options["momentum"] = 0.9
    optimizer = _OPTIMIZERS[plan.optimizer](
        network.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, **options
    )
    if progress.optimizer:
        optimizer.load_state_dict(progress.optimizer)
    if progress.precision:
        fabric.strategy.precision.load_state_dict(progress.precision)
    module, optimizer = fabric.setup(network, optimizer)
    return module, optimizer


def _train_point(
    fabric: Fabric,
    module: nn.Module,
    optimizer: Optimizer,
    batches: TrainBatches,
    validation: Validation,
    plan: Plan,
    point: int,
    progress: _Progress,
) -> None:
    epoch, part = divmod(point - 1, plan.points_per_epoch)
    steps = range(
        batches.steps * part // plan.points_per_epoch,
        batches.steps * (part + 1) // plan.points_per_epoch,
    )
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate(epoch)
    started = time.perf_counter()
    loss_sum, hits, count = _train_steps(fabric, module, optimizer, batches, plan, epoch, steps)
    elapsed = time.perf_counter() - started
    val_loss, val_accuracy = evaluate(fabric, module, validation)
    train_loss, train_accuracy = loss_sum / count, hits / count
    if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
        kept = f"the first {point - 1} points are kept" if point > 1 else "nothing was recorded"
        raise TrainingError(
            f"the loss at epoch {epoch + 1} is not finite (training {train_loss}, validation "
            f"{val_loss}; {kept}): lower train.lr or check the images."
        )
    done = epoch + (part + 1) / plan.points_per_epoch
    lr = plan.learning_rate(epoch)
    progress.history.append(
        Point(point, done, train_loss, train_accuracy, val_loss, val_accuracy, lr)
    )
    progress.speeds.append(count / elapsed)
    progress.times.append(time.time_ns() // 1_000_000)


def _logits(module: nn.Module, inputs: Tensor) -> Tensor:
    try:
        logits: Tensor = module(inputs)
    except ValueError as error:  # as batch norm has it of a single value
        raise TrainingError(
            f"the network cannot be trained with {len(inputs)} images at once ({error}): "
            "make train.batch_size larger."
        ) from error
    return logits


def _train_steps(
    fabric: Fabric,
    module: nn.Module,
    optimizer: Optimizer,
    batches: TrainBatches,
    plan: Plan,
    epoch: int,
    steps: range,
) -> tuple[float, float, int]:
    """Sum of losses, of right answers, and of images over all processes."""
    module.train()
    sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)
    for step in steps:
        torch.manual_seed(derive_seed(plan.seed, epoch, step, fabric.global_rank))  # dropout
        inputs, labels = batches.batch(epoch, step)
        logits = _logits(module, inputs)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()
        correct = (logits.detach().argmax(1) == labels).sum()
        sums[:2] += torch.stack([loss.detach() * len(labels), correct])
        sums[2] += len(labels)
    loss_sum, hits, count = total(fabric, sums).tolist()
    return loss_sum, hits, round(count)


@torch.inference_mode()
def evaluate(fabric: Fabric, module: nn.Module, validation: Validation) -> tuple[float, float]:
    """Mean cross-entropy and accuracy; every process sees all of the images."""
    module.eval()
    loss = correct = 0.0
    for inputs, labels in validation.batches():
        logits = module(inputs).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(validation.labels), correct / len(validation.labels)


def _row(progress: _Progress, i: int, monitor: ConvergenceMonitor) -> Row:
    point = progress.history[i]
    indicator = monitor.update(point.train_loss)
    values = {
        "epoch": point.epoch,
        "train/loss": point.train_loss,
        "train/accuracy": point.train_accuracy,
        "val/loss": point.val_loss,
        "val/accuracy": point.val_accuracy,
        "lr": point.lr,
        "images_per_second": progress.speeds[i],
    }
    if math.isfinite(indicator):
        values["cqi"] = indicator
    return Row(point.point, values, progress.times[i])


def _record(
    fabric: Fabric, folder: Path, network: nn.Module, optimizer: Optimizer, progress: _Progress
) -> None:
    """Weights first: the state names the last point, so its weights must be there."""
    save_weights(point_file(folder, len(progress.history)), network.state_dict(), {})
    history = [asdict(point) for point in progress.history]
    state = {
        "history": history,
        "speeds": progress.speeds,
        "times": progress.times,
        "optimizer": optimizer.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
    }
    save_state(folder / "state.pt", state)


def _resume(folder: Path, network: nn.Module) -> _Progress:
    path = folder / "state.pt"
    if not path.exists():
        return _Progress()
    state = load_state(path)
    history = [Point(**row) for row in state["history"]]
    load_into(network, point_file(folder, len(history)))
    optimizer, precision = state["optimizer"], state.get("precision", {})
    return _Progress(history, state["speeds"], state["times"], optimizer, precision)
