"""How long a reverse step takes, beside other ways and the forward pass, and what memory.

export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1   # or lsmr on an operator waits for its threads
python benchmarks/reverse_speed.py            # prints the table
python benchmarks/reverse_speed.py --write    # and keeps it in benchmarks/reverse_speed.md
"""

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from fmce_ops.reverse import Status, reverse
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from machine import cores

BATCH = 16
CHANNELS = (32, 16)  # wide, so that every target is reached
TOLERANCE = 1e-6  # of lsmr; the engine solves float32 maps to about that
DENSE = 2**28  # elements of the explicit matrix that still fit
SPARSE = 2**27  # of the sparse one
BATCHES, SIDES = (1, 2, 4, 8), (16, 32, 64, 128)
PASSES = 5  # forward passes that are timed together
LINEAR = 1.1  # exponent of a growth that still counts as linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the table in reverse_speed.md")
    options = parser.parse_args()
    memory = memory_table()  # first: a process inherits the peak of the one that starts it
    torch.manual_seed(0)
    text = report(options.repetitions) + memory
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def report(repetitions: int) -> str:
    """Markdown with every figure."""
    lines = [
        "# Reverse steps: speed",
        "",
        f"{hardware()}. Median of {repetitions} repetitions after one that warms up, all sides in "
        "turn. Made with `OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python "
        "benchmarks/reverse_speed.py --write`.",
        "",
        f"One 3x3 convolution, {CHANNELS[0]} to {CHANNELS[1]} channels, padding 1, float32, batch "
        f"{BATCH}; milliseconds for a sample. lsmr solves sample by sample with atol = btol = "
        f"{TOLERANCE:g}: on a CSR matrix, whose making is not counted, and on a LinearOperator "
        "around `F.conv2d`. `torch.linalg.lstsq` gets the explicit matrix and all samples.",
        "",
        "| px | reverse | lsmr, CSR | lsmr, operator | lstsq | to CSR | to operator | to lstsq "
        "| distance, reverse / lsmr | goal, to CSR |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(convolution_row(size, repetitions) for size in (16, 64, 128, 256)),
        "",
        "A stage of ResNet-18, random weights, default settings, batch 8, a target that asks "
        "all samples for a change of every channel:",
        "",
        "| stage | px | forward, ms | reverse, ms | forward passes | goal | residual | status |",
        "|---|---|---|---|---|---|---|---|",
        *(stage_row(f"layer{i}", repetitions) for i in range(1, 5)),
    ]
    return "\n".join(lines) + "\n"


def hardware() -> str:
    """One line on what the figures were taken with."""
    return f"{cores()}, {torch.get_num_threads()} used, torch {torch.__version__}"


def convolution_row(size: int, repetitions: int) -> str:
    """One convolution, all ways."""
    module = nn.Conv2d(*CHANNELS, 3, padding=1)
    x0 = torch.randn(BATCH, CHANNELS[0], size, size)
    with torch.no_grad():
        target = module(x0) + torch.randn(BATCH, CHANNELS[1], size, size)
        missing = (target - module(x0)).double()
    ways: dict[str, Callable[[], object]] = {
        "reverse": lambda: reverse(module, target, x0),
        "operator": lambda: solve(operator(module, size), missing[0]),
    }
    if CHANNELS[0] * CHANNELS[1] * 9 * size**2 <= SPARSE:
        matrix = sparse_matrix(module, size)
        ways["csr"] = lambda: solve(matrix, missing[0])
        if np.prod(matrix.shape) <= DENSE:
            dense = torch.from_numpy(matrix.toarray()).float()
            columns = missing.flatten(1).T.float()
            ways["lstsq"] = lambda: torch.linalg.lstsq(dense, columns, driver="gels")
    samples = {"reverse": BATCH, "lstsq": BATCH}
    spent = {name: took / samples.get(name, 1) for name, took in seconds(ways, repetitions).items()}
    ratios = {name: spent[name] / spent["reverse"] for name in ways}
    ours = (reverse(module, target, x0).x[0] - x0[0]).norm().item()
    theirs = np.linalg.norm(solve(operator(module, size), missing[0]))
    goal = "" if size != 64 else f">= 20: {'met' if ratios['csr'] >= 20 else '**missed**'}"
    names = ("reverse", "csr", "operator", "lstsq")
    cells = [f"{spent[name] * 1e3:.1f}" if name in spent else "too large" for name in names]
    cells += [f"{ratios[name]:.1f}" if name in spent else "" for name in names[1:]]
    return f"| {size} | {' | '.join(cells)} | {ours / theirs:.6f} | {goal} |"


