"""Train the gates of a network together with its filters (arXiv 1906.01166, section 3).

A killed training goes on behind its last epoch and ends with the same bytes.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from fmce_ops.data import TrainBatches, derive_seed
from fmce_ops.errors import TrainingError
from fmce_ops.pathways import (
    PARTS,
    Controller,
    Costs,
    PathLoss,
    Weights,
    forced,
    gated_layers,
    needed_filters,
    recorded,
    split_code,
)
from fmce_ops.training.classifier import Validation
from fmce_ops.training.devices import total
from fmce_ops.training.reporter import Reporter, Row
from fmce_ops.training.state import load_state, save_state

_log = logging.getLogger(__name__)
_NEEDED = 0.02  # of all filters are switched off for a class
_SETTLING = 32  # batches that give batch norm its statistics
_DRAWS = 3  # of as many filters at random


@dataclass(frozen=True)
class PathPlan:
    """How a network and its gates are trained.

    Attributes
    ----------
    optimizer : ``sgd`` (with momentum, as published) or ``adam``, which needs far fewer steps to
        close a gate.
    lr, gate_lr : of the network, and of the controllers with the readings of their gates.
    schedule : ``cosine``, ``steps`` (a tenth after a half and after three quarters of the epochs)
        or ``constant``.
    """

    epochs: int
    optimizer: Literal["sgd", "adam"]
    lr: float
    gate_lr: float
    weight_decay: float
    schedule: Literal["cosine", "steps", "constant"]
    weights: Weights
    seed: int

    def decay(self, epoch: int) -> float:
        """What both rates are multiplied by in the 0-based ``epoch``."""
        done = epoch / self.epochs
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        if self.schedule == "steps":
            return 0.1 ** ((done >= 0.5) + (done >= 0.75))
        return 1.0


@dataclass(frozen=True)
class PathEpoch:
    """One epoch.

    Attributes
    ----------
    parts : of the training loss, without their weights.
    open : share of open gates of each layer on validation.
    multiply_adds : mean over validation images, with their controllers where gates can change.
    """

    epoch: int
    train_loss: float
    parts: Mapping[str, float]
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    open: Mapping[str, float]
    multiply_adds: float
    lr: float
    images_per_second: float
    time: int  # ms since 1970

    def row(self) -> Row:
        """What a reporter is told."""
        values = {
            "epoch": float(self.epoch),
            "train/loss": self.train_loss,
            "train/accuracy": self.train_accuracy,
            "val/loss": self.val_loss,
            "val/accuracy": self.val_accuracy,
            "multiply_adds": self.multiply_adds,
            "lr": self.lr,
            "images_per_second": self.images_per_second,
        }
        values |= {f"train/{name}": value for name, value in self.parts.items()}
        values |= {f"open/{name}": share for name, share in self.open.items()}
        return Row(self.epoch, values, self.time)


@dataclass
class _Progress:
    history: list[PathEpoch] = field(default_factory=list)
    optimizer: dict[str, Any] = field(default_factory=dict)


class _Decoupled(nn.Module):
    """The gated network with its loss, so that all that learns is in one module."""

    def __init__(self, network: nn.Module, loss: PathLoss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the parts of the loss."""
        with recorded(self.network) as layers:
            logits = self.network(inputs)
            return logits, self.loss(logits, labels, layers)


def train_paths(
    fabric: Fabric,
    network: nn.Module,
    classes: int,
    batches: TrainBatches,
    validation: Validation,
    costs: Costs,
    plan: PathPlan,
    folder: Path,
    reporter: Reporter,
) -> list[PathEpoch]:
    """Train what `fmce_ops.pathways.attach` returned; the last epoch's weights stay in it.

    Parameters
    ----------
    costs : of the network, from `fmce_ops.pathways.measure_costs`.
    folder : where a killed training finds its last epoch.

    Raises
    ------
    TrainingError
        The loss is not finite.
    """
    torch.manual_seed(derive_seed(plan.seed))
    filters = [gated.conv.out_channels for gated in gated_layers(network).values()]
    decoupled = _Decoupled(network, PathLoss(filters, classes, plan.weights))
    progress = _resume(folder, decoupled)
    decoupled.to(fabric.device).to(memory_format=torch.channels_last)
    optimizer = _optimizer(decoupled, plan)
    if progress.optimizer:
        optimizer.load_state_dict(progress.optimizer)
    module, optimizer = fabric.setup(decoupled, optimizer)
    reporter.begin("pathways", plan.epochs)
    for epoch in progress.history:
        reporter.row(replace(epoch.row(), again=True))
    for number in range(len(progress.history) + 1, plan.epochs + 1):
        trained = _train_epoch(fabric, module, decoupled.loss, optimizer, batches, plan, number)
        settle(network, batches, number)
        progress.history.append(_judged(fabric, network, validation, costs, plan, number, trained))
        if fabric.is_global_zero:
            _record(folder, decoupled, optimizer, progress)
        reporter.row(progress.history[-1].row())
    network.to(memory_format=torch.contiguous_format).eval()
    return progress.history


