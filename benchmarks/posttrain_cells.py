"""Which targets make a converged network better? Arms beside their controls, several seeds.

python benchmarks/posttrain_cells.py IMAGES.h5 --name "CIFAR-10 x SimpleCNN" --write

prints the table, and with --write keeps it in benchmarks/posttrain_cells.md.

IMAGES.h5 is what the stage prepare writes. Every seed trains a checkpoint of its own; every arm
trains that checkpoint on, as a whole, with the same steps and no augmentation, which the checkpoint
had not either. The epoch is chosen on validation, epoch 0 among them.
"""

import argparse
import copy
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fmce_ops.data import Images, to_input
from fmce_ops.files import write_text
from fmce_ops.reverse import nearest_logits
from fmce_ops.training.comparison import paired
from torch import Tensor, nn

BATCH, RATE, TEMPERATURE, MARGIN = 256, 1e-3, 3.0, 1.0
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, labels, target -> loss
Data = tuple[Tensor, Tensor]


def simple_cnn(classes: int) -> nn.Module:
    """The SimpleCNN of arXiv 2506.07188."""
    return nn.Sequential(
        *[nn.Conv2d(3, 10, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(10, 10, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(10, 10, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Linear(128, classes)],
    )


def soft(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence from softened targets."""
    wanted = (target / TEMPERATURE).softmax(1)
    found = (logits / TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * F.kl_div(found, wanted, reduction="batchmean")


def squared(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the logits."""
    return F.mse_loss(logits, target)


def entropy(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the labels."""
    return F.cross_entropy(logits, labels)


def smoothed(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def arms(logits: Tensor, labels: Tensor) -> dict[str, tuple[Loss, Tensor]]:
    """Every arm's loss and targets, from the checkpoint's logits of the training images."""
    nearest = nearest_logits(logits, labels, MARGIN)
    right = logits.argmax(1) == labels
    means = torch.stack(
        [logits[right & (labels == c)].mean(0) for c in range(logits.shape[1])]
    ).nan_to_num()
    drawn = torch.lerp(nearest, means[labels], 0.5)
    return {
        "ce": (entropy, logits),
        "ce, smoothed labels": (smoothed, logits),
        "anchor, soft": (soft, logits),
        "nearest, soft": (soft, nearest),
        "nearest, squared": (squared, nearest),
        "drawn to the class mean, soft": (soft, drawn),
        "drawn to the class mean, squared": (squared, drawn),
    }


def fit(
    network: nn.Module,
    train: Data,
    val: Data,
    loss: Loss,
    target: Tensor | None,
    epochs: int,
    seed: int,
) -> tuple[int, dict[str, Tensor]]:
    """One-cycle AdamW; the best epoch on validation and its weights."""
    steps = len(train[0]) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * steps)
    best = (0, accuracy(network, val), copy.deepcopy(network.state_dict()))
    for epoch in range(1, epochs + 1):
        order = torch.randperm(
            len(train[0]), generator=torch.Generator().manual_seed(1000 * seed + epoch)
        )
        network.train()
        for rows in order.split(BATCH)[:steps]:
            logits = network(train[0][rows])
            value = loss(logits, train[1][rows], logits if target is None else target[rows])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            cycle.step()
        found = accuracy(network, val)
        if found > best[1]:
            best = (epoch, found, copy.deepcopy(network.state_dict()))
    return best[0], best[2]


@torch.inference_mode()
def outputs(network: nn.Module, inputs: Tensor) -> Tensor:
    """All logits."""
    network.eval()
    return torch.cat([network(part) for part in inputs.split(1024)])


def accuracy(network: nn.Module, data: Data) -> float:
    """Share of right answers."""
    return float((outputs(network, data[0]).argmax(1) == data[1]).double().mean())


def study(images: Images, seeds: int, pretrain: int, epochs: int) -> dict[str, list[float]]:
    """Test accuracy of every arm and seed."""
    splits = {name: load(images, name) for name in ("train", "val", "test")}
    train, val, test = splits["train"], splits["val"], splits["test"]
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = simple_cnn(len(images.classes))
        network(train[0][:2])
        _, state = fit(network, train, val, entropy, None, pretrain, 100 + seed)
        network.load_state_dict(state)
        found.setdefault("untouched", []).append(accuracy(network, test))
        logits = outputs(network, train[0]).clone()
        for name, (loss, target) in arms(logits, train[1]).items():
            arm = copy.deepcopy(network)
            epoch, state = fit(arm, train, val, loss, target, epochs, seed)
            arm.load_state_dict(state)
            found.setdefault(name, []).append(accuracy(arm, test))
            print(f"seed {seed} {name}: epoch {epoch}, test {found[name][-1]:.4f}", flush=True)
    return found


def load(images: Images, split: str) -> Data:
    """Inputs of the network and labels."""
    pixels, labels = images.load(split)
    inputs = to_input(pixels, size=images.side, mean=images.mean, std=images.std)
    return inputs, labels


def table(name: str, images: Images, found: dict[str, list[float]], options: str) -> str:
    """Markdown of one cell."""
    rows = []
    for arm, values in found.items():
        cells = [f"{100 * sum(values) / len(values):.2f}"]
        for control in ("untouched", "ce", "anchor, soft"):
            gain = paired(values, found[control])
            same = arm == control or gain.low is None
            cells.append("" if same else words(gain.mean, gain.low, gain.high))
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    counts = images.counts
    head = f"## {name}\n\n{counts['train']} training, {counts['val']} validation, "
    head += f"{counts['test']} test images; {options}; {platform.machine()}, torch "
    head += f"{torch.__version__}. Test accuracy in %, paired gains in points with their 95 % "
    head += "intervals.\n\n| arm | test | over untouched | over ce | over anchor, soft |\n"
    return head + "|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def words(mean: float, low: float, high: float) -> str:
    """A gain with its interval, in points; bold where the interval is above zero."""
    text = f"{100 * mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    return f"**{text}**" if low > 0 else text


def keep(path: Path, name: str, text: str) -> None:
    """Replace the cell's section, or add it."""
    whole = path.read_text() if path.exists() else "# Post-training: cells\n\n"
    section = re.compile(rf"## {re.escape(name)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    whole = section.sub("", whole).rstrip() + "\n\n" + text
    write_text(path, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pretrain", type=int, default=25, help="epochs of the checkpoint")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="keep the table in the .md file")
    given = parser.parse_args()
    with Images.open(given.images) as images:
        found = study(images, given.seeds, given.pretrain, given.epochs)
        options = f"{given.seeds} seeds, {given.pretrain} + {given.epochs} epochs"
        text = table(given.name, images, found, options)
    print(text)
    if given.write:
        keep(Path(__file__).with_suffix(".md"), given.name, text)


if __name__ == "__main__":
    main()