def sparse_matrix(module: nn.Conv2d, size: int) -> csr_matrix:
    """The convolution as a matrix."""
    ins, outs = CHANNELS
    i, j = np.mgrid[:size, :size]
    rows, columns, values = [], [], []
    for o, c, u, v in np.ndindex(outs, ins, 3, 3):
        y, x = i + u - 1, j + v - 1
        inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
        rows.append((o * size * size + i * size + j)[inside])
        columns.append((c * size * size + y * size + x)[inside])
        values.append(np.full(inside.sum(), module.weight[o, c, u, v].item()))
    shape = (outs * size * size, ins * size * size)
    parts = map(np.concatenate, (values, rows, columns))
    value, row, column = parts
    return csr_matrix((value, (row, column)), shape)


def operator(module: nn.Conv2d, size: int) -> LinearOperator:
    """The convolution as two functions, in float32 as fast as PyTorch has it."""
    weight = module.weight.detach()

    def product(v: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(v).float().view(1, -1, size, size)
        return F.conv2d(image, weight, padding=1).numpy().ravel()

    def adjoint(u: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(u).float().view(1, -1, size, size)
        return F.conv_transpose2d(image, weight, padding=1).numpy().ravel()

    outs, ins = CHANNELS[1], CHANNELS[0]
    shape = (outs * size * size, ins * size * size)
    return LinearOperator(shape, product, adjoint, dtype=np.float64)


def solve(a: csr_matrix | LinearOperator, missing: Tensor) -> np.ndarray:
    return lsmr(a, missing.numpy().ravel(), atol=TOLERANCE, btol=TOLERANCE, maxiter=2000)[0]


def stage_row(name: str, repetitions: int) -> str:
    """A stage's reverse in units of its forward pass."""
    network = models.resnet18()
    channels, size = {
        "layer1": (64, 56),
        "layer2": (64, 56),
        "layer3": (128, 28),
        "layer4": (256, 14),
    }[name]
    stage = network.get_submodule(name)
    x0 = torch.randn(8, channels, size, size).relu()
    with torch.no_grad():
        stage.train()(x0)
        output = stage.eval()(x0)
        shift = torch.randn(8, output.shape[1], 1, 1)
        target = (output + 0.2 * output.std() * shift).clamp(min=0)

    @torch.no_grad()
    def forward() -> None:
        for _ in range(PASSES):
            stage(x0)

    spent = seconds({"there": forward, "back": lambda: reverse(stage, target, x0)}, repetitions)
    there, back = spent["there"] / PASSES, spent["back"]
    result = reverse(stage, target, x0)
    verdict = "met" if back / there <= 40 else "**missed**"
    statuses = ", ".join(sorted({Status(s).name for s in result.status.tolist()}))
    return (
        f"| {name} | {size} | {there * 1e3:.0f} | {back * 1e3:.0f} | {back / there:.1f} | "
        f"<= 40: {verdict} | {result.residual.median():.3f} | {statuses} |"
    )


def memory_table() -> str:
    """Markdown: how the peak memory of a reverse step grows with the batch and with the image."""
    lines = [
        "",
        "Peak resident memory over what a small reverse step leaves, in MiB, each figure from a "
        "process of its own (Linux). The exponent is that of the growth from the third figure to "
        f"the last against the elements; up to {LINEAR} counts as linear.",
        "",
        "| module | at | first | second | third | last | exponent | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("convolution", "layer3"):
        batches = [peak(name, 4 * batch, 32) for batch in BATCHES]
        sides = [peak(name, 1, side) for side in SIDES]
        lines += [
            memory_row(f"{name}, 32 px | batch 4, 8, 16, 32", batches, 2),
            memory_row(f"{name}, batch 1 | 16, 32, 64, 128 px", sides, 4),
        ]
    return "\n".join(lines) + "\n"


def memory_row(cells: str, growth: list[float], factor: int) -> str:
    exponent = math.log(growth[-1] / growth[-2]) / math.log(factor)
    verdict = "met" if exponent <= LINEAR else "**missed**"
    figures = " | ".join(f"{value:.0f}" for value in growth)
    return f"| {cells} | {figures} | {exponent:.2f} | <= {LINEAR}: {verdict} |"


def peak(name: str, batch: int, side: int) -> float:
    """MiB by which the peak memory of a new process grows."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(growth, name, batch, side).result()


def growth(name: str, batch: int, side: int) -> float:
    """MiB by which a reverse step of (batch, channels, side, side) raises the peak of this one."""
    module = (
        nn.Conv2d(*CHANNELS, 3, padding=1) if name == "convolution" else models.resnet18().layer3
    )
    channels = next(module.parameters()).shape[1]

    def step(count: int, size: int) -> None:
        x0 = torch.randn(count, channels, size, size)
        with torch.no_grad():
            target = module.eval()(x0 + 0.1 * torch.randn_like(x0))
        reverse(module, target, x0)

    step(1, 8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    step(batch, side)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """MiB of this process: VmRSS, now, or VmHWM, at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def seconds(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median of every way over rounds of all of them, after one round that warms up."""
    rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(repetitions + 1)]
    return {name: statistics.median(times[name] for times in rounds[1:]) for name in ways}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