def _optimizer(decoupled: _Decoupled, plan: PathPlan) -> Optimizer:
    gates = [p for g in gated_layers(decoupled.network).values() for p in g.controller.parameters()]
    gates += decoupled.loss.parameters()
    known = set(gates)
    groups = [[p for p in decoupled.parameters() if p not in known], gates]
    params = [{"params": group} for group in groups]
    if plan.optimizer == "adam":
        return torch.optim.AdamW(params, weight_decay=plan.weight_decay, fused=True)
    return torch.optim.SGD(
        params, lr=plan.lr, momentum=0.9, weight_decay=plan.weight_decay, fused=True
    )


@dataclass(frozen=True)
class _Trained:
    loss: float
    parts: dict[str, float]
    accuracy: float
    images_per_second: float


def _train_epoch(
    fabric: Fabric,
    module: nn.Module,
    path_loss: PathLoss,
    optimizer: Optimizer,
    batches: TrainBatches,
    plan: PathPlan,
    epoch: int,
) -> _Trained:
    module.train()
    for group, rate in zip(optimizer.param_groups, (plan.lr, plan.gate_lr), strict=True):
        group["lr"] = rate * plan.decay(epoch - 1)
    started = time.perf_counter()
    sums = torch.zeros(len(PARTS) + 3, dtype=torch.float64, device=fabric.device)
    for step in range(batches.steps):
        torch.manual_seed(derive_seed(plan.seed, epoch, step, fabric.global_rank))  # gates' noise
        inputs, labels = batches.batch(epoch, step)
        logits, parts = module(inputs, labels)
        loss = path_loss.total(parts)
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()
        hits = (logits.detach().argmax(1) == labels).sum()
        count = len(labels)
        sums[:-2] += torch.cat([parts.detach(), loss.detach()[None]]) * count
        sums[-2:] += torch.stack([hits, hits.new_tensor(count)])
    *means, hits_sum, images = total(fabric, sums).tolist()
    *each, loss_mean = (value / images for value in means)
    speed = images / (time.perf_counter() - started)
    return _Trained(loss_mean, dict(zip(PARTS, each, strict=True)), hits_sum / images, speed)


