"""What maturity costs: descriptors of large maps, and a score once an epoch of a training loop.

python benchmarks/maturity_cost.py            # print the table
python benchmarks/maturity_cost.py --write    # and keep it in benchmarks/maturity_cost.md
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fmce_ops.maturity import describe
from fmce_ops.models import Classifier, build
from fmce_ops.tracking.monitor import MaturityMonitor

from machine import cores

IMAGES, SIDE, BATCH = 8192, 32, 64  # of the training loop
SCORED = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the table")
    options = parser.parse_args()
    text = report(options.repetitions)
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def report(repetitions: int) -> str:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1000, 1024, 7, 7, generator=generator).relu()
    described = [seconds(lambda: describe(maps)) for _ in range(repetitions + 1)][1:]
    network = build("shufflenet_v2_x0_5", 10, stem="small", in_size=SIDE)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    epoch = seconds(lambda: train(network, images))
    monitor = MaturityMonitor(images[:SCORED])
    scored = [seconds(lambda: monitor.update(network, 0)) for _ in range(repetitions + 1)]
    first, *later = scored
    share = statistics.median(later) / epoch
    each = statistics.median(described)
    return f"""# What maturity costs

`python benchmarks/maturity_cost.py --write`; {cores()}, \
torch {torch.__version__}; median of {repetitions} repetitions.

| what | seconds | goal |
|---|---|---|
| descriptors of 1,000 maps of 1024 x 7 x 7 | {each:.2f} | under 2: {met(each < 2)} |
| an epoch of ShuffleNet V2 x0.5 on {IMAGES} images of {SIDE} px | {epoch:.1f} | |
| the first score of its modules with {SCORED} images, of the random start too | {first:.2f} | |
| every later one | {statistics.median(later):.2f} | |
| that share of the epoch | {share:.1%} | under 3 %: {met(share < 0.03)} |
"""


def train(network: Classifier, images: torch.Tensor) -> None:
    """One epoch."""
    network.train()
    optimizer = torch.optim.Adam(network.parameters())
    labels = torch.arange(len(images)) % 10
    for start in range(0, len(images), BATCH):
        chosen = slice(start, start + BATCH)
        loss = F.cross_entropy(network(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def met(goal: bool) -> str:
    return "met" if goal else "missed"


if __name__ == "__main__":
    main()
