"""Train a span of modules on its own, from stored inputs and targets (arXiv 2506.07188).

Nothing before the span is run, and nothing behind it but where the loss asks for the logits. The
statistics of batch norm do not move, and dropout is off: the span stays in evaluation mode.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR

from fmce_ops.data import Images, to_input
from fmce_ops.errors import ModelError, TrainingError
from fmce_ops.models import save_weights
from fmce_ops.shards import RandomBatches, ShardStore
from fmce_ops.training.reporter import Row
from fmce_ops.training.state import load_state, save_state
from fmce_ops.training.targets import INPUTS, OUTPUTS, OWN, TARGET, VALIDATION, Span

Arm = Literal["untouched", "ce", "anchor", "frp"]
Mode = Literal["mixed", "local", "soft"]
Schedule = Literal["one-cycle", "constant"]
ARMS: tuple[Arm, ...] = ("ce", "anchor", "frp")  # that are trained
_BATCH = 512  # images that are judged at a time
_MEMORY = 0.9  # of the running means that weigh the two parts of the loss
_WEIGHTS = 1e-5, 10.0  # bounds of that weight
_TEMPERATURE = 3.0  # of soft targets, at which the classes beside the label count


@dataclass(frozen=True)
class PosttrainPlan:
    """How every arm is trained, by AdamW.

    Attributes
    ----------
    mode : the loss of ``anchor`` and ``frp``. ``mixed`` is the cross-entropy and the weighted
        squared error of the targets, ``local`` the squared error alone, ``soft`` the
        `soft_loss` of targets that are logits alone.
    schedule : ``one-cycle`` rises to ``lr`` and falls to nothing, batch by batch; ``constant``
        stays there.
    """

    mode: Mode
    epochs: int
    batch_size: int
    lr: float
    schedule: Schedule
    weight_decay: float


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes
    ----------
    arm : ``untouched`` stays as it came in, ``ce`` learns from the labels alone, ``anchor`` has the
        span's own outputs as targets, ``frp`` the targets that came back from the corrected logits.
    alpha : weight of the targets beside the cross-entropy; 0 where they do not stand together.
    """

    arm: Arm
    alpha: float
    seed: int

    @property
    def name(self) -> str:
        """For folders and runs."""
        return f"{self.arm}-{self.alpha:g}-{self.seed}"


@dataclass(frozen=True)
class PosttrainEpoch:
    """One row of a job; epoch 0 is the span as it came in."""

    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    lr: float = 0.0  # of its first step
    images_per_second: float = 0.0
    time: int = 0  # ms since 1970

    @property
    def rank(self) -> tuple[float, float]:
        """As `Judgement.rank`, on validation."""
        return self.val_accuracy, -self.val_loss

    def row(self) -> Row:
        """What a reporter is told."""
        values = {
            "epoch": float(self.epoch),
            "train/loss": self.train_loss,
            "val/loss": self.val_loss,
            "val/accuracy": self.val_accuracy,
            "lr": self.lr,
            "images_per_second": self.images_per_second,
        }
        told = {name: value for name, value in values.items() if value == value}
        return Row(self.epoch, told, self.time)


def check_mode(mode: Mode, span: Span) -> None:
    """See that a span can be trained in a mode.

    Raises
    ------
    ModelError
        Soft targets are logits, and the span does not end with the head, which makes them.
    """
    if mode == "soft" and len(span.behind):
        first = span.name.partition("..")[0]
        raise ModelError(
            f"posttrain.mode is soft, but the span {span.name!r} of posttrain.modules does not "
            f"end with the head, which makes the logits: write '{first}..head', or choose mixed "
            "or local."
        )


