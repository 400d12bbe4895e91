"""Train FMCE-Net: from a feature map to the phase that made it (arXiv 2405.04041, section III.D).

The epoch is chosen on validation maps, and only that epoch is judged on the test maps. All K maps
of an image are on one side of every split, unless the paper's split over maps is asked for.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from fmce_ops.convergence import cqi
from fmce_ops.errors import TrainingError
from fmce_ops.models import FmceNet, load_into, save_weights
from fmce_ops.shards import Batch, RandomBatches, ShardStore
from fmce_ops.training.devices import same_start, total
from fmce_ops.training.metrics import confusion
from fmce_ops.training.reporter import Reporter, Row
from fmce_ops.training.state import load_state, save_state


@dataclass(frozen=True)
class FmcePlan:
    """How to train FMCE-Net: Adam, half a cosine over the epochs."""

    epochs: int
    batch_size: int
    lr: float
    seed: int

    def learning_rate(self, epoch: int) -> float:
        """Of the 0-based ``epoch``."""
        return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


@dataclass(frozen=True)
class Epoch:
    """One row of ``fmce.csv``."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    lr: float


@dataclass
class _Progress:
    history: list[Epoch] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)  # maps per s, share of waiting
    times: list[int] = field(default_factory=list)  # ms since 1970
    optimizer: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)  # the scale of half precision


def train_fmce(
    fabric: Fabric,
    network: FmceNet,
    store: ShardStore,
    train_rows: NDArray[np.int64],
    val_rows: NDArray[np.int64],
    plan: FmcePlan,
    folder: Path,
    reporter: Reporter,
) -> list[Epoch]:
    """Train, and leave the weights of the epoch that is best on validation in ``network``.

    Parameters
    ----------
    train_rows, val_rows : (n, 2) rows (phase 1..K, image position) of the store.
    folder : where a killed run finds its last and best epoch.

    Raises
    ------
    TrainingError
        The loss is not finite, the batch cannot be shared, or processes do not see the same
        ``folder``.
    """
    if plan.batch_size % fabric.world_size:
        raise TrainingError(
            f"fmce.batch_size is {plan.batch_size}, which {fabric.world_size} processes cannot "
            f"share evenly: choose a multiple of {fabric.world_size}."
        )
    progress = _resume(folder, network)
    same_start(fabric, len(progress.history), folder)
    # On its device before the optimizer's state is loaded, which follows the weights there.
    network.to(fabric.device)
    if fabric.device.type == "cuda":  # maps are small: on a CPU channels_last only copies weights
        network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=plan.lr, fused=True)
    if progress.optimizer:
        optimizer.load_state_dict(progress.optimizer)
    if progress.precision:
        fabric.strategy.precision.load_state_dict(progress.precision)
    module, optimizer = fabric.setup(network, optimizer)
    reporter.begin("fmce", plan.epochs)
    for i in range(len(progress.history)):
        reporter.row(replace(_row(progress, i), again=True))
    for epoch in range(len(progress.history), plan.epochs):
        rows = (train_rows, val_rows)
        _train_epoch(fabric, module, optimizer, store, rows, plan, epoch, progress)
        if fabric.is_global_zero:
            _record(fabric, folder, network, optimizer, progress)
        reporter.row(_row(progress, epoch))
    fabric.barrier()
    load_into(network, folder / "best.safetensors")
    return progress.history


def best_epoch(history: list[Epoch]) -> Epoch:
    """The most accurate on validation; of equals the one with the least loss."""
    return min(history, key=lambda epoch: (-epoch.val_accuracy, epoch.val_loss))


@torch.inference_mode()
def judge(
    fabric: Fabric, module: nn.Module, store: ShardStore, rows: NDArray[np.int64], batch_size: int
) -> tuple[NDArray[np.int64], float]:
    """(K, K) confusion counts and mean cross-entropy of the rows; each process reads its share."""
    module.eval()
    phases = store.manifest.phases
    counts = torch.zeros(phases, phases, dtype=torch.int64, device=fabric.device)
    loss = torch.zeros((), dtype=torch.float64, device=fabric.device)
    mine = rows[fabric.global_rank :: fabric.world_size]
    mine = mine[np.lexsort((mine[:, 1], mine[:, 0]))]  # in the order of the disk
    for start in range(0, len(mine), batch_size):
        part = mine[start : start + batch_size]
        maps = fabric.to_device(torch.from_numpy(store.batch(part[:, 0], part[:, 1])))
        scores = fabric.to_device(torch.from_numpy(part[:, 0] - 1))
        logits = module(maps).float()
        counts += confusion(scores, logits.argmax(1), phases)
        loss += F.cross_entropy(logits, scores, reduction="sum").double()
    return total(fabric, counts).cpu().numpy(), float(total(fabric, loss)) / len(rows)


