"""What training and tracking cost, as ratios within one run.

    python benchmarks/training.py            # prints the table
    python benchmarks/training.py --write    # and keeps it in benchmarks/training.md

Throughput: our loop, a plain loop that is written well (channels_last, uint8 in memory, batched
augmentation) and a plain loop with torchvision's DataLoader and default memory layout train the
same network on the same images, in turn, several times; the table gives medians. Tracking: the
same training with everything logged and with nothing logged.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fmce_ops.data import Augment, Images, TrainBatches, prepare
from fmce_ops.models import Classifier, build
from fmce_ops.tracking.runs import tracked
from fmce_ops.training.classifier import Plan, Validation, train_classifier
from fmce_ops.training.devices import launch
from fmce_ops.training.reporter import Reporter, Reporters
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from machine import cores

SIZES, BATCH, PAD = (16, 32), 128, 2  # 16 px is the default of params.yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--epochs", type=int, default=12, help="of the runs with and without log")
    parser.add_argument("--write", action="store_true", help="keep the table in training.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        path, shares = Path("images.h5"), {"validation": 0.1, "test": 0.1}
        prepare("digits", path, root=Path(), image_size=32, per_class=None, seed=0, **shares)
        with Images.open(path) as images:
            text = report(images, options.repetitions, options.epochs)
    print(text)
    if options.write:
        (Path(__file__).resolve().with_suffix(".md")).write_text(text)


def report(images: Images, repetitions: int, epochs: int) -> str:
    rows = [row for size in SIZES for row in throughput(images, size, repetitions)]
    cost = statistics.median(tracking_cost(images, epochs) for _ in range(3))
    return f"""# Training and tracking

`python benchmarks/training.py --write`; {cores()}, torch {torch.__version__}, \
{torch.get_num_threads()} threads. ShuffleNet V2 x0.5, small stem, digits, batch {BATCH}; one \
epoch a repetition, {repetitions} \
repetitions in turn, medians.

| px | loop | images per second | ours over it | goal |
|---|---|---|---|---|
{chr(10).join(rows)}

With everything logged the same training takes {cost:.3f} of its time with nothing logged \
({epochs} epochs at {SIZES[0]} px; goal: at most 1.02).
"""


def throughput(images: Images, size: int, repetitions: int) -> list[str]:
    """Three rows of the table: our loop and the two others."""
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for _ in range(repetitions):
        for name, (_, loop, _) in LOOPS.items():
            seconds[name].append(loop(images, size))
    count = images.counts["train"] // BATCH * BATCH
    rows = []
    for name, (words, _, goal) in LOOPS.items():
        speed = count / statistics.median(seconds[name])
        over = f"{ratio(seconds[name], seconds['ours']):.2f}" if goal else ""
        rows.append(f"| {size} | {words} | {speed:.0f} | {over} | {goal} |")
    return rows


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over the repetitions of their time over ours."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def network(size: int) -> Classifier:
    torch.manual_seed(0)
    return build("shufflenet_v2_x0_5", 10, stem="small", in_size=size)


def batches(images: Images, size: int) -> TrainBatches:
    return TrainBatches(
        *images.load("train"),
        batch_size=BATCH,
        size=size,
        mean=images.mean,
        std=images.std,
        augment=Augment(pad=PAD, flip=True),
        seed=0,
    )


def timed(steps: Callable[[], None]) -> float:
    started = time.perf_counter()
    steps()
    return time.perf_counter() - started


def train(images: Images, size: int, epochs: int, reporter: Reporter) -> float:
    """Seconds of our whole loop: training, validation, recording every point."""
    held_out = Validation(*images.load("val"), size, images.mean, images.std)
    plan = Plan(epochs, 1, "adam", 1e-3, 0.0, "cosine", 0)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        return timed(
            lambda: (
                train_classifier(
                    launch(), network(size), batches(images, size), held_out, plan, where, reporter
                )
                and None
            )
        )


class _Speed:
    """Keeps the seconds of the training steps that the loop itself measures."""

    def __init__(self, images: int) -> None:
        self.images, self.seconds = images, 0.0

    def begin(self, task: str, total: int) -> None:
        self.seconds = 0.0

    def row(self, row: object) -> None:
        self.seconds += self.images / row.values["images_per_second"]


def ours(images: Images, size: int) -> float:
    speed = _Speed(images.counts["train"] // BATCH * BATCH)
    train(images, size, 1, speed)
    return speed.seconds


def plain(images: Images, size: int) -> float:
    model = network(size).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters())
    source = batches(images, size)

    def steps() -> None:
        for step in range(source.steps):
            inputs, labels = source.batch(0, step)
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return timed(steps)


class _Pictures(Dataset):
    def __init__(self, images: Images, size: int) -> None:
        pixels, self.labels = images.load("train")
        self.pixels = pixels[:, 0].numpy()
        self.transform = transforms.Compose(
            [
                transforms.Resize(size),
                transforms.RandomCrop(size, padding=PAD),
                transforms.RandomHorizontalFlip(),
                transforms.Grayscale(3),
                transforms.ToTensor(),
                transforms.Normalize(images.mean * 3, images.std * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def dataloader(images: Images, size: int) -> float:
    model = network(size).train()
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(_Pictures(images, size), batch_size=BATCH, shuffle=True, drop_last=True)

    def steps() -> None:
        for inputs, labels in loader:
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return timed(steps)


def tracking_cost(images: Images, epochs: int) -> float:
    """Time of a training with everything logged over that of the same with nothing logged."""
    untracked = train(images, SIZES[0], epochs, Reporters())
    with tracked("benchmark", params={"epochs": epochs}, tags={}) as run:
        logged = train(images, SIZES[0], epochs, run)
    return logged / untracked


LOOPS = {  # name -> words, loop, how much faster ours shall be
    "ours": ("ours (Fabric, channels_last, uint8 in memory, batched augmentation)", ours, ""),
    "plain": ("plain, written well", plain, "at least 1"),
    "dataloader": ("plain, torchvision's DataLoader, default layout", dataloader, "at least 1.5"),
}


if __name__ == "__main__":
    main()
