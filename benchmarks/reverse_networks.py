"""Reverse steps through the head and the last stage of every torchvision family.

python benchmarks/reverse_networks.py            # prints the table
python benchmarks/reverse_networks.py --write    # keeps it in benchmarks/reverse_networks.md
python benchmarks/reverse_networks.py --write --only resnet18 vit_b_32    # the rows of some
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch
from fmce_ops.files import write_text
from fmce_ops.reverse import Reversal, Status, nearest_logits, reverse
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.maxvit import MaxVitBlock

from machine import commit, processor

TABLE = Path(__file__).with_suffix(".md")
CLASSES = 10
BATCH = 2
STEPS, PER_STEP, TRAINED_ON, TESTED_ON = 60, 32, 1000, 200  # steps and images of the training
STATISTICS = 64  # images that batch norm takes its statistics from, trained or not
HEADS, ITERATIONS, MANY = 500, 100, 20000
# Their last stage has as many inputs as outputs or more and ends in no ReLU: what the head asks of
# it, it may be able to make, and is given as many iterations as where it is known to be.
FREE = {"maxvit_t", "convnext_tiny", "vit_b_32", "swin_t", "swin_v2_t", "alexnet", "vgg11_bn"}
PROCESSES = 2  # networks that are studied side by side
NOISE = 0.05  # of the norm of the stage's input
# image side, submodule of the last stage
NETWORKS = {
    "maxvit_t": (224, "blocks.3"),  # takes longest
    "resnet18": (64, "layer4"),
    "resnext50_32x4d": (64, "layer4"),
    "wide_resnet50_2": (64, "layer4"),
    "densenet121": (64, "features.denseblock4"),
    "googlenet": (64, "inception5b"),
    "inception_v3": (96, "Mixed_7c"),
    "mobilenet_v2": (64, "features.18"),
    "mobilenet_v3_small": (64, "features.12"),
    "shufflenet_v2_x0_5": (64, "conv5"),
    "efficientnet_b0": (64, "features.8"),
    "efficientnet_v2_s": (64, "features.7"),
    "mnasnet0_5": (64, "layers.14"),
    "regnet_y_400mf": (64, "trunk_output.block4"),
    "convnext_tiny": (64, "features.7"),
    "vit_b_32": (64, "encoder.layers.encoder_layer_11"),
    "swin_t": (64, "features.7"),
    "swin_v2_t": (64, "features.7"),
    "squeezenet1_1": (64, "features.12"),
    "alexnet": (64, "features.10"),
    "vgg11_bn": (32, "features.25"),
}


class Rest(nn.Module):
    """What a network does behind a submodule: the module's output is put in its place."""

    def __init__(self, network: nn.Module, stage: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.network, self.stage, self.image = network, [stage], image

    def forward(self, x: Tensor) -> Tensor:
        images = self.image.expand(len(x), *self.image.shape[1:])
        with self.stage[0].register_forward_hook(lambda *_: x):
            return self.network(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table beside this file")
    parser.add_argument("--only", nargs="*", choices=NETWORKS, help="names of networks")
    options = parser.parse_args()
    wanted = options.only or list(NETWORKS)
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as processes:
        found = dict(zip(wanted, processes.map(rows, wanted), strict=True))
    if options.write:
        write_text(TABLE, page({**kept_rows(), **found}))


def kept_rows() -> dict[str, list[str]]:
    """The lines of the table as it is, by network."""
    kept: dict[str, list[str]] = {}
    for line in TABLE.read_text().splitlines() if TABLE.exists() else []:
        kept.setdefault(line.removeprefix("| ").split(" | ")[0], []).append(line)
    return kept


def page(found: dict[str, list[str]]) -> str:
    lines = [
        "# Reverse steps through torchvision's families",
        "",
        f"scikit-learn's digits, enlarged; batch {BATCH}; weights random, or after {STEPS} steps "
        f"of {PER_STEP} images, behind them the share of {TESTED_ON} other images that the "
        "network reads right. Median and worst sample of those that needed a change. Made with "
        "`python benchmarks/reverse_networks.py --write`, or with `--only NETWORK` behind it.",
        "",
        f"- `head`: target the nearest correct logits, margin 1, at most {HEADS} iterations.",
        "- `stage`: target what the head asked for, whether or not the stage can make it, at most "
        f"{ITERATIONS} iterations, {MANY} where neither ReLUs nor sizes stand against it "
        f"({', '.join(name for name in NETWORKS if name in FREE)}).",
        f"- `stage, reachable`: target what the stage makes of its input and {NOISE:.0%} of noise, "
        f"so that there is an answer; at most {MANY} iterations.",
        "",
        "Where a start leaves a sample short of its target, a Sequential is walked backwards part "
        "by part besides; its iterations are added to the others. Linear stages take what they "
        "need.",
        "",
        "| network | weights | boundary | residual | change | iterations | status | made by |",
        "|---|---|---|---|---|---|---|---|",
        *chain.from_iterable(found[name] for name in NETWORKS if name in found),
    ]
    return "\n".join(lines) + "\n"


def rows(name: str) -> list[str]:
    """The lines of the table about a network."""
    torch.set_num_threads(1)
    lines, origin = [], f"{commit()}, {processor()}, torch {torch.__version__}"
    for weights, steps in {"random": 0, "trained": STEPS}.items():
        accuracy, answers = study(name, steps, few=MANY if name in FREE else ITERATIONS)
        for boundary, found in answers.items():
            cells = f"{name} | {weights}, {accuracy:.2f} | {boundary}"
            lines.append(f"{table_row(cells, found)} {origin} |")
            print(lines[-1], flush=True)
    return lines


def study(
    name: str, steps: int, *, heads: int = HEADS, few: int = ITERATIONS, many: int = MANY
) -> tuple[float, dict[str, Reversal]]:
    """A network's accuracy after so many steps of training, and its reverse steps."""
    side, stage_name = NETWORKS[name]
    torch.manual_seed(0)
    extra = {
        "googlenet": {"aux_logits": False, "init_weights": True},
        "inception_v3": {"aux_logits": False, "init_weights": True},
        "vit_b_32": {"image_size": side},
    }.get(name, {})
    network = models.get_model(name, num_classes=CLASSES, **extra)
    accuracy = train(network, side, steps)
    images, _ = digits(slice(TRAINED_ON, TRAINED_ON + BATCH), side)
    stage = network.get_submodule(stage_name)
    seen: list[Tensor] = []
    with torch.no_grad(), stage.register_forward_hook(lambda _, x, y: seen.extend((x[0], y))):
        logits = network(images)
    target = nearest_logits(logits, (logits.argmax(1) + 1) % CLASSES, margin=1)
    head = Rest(network, stage, images[:1])
    asked = reverse(head, target, seen[1], max_iterations=heads)
    stage = parts_of(stage)
    given = reverse(stage, asked.x, seen[0], max_iterations=few)
    noise = torch.randn_like(seen[0])
    noise *= NOISE * seen[0].norm() / noise.norm()
    with torch.no_grad():
        near = stage(seen[0] + noise)
    known = reverse(stage, near, seen[0], max_iterations=many)
    return accuracy, {"head": asked, "stage": given, "stage, reachable": known}


def parts_of(stage: nn.Module) -> nn.Module:
    """The stage as the Sequential that it is, if it is written as a loop."""
    if isinstance(stage, MaxVitBlock):
        return nn.Sequential(*(layer.layers for layer in stage.layers))
    return stage


def digits(which: slice | Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Some of scikit-learn's digits (N, 3, side, side), between -1 and 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images).float()[which].view(-1, 1, 8, 8) / 8 - 1
    large = F.interpolate(small, size=(side, side), mode="bilinear")
    return large.expand(-1, 3, -1, -1), torch.from_numpy(labels)[which]


def train(network: nn.Module, side: int, steps: int) -> float:
    """Train with Adam, set the statistics of batch norm, and judge on other images."""
    optimizer = torch.optim.Adam(network.parameters(), 3e-4)
    network.train()
    for _ in range(steps):
        images, labels = digits(torch.randint(0, TRAINED_ON, (PER_STEP,)), side)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    images, labels = digits(slice(TRAINED_ON, TRAINED_ON + TESTED_ON), side)
    with torch.no_grad():
        network(digits(slice(STATISTICS), side)[0])
        return float((network.eval()(images).argmax(1) == labels).float().mean())


def table_row(cells: str, result: Reversal) -> str:
    figures = [
        f"{values.double().median():.2g}, {values.double().max():.2g}"
        for values in (result.residual, result.change, result.iterations)
    ]
    names = ", ".join(sorted({Status(s).name.lower() for s in result.status.tolist()}))
    return f"| {cells} | {' | '.join(figures)} | {names} |"


if __name__ == "__main__":
    main()
