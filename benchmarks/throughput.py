"""Images per second of training and of feature maps, beside a plain loop; the share of the peak.

    python benchmarks/throughput.py --backbone resnet50 --size 224            # print the table
    python benchmarks/throughput.py --backbone resnet50 --size 224 --write    # and keep it

Takes a GPU where there is one (bf16, channels_last), else the CPU in float32. The plain loop is
that of torchvision's references: pictures from files, decoded and augmented by DataLoader's
workers. The peak is the faster of a large matrix product and a large 3x3 convolution in the same
run and type; the share counts two operations a multiply-add, three passes in training and one for
maps.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fmce_ops.data import Augment, Images, TrainBatches, prepare
from fmce_ops.files import write_text
from fmce_ops.models import Classifier, build, feature_shape, save_weights
from fmce_ops.training.classifier import Plan, Validation, train_classifier
from fmce_ops.training.devices import launch, load
from fmce_ops.training.features import Extraction, extract
from fmce_ops.training.reporter import Row
from lightning_fabric import Fabric
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

from machine import commit, cores
from replicate import count

CLASSES = 10


class Speeds:
    """Keeps the images per second that a loop tells."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def begin(self, task: str, total: int) -> None:
        """A loop starts."""

    def row(self, row: Row) -> None:
        """A step is done."""
        self.found.append(row.values["images_per_second"])


