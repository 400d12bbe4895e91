"""Which targets make a converged network better? Arms beside their controls, several seeds.

python benchmarks/posttrain_cells.py IMAGES.h5 --network simple_cnn --name "CIFAR-10" --write

prints the table, and with --write keeps it in benchmarks/posttrain_cells.md.

IMAGES.h5 is what the stage prepare writes; a GPU is used where there is one. Every seed trains a
checkpoint of its own; every arm trains that checkpoint on, as a whole, with the same steps and no
augmentation, which the checkpoint had not either, and with the statistics of batch norm at rest,
but for the arms that take them anew after each epoch. The epoch is chosen on validation, epoch 0
among them, and so is the target of the cell: the one whose validation accuracy is greatest in the
mean of the seeds. Test images have no say in either.
"""

import argparse
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from fmce_ops.data import Images, to_input
from fmce_ops.files import write_text
from fmce_ops.models import build
from fmce_ops.reverse import nearest_logits, reverse
from fmce_ops.training.comparison import paired
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from machine import commit, processor

PRETRAIN_RATE, TEMPERATURE = 2e-3, 3.0
AT_ONCE = 1024  # images that are judged together
CONTROLS = ("untouched", "ce", "anchor, soft")
SMOOTHED = "ce, smoothed labels"  # no target of the method, and so not to be chosen
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Data:
    """Inputs of the network (N, 3, H, W) and labels (N,)."""

    inputs: Tensor
    labels: Tensor


class Network(nn.Module):
    """A body that makes features and a head that makes logits of them."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits."""
        features = self.body(images)
        return features, self.head(features)


# features, logits, labels, target -> one loss for each sample
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """A way to train on: what every sample's loss is, towards which target, of which weight.

    ``anew``: the statistics of batch norm are taken anew after each epoch.
    """

    loss: Loss
    target: Tensor
    weight: Tensor | None = None
    anew: bool = False


