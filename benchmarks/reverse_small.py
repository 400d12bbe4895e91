"""Ways out of local minima: targets that small networks can make, and how many are reached.

python benchmarks/reverse_small.py            # prints the table
python benchmarks/reverse_small.py --write    # and keeps it in benchmarks/reverse_small.md
"""

import argparse
from contextlib import nullcontext
from itertools import pairwise, product
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
SIZES, BLOCKS = (16, 32, 64), (2, 3, 4)  # of the stacks of residual blocks
STACK_LIMITS = (501, 2000)


def stay(problem: Problem, search: Search, *_: Tensor) -> Tensor:
    """Wake nobody."""
    return torch.zeros_like(search.stationary)


WAYS: dict[str, dict[str, Any]] = {
    "neither": {"wake": stay, "_STARTS": 0},
    "units at rest are woken": {"_STARTS": 0},
    "starts beside x0": {"wake": stay},
    "both, as the engine does": {},
}


class Whole(nn.Sequential):
    """No plain Sequential, which would be walked backwards part by part."""


class Residual(nn.Module):
    """Adds something of fixed length to its input, as Swin V2's blocks do.

    So there is nothing that it cannot make.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size), nn.LayerNorm(size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table beside this file")
    options = parser.parse_args()
    ways = {way: reached(changes) for way, changes in WAYS.items()}
    kinds = {
        "at once": stacks_reached(Whole),
        "and block by block, as the engine does": stacks_reached(nn.Sequential),
    }
    text = f"""# Reverse steps through small networks

`python benchmarks/reverse_small.py --write`. {NETWORKS} networks of {len(WIDTHS) - 2} hidden \
layers with random weights ({", ".join(map(str, WIDTHS))} units; ReLU), {SAMPLES} samples each: \
the target is what the network makes of the input and {NOISE:.0%} of noise. How many of \
{NETWORKS * SAMPLES} are reached to 1e-3, by the ways out of local minima that are taken.

{table("ways", LIMITS, ways)}

Stacks of {", ".join(map(str, BLOCKS))} residual blocks of {", ".join(map(str, SIZES))} units, \
each two linear layers with a GELU between them and a layer norm behind, added to their input; \
float32, {SAMPLES} samples each. Inputs of standard deviation .3, targets {NOISE:.0%} of noise \
beside what the stack makes of them; such blocks can make anything. How many of \
{len(SIZES) * len(BLOCKS) * SAMPLES} are reached to 1e-3.

{table("searched", STACK_LIMITS, kinds)}
"""
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def table(what: str, limits: tuple[int, ...], rows: dict[str, list[int]]) -> str:
    lines = [
        f"| {what} | {' | '.join(f'{limit} iterations' for limit in limits)} |",
        f"|---|{'---|' * len(limits)}",
        *(f"| {name} | {' | '.join(map(str, counts))} |" for name, counts in rows.items()),
    ]
    return "\n".join(lines)


def problem(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, targets that it can make, and where to begin."""
    torch.manual_seed(seed)
    first, *others = (nn.Linear(*sides) for sides in pairwise(WIDTHS))
    layers = [layer for linear in others for layer in (nn.ReLU(), linear)]
    module = Whole(first, *layers).double()
    x0 = torch.randn(SAMPLES, WIDTHS[0], dtype=torch.float64)
    with torch.no_grad():
        return module, module(x0 + NOISE * torch.randn_like(x0)), x0


def reached(changes: dict[str, Any]) -> list[int]:
    """How many targets of the ReLU networks, for each limit of iterations."""
    with mock.patch.multiple(descent, **changes) if changes else nullcontext():
        return [sum(count(problem(seed), limit) for seed in range(NETWORKS)) for limit in LIMITS]


def stacks_reached(kind: type[nn.Sequential]) -> list[int]:
    """How many targets of the residual blocks, for each limit of iterations."""
    return [
        sum(count(stack(kind, *given), limit) for given in product(SIZES, BLOCKS))
        for limit in STACK_LIMITS
    ]


def stack(kind: type[nn.Sequential], size: int, blocks: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Residual blocks, targets, and where to begin."""
    torch.manual_seed(0)
    module = kind(*(Residual(size) for _ in range(blocks)))
    x0 = 0.3 * torch.randn(SAMPLES, size)
    with torch.no_grad():
        return module, module(x0) + NOISE * torch.randn_like(x0), x0


def count(asked: tuple[nn.Module, Tensor, Tensor], limit: int) -> int:
    """How many targets are reached."""
    return int((reverse(*asked, max_iterations=limit).status == Status.REACHED).sum())


if __name__ == "__main__":
    main()