class Bench:
    """The same network and the same pictures for every loop."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        gpu = torch.cuda.is_available()
        self.fabric: Fabric = launch("bf16-mixed" if gpu else "32-true")
        self.device = self.fabric.device
        make_pictures(folder / "raw", given.images, given.side)
        prepare(
            "image-folder",
            folder / "images.h5",
            root=folder / "raw",
            image_size=given.side,
            per_class=None,
            validation=0.1,
            test=0.1,
            seed=0,
        )

    def network(self) -> Classifier:
        """With the weights of seed 0."""
        torch.manual_seed(0)
        return build(self.given.backbone, CLASSES, in_size=self.given.size)

    def ours(self, compiled: bool) -> float:
        """Training, as the stage ``train`` does it: the median epoch but the first."""
        given, network, speeds = self.given, self.network(), Speeds()
        if compiled:
            network.compile()
        with Images.open(self.folder / "images.h5") as images:
            seen = {"size": given.size, "mean": images.mean, "std": images.std}
            train = load(self.fabric, images, "train")
            augment = Augment(pad=given.size // 8, flip=True)
            batches = TrainBatches(
                *train, batch_size=given.batch_size, augment=augment, seed=0, **seen
            )
            plan = Plan(given.epochs + 1, 1, "adam", 1e-3, 0.0, "cosine", 0)
            held_out = Validation(*load(self.fabric, images, "val"), **seen)
            with tempfile.TemporaryDirectory() as work:
                train_classifier(self.fabric, network, batches, held_out, plan, Path(work), speeds)
        return statistics.median(speeds.found[1:])

    def plain(self) -> float:
        """Training as torchvision's references do it."""
        network = self.network().to(self.device).train()
        optimizer = torch.optim.Adam(network.parameters())

        def step(inputs: torch.Tensor, labels: torch.Tensor) -> None:
            with self.fabric.autocast():
                loss = F.cross_entropy(network(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return self._over_loader(step, augmented=True)

    def maps(self) -> float:
        """Feature maps into shards, as the stage ``features`` makes them."""
        network, speeds = self.network(), Speeds()
        paths = []
        for phase in range(1, self.given.epochs + 2):
            paths.append(self.folder / f"{phase}.safetensors")
            save_weights(paths[-1], network.state_dict(), {})
        shape = feature_shape(network, self.given.size)
        with (
            Images.open(self.folder / "images.h5") as images,
            tempfile.TemporaryDirectory() as store,
        ):
            form = Extraction(
                shape, "float16", None, self.given.images, self.given.batch_size, self.given.size
            )
            extract(self.fabric, network, paths, images, form, Path(store), speeds)
        return statistics.median(speeds.found[1:])

    @torch.inference_mode()
    def plain_maps(self) -> float:
        """Feature maps into one array file, batch after batch."""
        network = self.network().to(self.device).eval()
        with (self.folder / "maps.bin").open("wb") as file:

            def step(inputs: torch.Tensor, labels: torch.Tensor) -> None:
                with self.fabric.autocast():
                    file.write(network.features(inputs).half().cpu().numpy().tobytes())

            return self._over_loader(step, augmented=False)

    def _over_loader(
        self, step: Callable[[torch.Tensor, torch.Tensor], None], augmented: bool
    ) -> float:
        size = self.given.size
        words = [transforms.Resize((size, size))]
        if augmented:
            words += [transforms.RandomCrop(size, size // 8), transforms.RandomHorizontalFlip()]
        words += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
        pictures = ImageFolder(self.folder / "raw" / "train", transforms.Compose(words))
        loader = DataLoader(
            pictures,
            batch_size=self.given.batch_size,
            shuffle=augmented,
            num_workers=self.given.workers,
            pin_memory=self.device.type == "cuda",
            drop_last=True,
            persistent_workers=self.given.workers > 0,
        )
        speeds = []
        for _ in range(self.given.epochs + 1):
            started, count = time.perf_counter(), 0
            for inputs, labels in loader:
                step(
                    inputs.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
                count += len(labels)
            self._wait()
            speeds.append(count / (time.perf_counter() - started))
        return statistics.median(speeds[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> float:
        """Operations per second of a large matrix product or convolution, whichever is faster."""
        gpu = self.device.type == "cuda"
        kind = torch.bfloat16 if gpu else torch.float32
        side, count, channels, width = (8192, 256, 512, 28) if gpu else (2048, 16, 256, 32)
        a = torch.randn(side, side, device=self.device, dtype=kind)
        x = torch.randn(count, channels, width, width, device=self.device, dtype=kind)
        w = torch.randn(channels, channels, 3, 3, device=self.device, dtype=kind)
        with torch.no_grad():
            product = self._rate(lambda: a @ a, 2 * side**3)
            folded = self._rate(lambda: F.conv2d(x, w, padding=1), 18 * x.numel() * channels)
        return max(product, folded)

    def _rate(self, work: Callable[[], object], operations: float) -> float:
        times = []
        for _ in range(10):
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - started)
        return operations / min(times)

    def operations(self) -> int:
        """Of one image forward, two for a multiply-add."""
        network = self.network().eval()
        example = torch.zeros(1, 3, self.given.size, self.given.size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(example)
        return int(counter.get_total_flops())


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Noise in PNG files, a few of them for validation and test."""
    generator = np.random.default_rng(0)
    for split, some in (("train", count), ("val", CLASSES), ("test", CLASSES)):
        for number in range(some):
            place = folder / split / str(number % CLASSES)
            place.mkdir(parents=True, exist_ok=True)
            noise = generator.integers(0, 256, (side, side, 3), "uint8")
            Image.fromarray(noise).save(place / f"{number:06d}.png")


def report(given: argparse.Namespace) -> str:
    """The table."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(given, Path(name))
        peak, operations = bench.peak(), bench.operations()
        rows = [
            ("training", "ours", bench.ours(compiled=False), 3),
            ("training", "plain", bench.plain(), 3),
            ("maps", "ours, into shards", bench.maps(), 1),
            ("maps", "plain, into one file", bench.plain_maps(), 1),
        ]
        if given.compile:
            rows.insert(1, ("training", "ours, torch.compile", bench.ours(compiled=True), 3))
        device = bench.device
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if gpu else f"{os.cpu_count()} CPU cores"
    kind = "bf16" if gpu else "float32"
    plain = {what: speed for what, loop, speed, _ in rows if loop.startswith("plain")}
    lines = [
        f"| {what} | {loop} | {speed:.0f} | {speed / plain[what]:.2f} | "
        f"{speed * operations * passes / peak:.1%} |"
        for what, loop, speed, passes in rows
    ]
    told = ("backbone", "size", "side", "images", "batch_size", "epochs", "workers")
    words = [f"--{name.replace('_', '-')} {getattr(given, name)}" for name in told]
    words += ["--compile"] if given.compile else []
    return f"""## {given.backbone}, {given.size} px, on {where}

`python benchmarks/throughput.py {" ".join(words)} --write`; {cores()}; commit {commit()}; {kind}, \
batch {given.batch_size}, {given.images} pictures of {given.side} px, {given.workers} workers in \
the plain loop, torch {torch.__version__}; the faster of a matrix product and a \
convolution reaches {peak / 1e12:.2f} T operations a second.

| what | loop | images per second | over plain | share of the peak |
|---|---|---|---|---|
{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="shufflenet_v2_x1_0")
    parser.add_argument("--size", type=count, default=64, help="px that the network sees")
    parser.add_argument("--side", type=count, default=32, help="px of the pictures")
    parser.add_argument("--images", type=count, default=1024)
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--epochs", type=count, default=3, help="that are timed, behind a first")
    parser.add_argument("--workers", type=int, default=min(16, (os.cpu_count() or 2) - 1))
    parser.add_argument("--compile", action="store_true", help="a row with torch.compile")
    parser.add_argument("--write", action="store_true", help="keep the table in throughput.md")
    given = parser.parse_args()
    text = report(given)
    print(text)
    if given.write:
        path = Path(__file__).with_suffix(".md")
        known = path.read_text() if path.exists() else "# Throughput\n\n"
        head, *sections = known.split("\n## ")
        title = text.split("\n")[0][3:]
        kept = [f"## {section.strip()}\n" for section in sections if not section.startswith(title)]
        write_text(path, "\n".join([head.strip() + "\n", *kept, text]))


if __name__ == "__main__":
    main()