def simple_cnn(classes: int, side: int) -> Network:
    """The SimpleCNN of arXiv 2506.07188."""
    body = nn.Sequential(
        *[nn.Conv2d(3, 10, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(10, 10, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(10, 10, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(10 * (side // 4) ** 2, 128), nn.ReLU()],
    )
    return Network(body, nn.Linear(128, classes))


def simple_cnn_maps(classes: int, side: int) -> Network:
    """The same with its boundary behind the convolutions: the head has a hidden layer."""
    made = simple_cnn(classes, side)
    return Network(nn.Sequential(*made.body[:-3]), nn.Sequential(*made.body[-3:], made.head))


def shufflenet(classes: int, side: int) -> Network:
    """ShuffleNet V2 x0.5 with the small stem."""
    found = build("shufflenet_v2_x0_5", classes, stem="small", in_size=side)
    return Network(found.backbone, found.head).to(memory_format=torch.channels_last)


def resnet18(classes: int, side: int, first: int = 16) -> Network:
    """ResNet-18 at a quarter of its width, with the stem of the CIFAR networks."""
    made = ResNet(BasicBlock, [2, 2, 2, 2])
    made.inplanes = first
    layers = [
        made._make_layer(BasicBlock, first * 2**k, 2, stride=1 if k == 0 else 2) for k in range(4)
    ]
    body = nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU(), *layers
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * first, classes))
    return Network(body, head).to(memory_format=torch.channels_last)


def resnet18_full(classes: int, side: int) -> Network:
    """The same at its full width."""
    return resnet18(classes, side, first=64)


NETWORKS = {
    "simple_cnn": simple_cnn,
    "simple_cnn_maps": simple_cnn_maps,
    "shufflenet": shufflenet,
    "resnet18": resnet18,
    "resnet18_full": resnet18_full,
}


def soft(features: Tensor, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the softened target logits."""
    wanted, found = (target / TEMPERATURE).softmax(1), (logits / TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * F.kl_div(found, wanted, reduction="none").sum(1)


def squared(features: Tensor, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Squared error of the logits."""
    return (logits - target).square().mean(1)


def entropy(features: Tensor, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with the labels."""
    return F.cross_entropy(logits, labels, reduction="none")


def smoothed(features: Tensor, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)


def mixed(features: Tensor, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy beside the squared error of the features, both of the same size."""
    plain = entropy(features, logits, labels, target)
    error = (features - target).square().flatten(1).mean(1)
    weight = (plain.mean() / error.mean().clamp_min(1e-12)).detach().clamp(1e-5, 10)
    return plain + weight * error


def class_means(values: Tensor, labels: Tensor, right: Tensor) -> Tensor:
    """For every sample the mean of the correctly classified samples of its class."""
    means = values.new_zeros(int(labels.max()) + 1, *values.shape[1:])
    for label in range(len(means)):
        chosen = right & (labels == label)
        if chosen.any():
            means[label] = values[chosen].mean(0)
    return means[labels]


def arms(
    network: Network,
    train: Data,
    folds: Tensor,
    earlier: Tensor,
) -> dict[str, Arm]:
    """Every arm, from the logits of the checkpoint, of the folds' and of earlier checkpoints."""
    features, logits = outputs(network, train.inputs)
    labels = train.labels

    def drawn(source: Tensor, margin: float = 1.0, share: float = 0.5) -> Tensor:
        """Corrected logits, drawn to the mean of their class."""
        right = source.argmax(1) == labels
        corrected = nearest_logits(source, labels, margin)
        return torch.lerp(corrected, class_means(source, labels, right), share)

    def back(target: Tensor) -> Tensor:
        """The features that make the logits of the target."""
        parts = zip(target.split(AT_ONCE), features.split(AT_ONCE), strict=True)
        return torch.cat([reverse(network.head, *part).x for part in parts])

    nearest = nearest_logits(logits, labels, 1.0)
    pushed = back(nearest)
    means = class_means(features, labels, logits.argmax(1) == labels)
    doubt = 1 - logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return {
        "ce": Arm(entropy, logits),
        SMOOTHED: Arm(smoothed, logits),
        "anchor, soft": Arm(soft, logits),
        "nearest, soft": Arm(soft, nearest),
        "nearest, margin 4, soft": Arm(soft, nearest_logits(logits, labels, 4.0)),
        "nearest, squared": Arm(squared, nearest),
        "drawn to the class mean, soft": Arm(soft, drawn(logits)),
        "drawn, soft, batch norm anew": Arm(soft, drawn(logits), anew=True),
        "drawn, squared": Arm(squared, drawn(logits)),
        "drawn, soft, weighted by doubt": Arm(soft, drawn(logits), 0.5 + doubt / doubt.mean()),
        "features of the nearest, mixed": Arm(mixed, pushed),
        "features drawn to the class mean, mixed": Arm(mixed, torch.lerp(pushed, means, 0.5)),
        "features of the drawn logits, mixed": Arm(mixed, back(drawn(logits))),
        "held-out folds, uncorrected, soft": Arm(soft, folds),
        "held-out folds, drawn, soft": Arm(soft, drawn(folds)),
        "mean of earlier checkpoints, uncorrected, soft": Arm(soft, earlier),
        "mean of earlier checkpoints, drawn, soft": Arm(soft, drawn(earlier)),
        "mean of folds and checkpoint, uncorrected, soft": Arm(soft, (folds + logits) / 2),
        "mean of folds and checkpoint, drawn, soft": Arm(soft, drawn((folds + logits) / 2)),
    }


@dataclass(frozen=True)
class Score:
    """Shares of right answers."""

    val: float
    test: float


@dataclass(frozen=True)
class Steps:
    """How long, at which greatest rate and with how many images a step."""

    epochs: int
    rate: float
    batch: int


def epochs_of(
    network: Network, train: Data, arm: Arm | None, steps: Steps, seed: int
) -> Iterator[None]:
    """Train with one-cycle AdamW; one step of the iterator is an epoch.

    Without an arm the network learns from the labels, and its batch norm from the images.
    """
    pieces = max(1, len(train.labels) // steps.batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=steps.rate, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, steps.rate, steps.epochs * pieces)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps.epochs):
        network.train(arm is None)
        order = torch.randperm(len(train.labels), generator=generator).to(DEVICE)
        for rows in order.chunk(pieces):
            features, logits = network(train.inputs[rows])
            labels = train.labels[rows]
            if arm is None:
                loss = F.cross_entropy(logits, labels)
            else:
                loss = arm.loss(features, logits, labels, arm.target[rows])
                loss = (loss if arm.weight is None else loss * arm.weight[rows]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cycle.step()
        if arm and arm.anew:
            take_anew(network, train.inputs)
        yield


@torch.no_grad()
def take_anew(network: Network, inputs: Tensor) -> None:
    """Means and variances of batch norm over all inputs."""
    network.train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the plain mean over batches
    for batch in inputs.split(AT_ONCE):
        network(batch)


@torch.inference_mode()
def _outputs(network: Network, inputs: Tensor) -> tuple[Tensor, Tensor]:
    parts = [network(part) for part in inputs.split(AT_ONCE)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def outputs(network: Network, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """All features and logits."""
    features, logits = _outputs(network.eval(), inputs)
    return features.clone(), logits.clone()


def accuracy(network: Network, data: Data) -> float:
    """Share of right answers."""
    _, logits = outputs(network, data.inputs)
    return float((logits.argmax(1) == data.labels).double().mean())


def pretrain(
    make: Callable[[], Network], train: Data, val: Data, steps: Steps, seed: int
) -> tuple[Network, Tensor]:
    """The checkpoint that is best on validation; mean logits of the last third of the epochs."""
    torch.manual_seed(seed)
    network = make().to(DEVICE)
    best, state, earlier = -1.0, network.state_dict(), []
    for epoch, _ in enumerate(epochs_of(network, train, None, steps, seed)):
        found = accuracy(network, val)
        if found > best:
            best, state = found, copy.deepcopy(network.state_dict())
        if epoch >= steps.epochs - max(1, steps.epochs // 3):
            earlier.append(outputs(network, train.inputs)[1])
    network.load_state_dict(state)
    return network, torch.stack(earlier).mean(0)


def held_out(
    make: Callable[[], Network], train: Data, val: Data, steps: Steps, seed: int, folds: int
) -> Tensor:
    """Logits of every training image by a network that was not trained on it."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    fold, logits = (order % folds).to(DEVICE), torch.empty(0)
    for number in range(folds):
        rest = fold != number
        part = Data(train.inputs[rest], train.labels[rest])
        network, _ = pretrain(make, part, val, steps, seed + number)
        found = outputs(network, train.inputs[~rest])[1]
        logits = logits if len(logits) else found.new_empty(len(fold), found.shape[1])
        logits[~rest] = found
    return logits


def study(
    images: Images,
    counts: dict[str, int],
    make: Callable[[], Network],
    seeds: range,
    before: Steps,
    steps: Steps,
    folds: int,
    only: list[str],
) -> dict[str, list[Score]]:
    """Scores of every arm and seed; of all arms, or of the controls and those named."""
    train, val, test = (load(images, split, few) for split, few in counts.items())
    found: dict[str, list[Score]] = {}
    for seed in seeds:
        network, earlier = pretrain(make, train, val, before, 100 + seed)
        unseen = held_out(make, train, val, before, 1000 + 10 * seed, folds)
        incoming = Score(accuracy(network, val), accuracy(network, test))
        found.setdefault("untouched", []).append(incoming)
        for name, arm in arms(network, train, unseen, earlier).items():
            if only and name not in only and name not in CONTROLS:
                continue
            trained, best, state = copy.deepcopy(network), incoming.val, None
            for _ in epochs_of(trained, train, arm, steps, seed):
                now = accuracy(trained, val)
                if now > best:
                    best, state = now, copy.deepcopy(trained.state_dict())
            trained.load_state_dict(state or network.state_dict())
            score = Score(best, accuracy(trained, test))
            found.setdefault(name, []).append(score)
            print(f"seed {seed} {name}: {score} from {incoming}", flush=True)
    return found


def chosen(found: dict[str, list[Score]]) -> str:
    """The target that is best on validation, in the mean of the seeds; of equals the first."""
    targets = [name for name in found if name not in (*CONTROLS, SMOOTHED)]
    return max(targets, key=lambda name: fmean(score.val for score in found[name]))


def load(images: Images, split: str, count: int) -> Data:
    """Inputs of the network and labels; the file is shuffled, so the first are a fair sample."""
    pixels, labels = (part[:count] for part in images.load(split))
    near = pixels.to(DEVICE)
    inputs = to_input(near, size=images.side, mean=images.mean, std=images.std)
    return Data(inputs, labels.to(DEVICE))


def table(name: str, counts: dict[str, int], found: dict[str, list[Score]], options: str) -> str:
    """Markdown of one cell."""
    rows, best = [], chosen(found)
    for arm, scores in found.items():
        tests = [score.test for score in scores]
        cells = [f"{100 * fmean(values):.2f}" for values in ([s.val for s in scores], tests)]
        for control in CONTROLS:
            gain = paired(tests, [score.test for score in found[control]])
            same = arm == control or gain.low is None
            cells.append("" if same else words(gain.mean, gain.low, gain.high))
        rows.append(f"| {arm}{' (chosen)' if arm == best else ''} | {' | '.join(cells)} |")
    head = f"## {name}\n\n{counts['train']} training, {counts['val']} validation, "
    head += f"{counts['test']} test images; {options}; {machine()}, torch "
    head += f"{torch.__version__}. Accuracy in %, paired gains on test in points with their 95 % "
    head += "intervals; chosen: the target that is best on validation.\n\n"
    head += f"| arm | validation | test | over {' | over '.join(CONTROLS)} |\n"
    return head + "|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def machine() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor()


def words(mean: float, low: float | None, high: float | None) -> str:
    """A gain with its interval, in points; bold where the interval is above zero."""
    if low is None or high is None:
        return f"{100 * mean:+.2f}"
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
    parser.add_argument("--network", choices=NETWORKS, default="simple_cnn")
    parser.add_argument("--name", required=True, help="of the data set")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="others than an earlier table's")
    parser.add_argument("--only", nargs="+", default=[], help="arms, beside the controls")
    parser.add_argument("--pretrain", type=int, default=25, help="epochs of the checkpoint")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folds", type=int, default=2, help="networks of images they never saw")
    parser.add_argument("--train", type=int, default=10000, help="training images at most")
    parser.add_argument("--val", type=int, default=2000, help="validation images at most")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=256, help="images of a training step")
    parser.add_argument("--write", action="store_true", help="keep the table in the .md file")
    given = parser.parse_args()
    with Images.open(given.images) as images:

        def make() -> Network:
            return NETWORKS[given.network](len(images.classes), images.side)

        limits = {"train": given.train, "val": given.val, "test": images.counts["test"]}
        counts = {split: min(limits[split], images.counts[split]) for split in limits}
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        before = Steps(given.pretrain, PRETRAIN_RATE, given.batch)
        steps = Steps(given.epochs, given.rate, given.batch)
        name = f"{given.name} x {given.network}"
        name += f", seeds {seeds[0]} to {seeds[-1]}" if given.first_seed else ""
        options = f"{images.side} px; {given.seeds} seeds, {given.pretrain} + {given.epochs} epochs"
        options += f" of batch {given.batch}, learning rate {given.rate:g}, {given.folds} folds"
        options += f"; commit {commit()}"
        found = study(images, counts, make, seeds, before, steps, given.folds, given.only)
        text = table(name, counts, found, options)
    print(text)
    if given.write:
        keep(Path(__file__).with_suffix(".md"), name, text)


if __name__ == "__main__":
    main()