@torch.no_grad()
def settle(network: nn.Module, batches: TrainBatches, epoch: int) -> None:
    """Take the statistics of batch norm anew, with every gate as it is outside training.

    Soft and noisy gates in front of a norm shift what it sees; without this the network answers
    worse than it has learnt to.
    """
    network.eval()
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the plain mean over the batches
    for step in range(min(_SETTLING, batches.steps)):
        network(batches.batch(epoch, step)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def _judged(
    fabric: Fabric,
    network: nn.Module,
    validation: Validation,
    costs: Costs,
    plan: PathPlan,
    epoch: int,
    trained: _Trained,
) -> PathEpoch:
    loss, accuracy, codes = judge_paths(network, validation)
    if not (math.isfinite(trained.loss) and math.isfinite(loss)):
        raise TrainingError(
            f"the loss of the gates at epoch {epoch} is not finite (training {trained.loss}, "
            f"validation {loss}): lower pathways.lr."
        )
    shares = {name: float(part.float().mean()) for name, part in split_code(network, codes).items()}
    for name, share in shares.items():
        if share == 0 and fabric.is_global_zero:
            _log.warning("all gates of %s are closed at epoch %d for every image", name, epoch)
    return PathEpoch(
        epoch,
        trained.loss,
        trained.parts,
        trained.accuracy,
        loss,
        accuracy,
        shares,
        float(costs.multiply_adds(codes, controllers=_chooses(network)).double().mean()),
        plan.lr * plan.decay(epoch - 1),
        trained.images_per_second,
        time.time_ns() // 1_000_000,
    )


def _chooses(network: nn.Module) -> bool:
    """Whether its gates depend on the image."""
    return any(isinstance(g.controller, Controller) for g in gated_layers(network).values())


@torch.inference_mode()
def judge_paths(network: nn.Module, images: Validation) -> tuple[float, float, Tensor]:
    """Mean cross-entropy, accuracy, and the codes (N, gates) bool of the images."""
    network.eval()
    loss, hits, codes = 0.0, 0, list[Tensor]()
    with recorded(network) as layers:
        for inputs, labels in images.batches():
            logits = network(inputs).float()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            hits += int((logits.argmax(1) == labels).sum())
            codes.append(torch.cat([layer.gates > 0 for layer in layers.values()], 1).cpu())
    count = len(images.labels)
    return loss / count, hits / count, torch.cat(codes)


def _record(folder: Path, module: nn.Module, optimizer: Optimizer, progress: _Progress) -> None:
    state = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": [asdict(epoch) for epoch in progress.history],
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_state(folder / "state.pt", state)


def _resume(folder: Path, module: nn.Module) -> _Progress:
    path = folder / "state.pt"
    if not path.exists():
        return _Progress()
    state = load_state(path)
    module.load_state_dict(state["module"])
    return _Progress([PathEpoch(**row) for row in state["history"]], state["optimizer"])


@torch.inference_mode()
def class_accuracies(network: nn.Module, images: Validation, classes: int) -> Tensor:
    """(K,) share of right answers of each class; NaN for a class without images."""
    found = [(network(inputs).argmax(1), labels) for inputs, labels in images.batches()]
    guesses, labels = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    hits = torch.bincount(labels[guesses == labels], minlength=classes)
    return hits / torch.bincount(labels, minlength=classes)


@dataclass(frozen=True)
class Need:
    """What a class and the others lose when filters are switched off, in share of right answers.

    Attributes
    ----------
    filters : how many were switched off.
    own, others : accuracy of the class and mean accuracy of the others: before, without the filters
        that the class needs, without as many of the same layers drawn from those that it opens.
    """

    label: int
    filters: int
    own: tuple[float, float, float]
    others: tuple[float, float, float]


def confirm_needed(network: nn.Module, found: Tensor, images: Validation, seed: int) -> list[Need]:
    """For each class switch off the filters that it needs, and as many that it opens, and judge.

    Parameters
    ----------
    found : (K, gates) `fmce_ops.pathways.profiles`.
    """
    network.eval()
    before = class_accuracies(network, images, len(found))
    return [_confirm(network, found, label, images, seed, before) for label in range(len(found))]


def _confirm(
    network: nn.Module, found: Tensor, label: int, images: Validation, seed: int, before: Tensor
) -> Need:
    classes, gates = found.shape
    needed = needed_filters(found, label, max(1, round(_NEEDED * gates)))
    draw = torch.Generator().manual_seed(derive_seed(seed, label))
    drawn = [_drawn_alike(network, found[label] >= 0.5, needed, draw) for _ in range(_DRAWS)]
    judged = [before]
    for closed in [needed, *drawn]:
        with forced(network, torch.ones(gates).index_fill_(0, closed, 0)):
            judged.append(class_accuracies(network, images, classes))
    own = [float(each[label]) for each in judged]
    rest = [float(each[torch.arange(classes) != label].nanmean()) for each in judged]
    return Need(label, len(needed), _three(own), _three(rest))


def _drawn_alike(
    network: nn.Module, candidates: Tensor, like: Tensor, draw: torch.Generator
) -> Tensor:
    """Numbers of as many gates of each layer as ``like`` has, drawn from ``candidates``."""
    numbers = split_code(network, torch.arange(len(candidates)))
    drawn = []
    for layer in numbers.values():
        mine = layer[candidates[layer]]
        count = int(torch.isin(layer, like).sum())
        drawn.append(mine[torch.randperm(len(mine), generator=draw)[:count]])
    return torch.cat(drawn)


def _three(values: list[float]) -> tuple[float, float, float]:
    return values[0], values[1], sum(values[2:]) / len(values[2:])
