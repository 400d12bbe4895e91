"""Reverse steps through the head and the last stage of every torchvision family.

python benchmarks/reverse_networks.py            # prints the table
python benchmarks/reverse_networks.py --write    # keeps it in benchmarks/reverse_networks.md
"""

import argparse
from pathlib import Path

import torch
from fmce_ops.reverse import Reversal, Status, nearest_logits, propagate
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

CLASSES = 10
BATCH = 2
STEPS = 3  # of training on random labels
ITERATIONS = 12
# name, image side, submodule of the last stage
NETWORKS = [
    ("resnet18", 64, "layer4"),
    ("resnext50_32x4d", 64, "layer4"),
    ("wide_resnet50_2", 64, "layer4"),
    ("densenet121", 64, "features.denseblock4"),
    ("googlenet", 64, "inception5b"),
    ("mobilenet_v2", 64, "features.18"),
    ("mobilenet_v3_small", 64, "features.12"),
    ("shufflenet_v2_x0_5", 64, "conv5"),
    ("efficientnet_b0", 64, "features.8"),
    ("mnasnet0_5", 64, "layers.14"),
    ("regnet_y_400mf", 64, "trunk_output.block4"),
    ("convnext_tiny", 64, "features.7"),
    ("vit_b_32", 64, "encoder.layers.encoder_layer_11"),
    ("swin_t", 64, "features.7"),
    ("alexnet", 64, "features.10"),
    ("vgg11_bn", 32, "features.25"),
    ("maxvit_t", 224, "blocks.3"),
]


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
    parser.add_argument("--only", nargs="*", help="names of networks")
    options = parser.parse_args()
    chosen = [entry for entry in NETWORKS if not options.only or entry[0] in options.only]
    lines = [
        "# Reverse steps through torchvision's families",
        "",
        f"{CLASSES} classes, batch {BATCH}, random weights, {STEPS} steps of training on random "
        f"labels; target: the nearest logits, margin 1; at most {ITERATIONS} solver iterations in "
        "a pass. Median and worst sample of those that needed a change. The stage's target is what "
        "the head asks for, whether or not the stage can make it. Made with "
        "`python benchmarks/reverse_networks.py --write`.",
        "",
        "| network | boundary | residual | change | iterations | status |",
        "|---|---|---|---|---|---|",
    ]
    for entry in chosen:
        lines += network_rows(*entry)
        if options.write:
            Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


def network_rows(name: str, side: int, stage_name: str) -> list[str]:
    """One row for the head and one for the stage."""
    torch.manual_seed(0)
    extra = {
        "googlenet": {"aux_logits": False, "init_weights": True},
        "vit_b_32": {"image_size": side},
    }.get(name, {})
    network = models.get_model(name, num_classes=CLASSES, **extra)
    images, labels = torch.randn(8, 3, side, side), torch.randint(0, CLASSES, (8,))
    train(network, images, labels)
    network.eval()
    stage = network.get_submodule(stage_name)
    seen: list[Tensor] = []
    with torch.no_grad(), stage.register_forward_hook(lambda _, x, y: seen.extend((x[0], y))):
        logits = network(images[:BATCH])
    target = nearest_logits(logits, (logits.argmax(1) + 1) % CLASSES, margin=1)
    head = Rest(network, stage, images[:1])
    found = propagate([stage, head], target, seen, max_iterations=ITERATIONS)
    return [table_row(name, *pair) for pair in zip(("stage", "head"), found.results, strict=True)]


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # so that a few steps leave statistics that fit
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(network.train()(images), labels).backward()
        optimizer.step()


def table_row(name: str, boundary: str, result: Reversal) -> str:
    assert all(column.isfinite().all() for column in vars(result).values()), name
    figures = [
        f"{values.double().median():.2g}, {values.double().max():.2g}"
        for values in (result.residual, result.change, result.iterations)
    ]
    names = ", ".join(sorted({Status(s).name.lower() for s in result.status.tolist()}))
    row = f"| {name} | {boundary} | {' | '.join(figures)} | {names} |"
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
