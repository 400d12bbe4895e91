"""What running a path alone saves: milliseconds of an image, over those of the dense network.

    python benchmarks/pathways_speed.py --write

Gates are drawn at random so that a given share of every layer is open, and differ from image to
image; the dense network has its norms folded into its convolutions, as the others have. All times
are medians of one run on one machine, taken in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fmce_ops.models.cifar import resnet20, resnet56
from fmce_ops.pathways import (
    attach,
    compact,
    fixed,
    gated_layers,
    measure_costs,
    most_open,
    path_codes,
)
from torch import Tensor, nn
from torchvision import models

SHARES = (0.3, 0.5, 0.7, 0.9)
BATCH = 32
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20, 32 px": (lambda: resnet20(10), 32),
    "ResNet-56, 32 px": (lambda: resnet56(10), 32),
    "ResNet-18, 224 px": (lambda: models.resnet18(), 224),
    "VGG-11, 224 px": (lambda: models.vgg11_bn(), 224),
    "ShuffleNet V2 x1.0, 224 px": (lambda: models.shufflenet_v2_x1_0(), 224),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table beside this file")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    options = parser.parse_args()
    lines = [
        "# What running a path alone saves",
        "",
        f"{torch.get_num_threads()} CPU threads. Made with "
        "`python benchmarks/pathways_speed.py --write`. Times are divided by those of the dense "
        "network in the same run: below 1 is faster.",
        "",
        "- `work`: multiply-adds of a path, controllers included, over those of the dense network.",
        "- `own path`: one image run with its own filters, the controllers included.",
        "- `fixed path`: one image run through a plain network of one path's filters.",
        f"- `batch`: {BATCH} images together; of their own paths every filter is computed that one "
        "of them opens.",
        "",
        "| network | open | dense, ms | work | own path | fixed path | batch, own paths "
        "| batch, fixed path |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in NETWORKS:
        for share in SHARES:
            lines.append(row(name, share, options.seconds))
            print(lines[-1], flush=True)
    if options.write:
        Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


@torch.inference_mode()
def row(name: str, share: float, seconds: float) -> str:
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    network = opened(attach(make()), share).eval()
    few = BATCH if side < 64 else BATCH // 4
    images = torch.randn(few, 3, side, side).contiguous(memory_format=torch.channels_last)
    codes = path_codes(network, images)
    costs = measure_costs(network, images[:1])
    work = float(costs.multiply_adds(codes).double().mean()) / costs.dense
    runs = {
        "dense": fixed(network, torch.ones_like(codes[0])),
        "own": compact(network),
        "fixed": fixed(network, most_open(codes)),
    }
    for made in runs.values():
        made.to(memory_format=torch.channels_last)
    alone = medians(runs, images[:1], seconds / 2)
    together = medians(runs, images, seconds / 2)
    ratios = [
        alone["own"] / alone["dense"],
        alone["fixed"] / alone["dense"],
        together["own"] / together["dense"],
        together["fixed"] / together["dense"],
    ]
    cells = [name, f"{codes.float().mean():.2f}", f"{1e3 * alone['dense']:.2f}", f"{work:.2f}"]
    return f"| {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in ratios)])} |"


def opened(network: nn.Module, share: float) -> nn.Module:
    """Controllers that open about this share of every layer, most of it for every image."""
    for gated in gated_layers(network).values():
        score = gated.controller.score
        score.weight.normal_(0, 0.02)
        score.bias.copy_(torch.where(torch.rand_like(score.bias) < share, 0.1, -0.1))
    return network


def medians(runs: dict[str, nn.Module], images: Tensor, seconds: float) -> dict[str, float]:
    """Seconds of one call of each network, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times["dense"]) < 4:
        for name, network in runs.items():
            started = time.perf_counter()
            network(images)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


if __name__ == "__main__":
    main()
