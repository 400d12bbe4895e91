"""What local post-training of the last stage costs beside fine-tuning, targets included.

    python benchmarks/posttrain_cost.py            # prints the table
    python benchmarks/posttrain_cost.py --write    # and keeps it in benchmarks/posttrain_cost.md

The same network, images, batch size and number of epochs: the whole network end to end, the last
stage alone through the frozen network, and the stage's own training from stored inputs and targets.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fmce_ops.data import Images, prepare, to_input
from fmce_ops.models import Classifier, build, functional_modules
from fmce_ops.training.devices import launch
from fmce_ops.training.posttrain import Job, PosttrainPlan, Stores, judge_images, train_span
from fmce_ops.training.reporter import Reporters
from fmce_ops.training.targets import Span, TargetSettings, find_span, write_targets
from torch.utils.flop_counter import FlopCounterMode

from machine import cores

SIZE, BATCH, NETWORKS = 32, 128, ("resnet18", "shufflenet_v2_x0_5")
TARGETS = TargetSettings(margin=1.0, pull=0.0, size=SIZE, images_per_shard=4096, batch_size=BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the table in posttrain_cost.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.h5"
        shares = {"validation": 0.1, "test": 0.1, "per_class": options.per_class}
        prepare("digits", path, root=Path(folder), image_size=SIZE, seed=0, **shares)
        with Images.open(path) as images:
            rows = [
                row
                for name in NETWORKS
                for row in measure(name, images, options.epochs, options.repetitions)
            ]
            counts = images.counts["train"]
    text = f"""# Post-training: cost

`python benchmarks/posttrain_cost.py --write`; {cores()}, \
torch {torch.__version__}. {counts} digits at {SIZE} px, small stem, batch {BATCH}, \
{options.epochs} epochs of AdamW; random weights with calibrated batch norm, so nearly \
every image has a target to solve for. Median of {options.repetitions} repetitions, all ways in \
turn. Multiply-adds: of one training image, forward and backward in all epochs; for its own \
targets with those of making them, validation's inputs included.

| network | trained | seconds | multiply-adds, millions | share of them | share of the time | goal |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def measure(name: str, images: Images, epochs: int, repetitions: int) -> list[str]:
    """Three rows of the table."""
    torch.manual_seed(0)
    network = build(name, len(images.classes), stem="small", in_size=SIZE)
    pixels, labels = images.load("train")
    inputs = to_input(pixels, size=SIZE, mean=images.mean, std=images.std)
    for part in inputs.split(BATCH):
        network.train()(part)
    network.eval()
    span = find_span(functional_modules(network), None)
    rounds = [
        (
            fine_tune(network, inputs, labels, images, epochs, frozen=False),
            fine_tune(network, inputs, labels, images, epochs, frozen=True),
            *own_training(span, images, epochs),
        )
        for _ in range(repetitions)
    ]
    whole, frozen, targets, local = (statistics.median(took) for took in zip(*rounds, strict=True))
    ratio = (targets + local) / whole
    read = span.before(inputs[:BATCH]).detach()
    wanted = span.inside(read).detach()

    def by_labels() -> None:
        F.cross_entropy(network(inputs[:BATCH]), labels[:BATCH]).backward()

    making = cost(lambda: make_targets(span, images), len(inputs))
    own = making + epochs * cost(lambda: F.mse_loss(span.inside(read), wanted).backward())
    all_of_it = epochs * cost(by_labels)
    with_frozen(network)
    through = epochs * cost(by_labels)
    verdict = "met" if ratio <= 1 / 3 else "**missed**"
    return [
        f"| {name} | all of it, end to end | {whole:.1f} | {all_of_it:.0f} | 1 | 1 | |",
        f"| | {span.name}, through the frozen network | {frozen:.1f} | {through:.0f} | "
        f"{through / all_of_it:.2f} | {frozen / whole:.2f} | |",
        f"| | {span.name}, from its own targets ({targets:.1f} s and {making:.1f} million of it "
        f"for the targets) | {targets + local:.1f} | {own:.0f} | {own / all_of_it:.2f} | "
        f"{ratio:.2f} | at most 0.33: {verdict} |",
    ]


def with_frozen(network: Classifier) -> None:
    """Leave the weights of the last stage alone to learn."""
    network.requires_grad_(False)
    find_span(functional_modules(network), None).inside.requires_grad_(True)


def fine_tune(
    network: Classifier,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    images: Images,
    epochs: int,
    frozen: bool,
) -> float:
    """Seconds of a plain loop in evaluation mode, as post-training has it.

    Every epoch is judged on validation and leaves a state to go on from, there as here.
    """
    network = copy.deepcopy(network)
    if frozen:
        with_frozen(network)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-5, fused=True)
    started = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            loss = F.cross_entropy(network(inputs[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        judge_images(network, images, "val", SIZE, torch.device("cpu"))
        with tempfile.TemporaryFile() as file:
            torch.save([network.state_dict(), optimizer.state_dict()], file)
    return time.perf_counter() - started


def own_training(span: Span, images: Images, epochs: int) -> tuple[float, float]:
    """Seconds for the targets and for the training from them, validation included."""
    plan = PosttrainPlan("local", epochs, BATCH, 5e-5, "constant", 5e-2)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        write_targets(launch(), span, images, TARGETS, Path(folder), Reporters())
        targets = time.perf_counter() - started
        with Stores.open(Path(folder)) as stores:
            job = Job("frp", 0.0, 0)
            train_span(span, stores, plan, job, Path(folder) / "job", torch.device("cpu"))
    return targets, time.perf_counter() - started - targets


def make_targets(span: Span, images: Images) -> None:
    """What `own_training` trains from, not kept."""
    with tempfile.TemporaryDirectory() as folder:
        write_targets(launch(), span, images, TARGETS, Path(folder), Reporters())


def cost(step: Callable[[], object], images: int = BATCH) -> float:
    """Multiply-adds of a step in millions for each image."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 2 / images / 1e6


if __name__ == "__main__":
    main()
