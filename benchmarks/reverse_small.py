"""Ways out of local minima: targets that small ReLU networks can make, and how many are reached.

python benchmarks/reverse_small.py            # prints the table
python benchmarks/reverse_small.py --write    # and keeps it in benchmarks/reverse_small.md
"""

import argparse
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fmce_ops.reverse import Status, descent, reverse
from fmce_ops.reverse.problem import Problem, Search
from torch import Tensor, nn

NETWORKS, SAMPLES = 12, 8
WIDTHS = (24, 32, 32, 24)
NOISE = 0.5  # standard deviation; that of the inputs is 1
LIMITS = (500, 2000, 4000)


def stay(problem: Problem, search: Search, *_: Tensor) -> Tensor:
    """Wake nobody."""
    return torch.zeros_like(search.stationary)


WAYS: dict[str, dict[str, Any]] = {
    "neither": {"wake": stay, "_STARTS": 0},
    "units at rest are woken": {"_STARTS": 0},
    "starts beside x0": {"wake": stay},
    "both, as the engine does": {},
}


class Whole(nn.Module):
    """No Sequential, which would be walked backwards layer by layer."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table beside this file")
    options = parser.parse_args()
    head = " | ".join(f"{limit} iterations" for limit in LIMITS)
    rows = [
        f"| {way} | {' | '.join(map(str, reached(changes)))} |" for way, changes in WAYS.items()
    ]
    text = f"""# Reverse steps through small networks

`python benchmarks/reverse_small.py --write`. {NETWORKS} networks of {len(WIDTHS) - 2} hidden \
layers with random weights ({", ".join(map(str, WIDTHS))} units; ReLU), {SAMPLES} samples each: \
the target is what the network makes of the input and {NOISE:.0%} of noise. How many of \
{NETWORKS * SAMPLES} are reached to 1e-3, by the ways out of local minima that are taken.

| ways | {head} |
|---|{"---|" * len(LIMITS)}
{chr(10).join(rows)}
"""
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def problem(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, targets that it can make, and where to begin."""
    torch.manual_seed(seed)
    first, *others = (nn.Linear(*sides) for sides in pairwise(WIDTHS))
    layers = [layer for linear in others for layer in (nn.ReLU(), linear)]
    module = Whole(nn.Sequential(first, *layers).double())
    x0 = torch.randn(SAMPLES, WIDTHS[0], dtype=torch.float64)
    with torch.no_grad():
        return module, module(x0 + NOISE * torch.randn_like(x0)), x0


def reached(changes: dict[str, Any]) -> list[int]:
    """How many targets, for each limit of iterations."""
    with mock.patch.multiple(descent, **changes) if changes else nullcontext():
        return [
            sum(
                int((reverse(*problem(seed), max_iterations=limit).status == Status.REACHED).sum())
                for seed in range(NETWORKS)
            )
            for limit in LIMITS
        ]


if __name__ == "__main__":
    main()
