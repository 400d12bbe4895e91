"""Reverse steps of linear maps beside dense least squares on the explicit matrix.

python benchmarks/reverse_linear.py            # prints the table
python benchmarks/reverse_linear.py --write    # and keeps it in benchmarks/reverse_linear.md
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from fmce_ops.files import write_text
from fmce_ops.reverse import Reversal, reverse
from numpy.typing import NDArray
from torch import Tensor, nn

SAMPLES = 2
Map = tuple[nn.Module, tuple[int, ...]]  # and the shape of its input
# Well-conditioned, or singular in a way that the weights show.
LINEAR: dict[str, Map] = {
    "wide": (nn.Linear(20, 10), (20,)),
    "tall": (nn.Linear(10, 20), (10,)),
    "positions": (nn.Linear(6, 4), (3, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 7)),
    "wide convolution": (nn.Conv2d(6, 4, 3, padding=1), (6, 7, 7)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 9)),
    "dilated": (nn.Conv2d(4, 4, 3, dilation=2), (4, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 7, 7)),
    "depthwise": (nn.Conv2d(5, 10, 3, groups=5, padding=1), (5, 15, 15)),
    "wide groups": (nn.Conv2d(12, 6, 3, groups=3, padding=1), (12, 13, 13)),
    "circular": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), (4, 5, 5)),
    "1x1": (nn.Conv2d(6, 4, 1, stride=2, groups=2), (6, 7, 7)),
    "one dimension": (nn.Conv1d(4, 3, 3, padding="same"), (4, 9)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2), (4, 5, 5)),
    "batch norm": (nn.BatchNorm2d(4), (4, 5, 5)),
    "average": (nn.AvgPool2d(2), (3, 6, 6)),
    "overlapping average": (nn.AvgPool2d(3, 2, 1), (3, 7, 7)),
    "adaptive average": (nn.AdaptiveAvgPool2d((2, 3)), (3, 7, 7)),
    "folded": (nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)), (6, 6, 6)),
    "head": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), (6, 4, 4)),
}
# Square ones, whose padding makes them ill-conditioned, and ones with too many outputs.
FAR: dict[str, Map] = {
    "square": (nn.Conv2d(4, 4, 3, padding=1), (4, 8, 8)),
    "larger output": (nn.Conv2d(4, 4, 4, padding=2), (4, 7, 7)),
    "larger output of fewer channels": (nn.Conv2d(4, 3, 5, padding=4), (4, 5, 5)),
    "padded 1x1": (nn.Conv2d(8, 8, 1, padding=1), (8, 6, 6)),
    "square depthwise": (nn.Conv2d(4, 4, 5, padding=2, groups=4), (4, 8, 8)),
    "square strided": (nn.Conv2d(4, 8, 3, stride=2, padding=1), (4, 8, 8)),
}
# So badly conditioned that a target which cannot be reached asks for thousands of times the input.
BAD: dict[str, Map] = {
    "hundreds of features": (nn.Linear(600, 600), (600,)),
    "bad depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 16, 16)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table beside this file")
    options = parser.parse_args()
    rows = [row(name, *found) for name, found in (LINEAR | FAR | BAD).items()]
    text = f"""# Reverse steps of linear maps

`python benchmarks/reverse_linear.py --write`. Beside `numpy.linalg.lstsq` on the explicit matrix \
in float64; {SAMPLES} samples, random weights. The larger of two differences, each the worst of \
the samples: of the distance from x0, relative to lstsq's, and of the residual, relative to what \
is missing at x0. Reachable: the target is what the map makes of another input; else noise is \
added to what it makes of x0. Both sides count the same small singular values as 0, by the type of \
the input (`docs/reverse.md`); for the last maps `max_change` is lifted.

| map | matrix | condition | float32, reachable | float32, not | float64, reachable | float64, not |
|---|---|---|---|---|---|---|
{"".join(rows)}"""
    print(text)
    if options.write:
        write_text(Path(__file__).with_suffix(".md"), text)


def row(name: str, module: nn.Module, shape: tuple[int, ...]) -> str:
    """A line of the table."""
    cells = []
    for dtype in (torch.float32, torch.float64):
        map_, x0 = prepared(module, dtype), torch.randn(SAMPLES, *shape, dtype=dtype)
        bound = 1e9 if name in BAD else 10.0
        for reachable in (True, False):
            wanted = target(map_, x0, reachable=reachable)
            result = reverse(map_, wanted, x0, max_change=bound)
            cells.append(f"{deviation(map_, x0, wanted, result):.0e}")
    matrix, _, _ = dense(map_, x0, wanted)
    values = np.linalg.svd(matrix, compute_uv=False)
    values = values[values > 1e-12 * values[0]]
    rows, columns = matrix.shape
    size = f"{rows} x {columns}, rank {len(values)}"
    return f"| {name} | {size} | {values[0] / values[-1]:.2g} | {' | '.join(cells)} |\n"


def prepared(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With weights that depend on nothing before, and running statistics that are not 0 and 1."""
    torch.manual_seed(1)
    module = copy.deepcopy(module).to(dtype).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for statistic, fill in ((part.running_mean, 0.0), (part.running_var, 0.5)):
                assert statistic is not None
                statistic.uniform_(fill, fill + 1.5)
            part.weight.data.uniform_(0.5, 2)
    return module


@torch.no_grad()
def target(module: nn.Module, x0: Tensor, *, reachable: bool) -> Tensor:
    """What the module makes of another input, or noise beside what it makes of x0."""
    output: Tensor = module(x0 + torch.randn_like(x0)) if reachable else module(x0)
    return output if reachable else output + torch.randn_like(output)


@torch.no_grad()
def dense(
    module: nn.Module, x0: Tensor, wanted: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The module's matrix, what is missing to the target, and NumPy's answer, all in float64."""
    wide, start = copy.deepcopy(module).double(), x0.double()
    units = torch.eye(x0[0].numel(), dtype=torch.float64).view(-1, *x0.shape[1:])
    matrix = (wide(units) - wide(torch.zeros_like(units))).flatten(1).T.numpy()
    missing = (wanted.double() - wide(start)).flatten(1).numpy().T
    side = max(matrix.shape) / getattr(module, "groups", 1)
    noise = max(torch.finfo(x0.dtype).eps * side**0.5, torch.finfo(torch.float64).eps * side)
    return matrix, missing, np.linalg.lstsq(matrix, missing, rcond=noise)[0]


def deviation(module: nn.Module, x0: Tensor, wanted: Tensor, result: Reversal) -> float:
    """Largest relative difference of the distance from x0 and of the residual."""
    matrix, missing, answer = dense(module, x0, wanted)
    step = (result.x - x0).double().flatten(1).numpy().T
    norm, size = np.linalg.norm(answer, axis=0), np.linalg.norm(missing, axis=0)
    residuals = [np.linalg.norm(matrix @ d - missing, axis=0) for d in (step, answer)]
    errors = (np.linalg.norm(step, axis=0) - norm) / norm, (residuals[0] - residuals[1]) / size
    return float(max(abs(error).max() for error in errors))


if __name__ == "__main__":
    main()