def soft_loss(logits: Tensor, target: Tensor) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(logits / T)), the mean over the samples.

    T^2 keeps the size of the gradients (Hinton et al., arXiv 1503.02531).

    Parameters
    ----------
    logits, target : (N, K).
    """
    found, wanted = ((values / _TEMPERATURE).log_softmax(1) for values in (logits, target))
    return _TEMPERATURE**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def jobs(mode: Mode, alphas: tuple[float, ...], seeds: int) -> list[Job]:
    """All trainings of a span: every arm, alpha and seed."""
    weights: dict[Arm, tuple[float, ...]] = {"ce": (0.0,)}
    weights["anchor"] = weights["frp"] = alphas if mode == "mixed" else (0.0,)
    return [
        Job(arm, alpha, seed) for arm in ARMS for alpha in weights[arm] for seed in range(seeds)
    ]


@dataclass(frozen=True)
class Stores:
    """The open stores of a span; a context manager."""

    inputs: ShardStore
    outputs: ShardStore
    validation: ShardStore

    @classmethod
    def open(cls, folder: Path) -> "Stores":
        """Check and open the three stores that `write_targets` made."""
        return cls(*(ShardStore.open(folder / name) for name in (INPUTS, OUTPUTS, VALIDATION)))

    def __enter__(self) -> "Stores":
        return self

    def __exit__(self, *error: object) -> None:
        for store in (self.inputs, self.outputs, self.validation):
            store.close()


@dataclass(frozen=True)
class Judgement:
    """Mean cross-entropy and accuracy on a split."""

    loss: float
    accuracy: float

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: accuracy, of equals the least loss."""
        return self.accuracy, -self.loss


@dataclass
class _State:
    history: list[PosttrainEpoch] = field(default_factory=list)
    means: tuple[float, float] | None = None  # of cross-entropy and squared error
    optimizer: dict[str, Any] = field(default_factory=dict)


def train_span(
    span: Span, stores: Stores, plan: PosttrainPlan, job: Job, folder: Path, device: torch.device
) -> list[PosttrainEpoch]:
    """Train a copy of the span; the weights of its best epoch are in `best_weights`.

    A killed training goes on behind its last epoch and ends with the same bytes.

    Raises
    ------
    TrainingError
        The loss is not finite.
    """
    # Copies of both: what is behind one span is inside the next.
    inside, behind = (copy.deepcopy(p).to(device).eval() for p in (span.inside, span.behind))
    inside.to(memory_format=_layout(device))
    behind.requires_grad_(False)
    state = _resume(folder, inside)
    optimizer = torch.optim.AdamW(
        inside.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, fused=True
    )
    if state.optimizer:
        optimizer.load_state_dict(state.optimizer)
    if not state.history:
        first = _judge_span(inside, behind, stores.validation, device)
        state.history.append(PosttrainEpoch(0, float("nan"), first.loss, first.accuracy))
        _record(folder, inside, optimizer, state)
    schedule = _scheduled(optimizer, plan, stores.inputs.manifest.images, len(state.history) - 1)
    for epoch in range(len(state.history), plan.epochs + 1):
        started, lr = time.perf_counter(), float(schedule.get_last_lr()[0])
        loss = _train_epoch(inside, behind, schedule, stores, plan, job, epoch, state, device)
        speed = stores.inputs.manifest.images / (time.perf_counter() - started)
        found = _judge_span(inside, behind, stores.validation, device)
        if not (np.isfinite(loss) and np.isfinite(found.loss)):
            raise TrainingError(
                f"the loss of {job.name} on {span.name} is not finite at epoch {epoch}: "
                "lower posttrain.lr."
            )
        now = time.time_ns() // 1_000_000
        figures = loss, found.loss, found.accuracy, lr, speed, now
        state.history.append(PosttrainEpoch(epoch, *figures))
        _record(folder, inside, optimizer, state)
    return state.history


def best_weights(folder: Path) -> Path:
    """The weights of a job's best epoch on validation."""
    return folder / "best.safetensors"


def best_of(history: list[PosttrainEpoch]) -> PosttrainEpoch:
    """The best on validation; of equals the first, so that nothing is changed for nothing."""
    return max(history, key=lambda epoch: (*epoch.rank, -epoch.epoch))


def judge_images(
    network: nn.Module, images: Images, split: str, size: int, device: torch.device
) -> Judgement:
    """Judge a whole network on a split; ``size`` is the side in pixels that it sees."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, images.counts[split], _BATCH):
            stop = min(start + _BATCH, images.counts[split])
            pixels, labels = images.read(split, start, stop)
            pixels = pixels.to(device)
            yield to_input(pixels, size=size, mean=images.mean, std=images.std), labels.to(device)

    return _judge(network.to(device).eval(), batches())


def _judge_span(
    inside: nn.Module, behind: nn.Module, store: ShardStore, device: torch.device
) -> Judgement:
    """Judge a network whose part before the span has been run."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for i, maps in enumerate(store.scan(1, _BATCH)):
            labels = store.label[i * _BATCH : i * _BATCH + len(maps)]
            yield _laid_out(torch.from_numpy(maps), device), torch.from_numpy(labels).to(device)

    return _judge(nn.Sequential(inside, behind), batches())


