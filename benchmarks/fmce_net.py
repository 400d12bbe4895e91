"""FMCE-Net on small maps: what its matrix product saves over the library's convolution.

python benchmarks/fmce_net.py            # print the table
python benchmarks/fmce_net.py --write    # and keep it in benchmarks/fmce_net.md
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from fmce_ops.models import FmceNet
from torch import nn

from machine import cores

CHANNELS, PHASES, BATCH = 1024, 10, 64


def plain(side: int) -> FmceNet:
    """The same network of torch's own convolutions."""
    made = network(side)
    for i, layer in enumerate(made.layers):
        if isinstance(layer, nn.Conv2d):
            own = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
            own.load_state_dict(layer.state_dict())
            made.layers[i] = own
    return made


def network(side: int) -> FmceNet:
    """FMCE-Net with the weights of seed 0."""
    torch.manual_seed(0)
    return FmceNet((CHANNELS, side, side), PHASES)


def step_times(made: FmceNet, side: int, repetitions: int) -> list[float]:
    """Seconds of each training step, the first left out."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(BATCH, CHANNELS, side, side, generator=generator).relu()
    scores = torch.randint(0, PHASES, (BATCH,), generator=generator)
    optimizer = torch.optim.Adam(made.parameters(), fused=True)
    times = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        loss = F.cross_entropy(made(maps), scores)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return times[1:]


def report(repetitions: int) -> str:
    rows = []
    for side in (1, 2, 3, 4):
        theirs, ours = (
            statistics.median(step_times(made(side), side, repetitions))
            for made in (plain, network)
        )
        rows.append(f"| {side} x {side} | {theirs:.3f} | {ours:.3f} | {theirs / ours:.1f} |")
    return f"""# FMCE-Net on small maps

`python benchmarks/fmce_net.py --write`; {cores()}, \
torch {torch.__version__}, {torch.get_num_threads()} threads. A training step of {BATCH} maps of \
{CHANNELS} channels, median of {repetitions}. Maps of 4 x 4 take torch's convolution in both.

| map | torch's convolution, s | ours, s | ratio |
|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="keep the table")
    given = parser.parse_args()
    text = report(given.repetitions)
    print(text)
    if given.write:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