def _train_epoch(
    fabric: Fabric,
    module: nn.Module,
    optimizer: Optimizer,
    store: ShardStore,
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    plan: FmcePlan,
    epoch: int,
    progress: _Progress,
) -> None:
    train_rows, val_rows = rows
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate(epoch)
    started = time.perf_counter()
    share = plan.batch_size // fabric.world_size
    mine = _share(train_rows, fabric)
    batches = RandomBatches(store, mine, batch_size=share, seed=plan.seed, epoch=epoch)
    loss_sum, hits, count = _train_steps(fabric, module, optimizer, batches)
    elapsed = time.perf_counter() - started
    matrix, val_loss = judge(fabric, module, store, val_rows, plan.batch_size)
    if not (math.isfinite(loss_sum) and math.isfinite(val_loss)):
        raise TrainingError(
            f"the loss of FMCE-Net at epoch {epoch + 1} is not finite "
            f"({epoch} epochs are kept): lower fmce.lr."
        )
    accuracy = float(np.trace(matrix) / matrix.sum())
    lr = plan.learning_rate(epoch)
    progress.history.append(
        Epoch(epoch + 1, loss_sum / count, hits / count, val_loss, accuracy, lr)
    )
    progress.rates.append((count / elapsed, batches.waited / elapsed))
    progress.times.append(time.time_ns() // 1_000_000)


def _share(rows: NDArray[np.int64], fabric: Fabric) -> NDArray[np.int64]:
    """Every process gets equally many rows, or the others would wait for ever at the last step."""
    whole = len(rows) // fabric.world_size * fabric.world_size
    return rows[fabric.global_rank : whole : fabric.world_size]


def _train_steps(
    fabric: Fabric,
    module: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
) -> tuple[float, float, int]:
    """Sum of losses, of right answers, and of maps over all processes."""
    module.train()
    sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)
    for batch in batches:
        maps, scores = fabric.to_device(batch.maps), fabric.to_device(batch.phase - 1)
        logits = module(maps)
        loss = F.cross_entropy(logits, scores)
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()
        correct = (logits.detach().argmax(1) == scores).sum()
        sums[:2] += torch.stack([loss.detach().double() * len(scores), correct])
        sums[2] += len(scores)
    loss_sum, hits, count = total(fabric, sums).tolist()
    return loss_sum, hits, round(count)


def _row(progress: _Progress, i: int) -> Row:
    epoch, (speed, waited) = progress.history[i], progress.rates[i]
    values = {
        "epoch": float(epoch.epoch),
        "train/loss": epoch.train_loss,
        "train/accuracy": epoch.train_accuracy,
        "val/loss": epoch.val_loss,
        "val/accuracy": epoch.val_accuracy,
        "lr": epoch.lr,
        "images_per_second": speed,
        "data_wait_share": waited,
    }
    indicator = cqi([done.train_loss for done in progress.history[: i + 1]])[-1]
    if math.isfinite(indicator):
        values["cqi"] = float(indicator)
    return Row(epoch.epoch, values, progress.times[i])


def _record(
    fabric: Fabric, folder: Path, network: nn.Module, optimizer: Optimizer, progress: _Progress
) -> None:
    """The best weights first, the state last: what the state names is there."""
    newest = progress.history[-1]
    if best_epoch(progress.history) is newest:
        save_weights(folder / "best.safetensors", network.state_dict(), {})
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "precision": fabric.strategy.precision.state_dict(),
        "history": [asdict(epoch) for epoch in progress.history],
        "rates": progress.rates,
        "times": progress.times,
    }
    save_state(folder / "state.pt", state)


def _resume(folder: Path, network: nn.Module) -> _Progress:
    path = folder / "state.pt"
    if not path.exists():
        return _Progress()
    state = load_state(path)
    network.load_state_dict(state["network"])
    history = [Epoch(**row) for row in state["history"]]
    optimizer, precision = state["optimizer"], state.get("precision", {})
    return _Progress(history, state["rates"], state["times"], optimizer, precision)