def _laid_out(values: Tensor, device: torch.device) -> Tensor:
    """On the device, feature maps in its layout."""
    form = _layout(device) if values.ndim == 4 else torch.contiguous_format
    return values.to(device).contiguous(memory_format=form)


def _layout(device: torch.device) -> torch.memory_format:
    """That in which convolutions are fastest there."""
    # On a CPU a step of ResNet-18's last stage takes 1.4 times as long with channels last.
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


@torch.inference_mode()
def _judge(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Judgement:
    loss, hits, count = 0.0, 0, 0
    for inputs, labels in batches:
        logits = network(inputs).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        hits += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return Judgement(loss / count, hits / count)


def _scheduled(
    optimizer: torch.optim.Optimizer, plan: PosttrainPlan, images: int, epochs: int
) -> LRScheduler:
    """The rates, a step for each batch; ``epochs`` lie behind."""
    batches = math.ceil(images / plan.batch_size)
    last = epochs * batches - 1
    if plan.schedule == "constant":
        return ConstantLR(optimizer, factor=1.0, last_epoch=last)
    return OneCycleLR(optimizer, plan.lr, plan.epochs * batches, last_epoch=last)


def _train_epoch(
    inside: nn.Module,
    behind: nn.Module,
    schedule: LRScheduler,
    stores: Stores,
    plan: PosttrainPlan,
    job: Job,
    epoch: int,
    state: _State,
    device: torch.device,
) -> float:
    """Mean loss of the epoch."""
    distance = soft_loss if plan.mode == "soft" else F.mse_loss
    images = stores.inputs.manifest.images
    rows = np.stack([np.ones(images, np.int64), np.arange(images)], axis=1)
    total = 0.0
    for batch in RandomBatches(stores.inputs, rows, plan.batch_size, job.seed, epoch):
        outputs = inside(_laid_out(batch.maps, device))
        loss = torch.zeros((), device=device)
        if job.arm != "ce":
            phase = TARGET if job.arm == "frp" else OWN
            wanted = stores.outputs.batch(phase, batch.position.numpy())
            loss = distance(outputs, _laid_out(torch.from_numpy(wanted), device))
        if job.arm == "ce" or plan.mode == "mixed":
            labels = torch.from_numpy(stores.inputs.label[batch.position.numpy()]).to(device)
            entropy = F.cross_entropy(behind(outputs), labels)
            loss = entropy + _weight(job, state, entropy.item(), loss.item()) * loss
        schedule.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        schedule.optimizer.step()
        schedule.step()
        total += loss.item() * len(batch.maps)
    return total / images


def _weight(job: Job, state: _State, entropy: float, error: float) -> float:
    """alpha EMA(CE) / EMA(MSE), bounded (arXiv 2506.07188); 0 for cross-entropy alone."""
    if job.arm == "ce":
        return 0.0
    old = state.means or (entropy, error)
    state.means = (
        _MEMORY * old[0] + (1 - _MEMORY) * entropy,
        _MEMORY * old[1] + (1 - _MEMORY) * error,
    )
    least, most = _WEIGHTS
    ratio = state.means[0] / state.means[1] if state.means[1] > 0 else most
    return min(max(job.alpha * ratio, least), most)


def _record(
    folder: Path, inside: nn.Module, optimizer: torch.optim.Optimizer, state: _State
) -> None:
    """The best weights first, the state last: what the state names is there."""
    if best_of(state.history) is state.history[-1]:
        save_weights(best_weights(folder), inside.state_dict(), {})
    save_state(
        folder / "state.pt",
        {
            "span": inside.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": [asdict(epoch) for epoch in state.history],
            "means": state.means,
        },
    )


def _resume(folder: Path, inside: nn.Module) -> _State:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.pt"
    if not path.exists():
        return _State()
    saved = load_state(path)
    inside.load_state_dict(saved["span"])
    history = [PosttrainEpoch(**row) for row in saved["history"]]
    return _State(history, saved["means"], saved["optimizer"])
