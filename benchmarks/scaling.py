"""Time, disk and memory of a cell with more images, more phases and more processes.

    python benchmarks/scaling.py            # prints the table
    python benchmarks/scaling.py --write    # and keeps it in benchmarks/scaling.md

Each row is a run of its own: one epoch of the original task, the feature maps of every phase, one
epoch of FMCE-Net on all of them. Memory is the kernel's figure for the largest process.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fmce_ops.data import Augment, Images, TrainBatches, prepare
from fmce_ops.files import write_json
from fmce_ops.models import FmceNet, build, feature_shape, save_weights
from fmce_ops.shards import Manifest, ShardStore, split_by_image
from fmce_ops.training.classifier import Plan, Validation, train_classifier
from fmce_ops.training.devices import launch
from fmce_ops.training.features import Extraction, extract
from fmce_ops.training.fmce import FmcePlan, train_fmce
from fmce_ops.training.reporter import Reporters
from PIL import Image

from machine import commit, cores

SIZE, BATCH = 64, 64
STEPS = ("train", "features", "fmce")


@dataclass(frozen=True)
class Case:
    """How much, on what."""

    images: int = 500
    phases: int = 2
    processes: int = 1
    threads: int = 1

    @property
    def name(self) -> str:
        each = "thread" if self.threads == 1 else "threads"
        many = "process" if self.processes == 1 else "processes"
        return f"{self.images} | {self.phases} | {self.processes} {many}, {self.threads} {each}"


CASES = [
    *(Case(images=500 * factor) for factor in (1, 2, 4, 10)),
    *(Case(phases=2 * factor) for factor in (2, 4, 10)),
    Case(images=2000, threads=2),
    Case(images=2000, processes=2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table")
    parser.add_argument("--child", nargs=2, metavar=("PHASES", "FOLDER"))
    given = parser.parse_args()
    if given.child:
        work(int(given.child[0]), Path(given.child[1]))
        return
    text = report()
    print(text)
    if given.write:
        Path(__file__).with_suffix(".md").write_text(text)


def report() -> str:
    """The table."""
    found = [measured(case) for case in CASES]
    rows = []
    for case, facts in zip(CASES, found, strict=True):
        seconds = " | ".join(f"{facts[step]:.1f}" for step in STEPS)
        disk, memory = facts["bytes"] / 2**20, facts["memory"] / 1024
        rows.append(f"| {case.name} | {seconds} | {disk:.0f} | {memory:.0f} |")
    return f"""# Larger cells

`python benchmarks/scaling.py --write`; {cores()}; commit {commit()}, torch {torch.__version__}. \
ShuffleNet V2 x0.5 at {SIZE} px, images of noise, one epoch each of the original task and of \
FMCE-Net; seconds without the start of the process, MiB of shards, MiB of memory at the peak of \
the largest process.

| images | phases | on | train, s | features, s | fmce, s | disk, MiB | memory, MiB |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def measured(case: Case) -> dict[str, float]:
    """Seconds of each step, bytes of the maps and KiB of memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder, case.images)
        words = [str(Path(__file__).resolve()), "--child", str(case.phases), str(folder)]
        if case.processes > 1:
            fabric = Path(sys.executable).with_name("fabric")
            many = ["--devices", str(case.processes), "--strategy", "ddp"]
            words = [str(fabric), "run", "--accelerator", "cpu", *many, *words]
        else:
            words = [sys.executable, *words]
        threads = {"OMP_NUM_THREADS": str(case.threads)}
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, **threads})
        ranks = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    assert len(ranks) == case.processes
    facts = {key: max(rank[key] for rank in ranks) for key in (*STEPS, "memory")}
    return {**facts, "bytes": ranks[0]["bytes"]}


def make_images(folder: Path, count: int) -> None:
    """As many training images; a few more for validation and test."""
    generator = np.random.default_rng(0)
    for split, some in (("train", count), ("val", 20), ("test", 20)):
        for label in ("a", "b"):
            (folder / "raw" / split / label).mkdir(parents=True)
        for number in range(some):
            noise = generator.integers(0, 256, (16, 16), "uint8")
            path = folder / "raw" / split / "ab"[number % 2] / f"{number:06d}.png"
            Image.fromarray(noise).save(path)
    shares = {"per_class": None, "validation": 0.1, "test": 0.1, "seed": 0}
    prepare("image-folder", folder / "images.h5", root=folder / "raw", image_size=SIZE, **shares)


def work(phases: int, folder: Path) -> None:
    """All three steps, in this process and those beside it."""
    fabric = launch()
    seconds: dict[str, float] = {}
    network = build("shufflenet_v2_x0_5", 2, in_size=SIZE)
    rank, world = fabric.global_rank, fabric.world_size

    @contextmanager
    def clock(step: str) -> Iterator[None]:
        fabric.barrier()
        started = time.perf_counter()
        yield
        fabric.barrier()
        seconds[step] = time.perf_counter() - started

    with Images.open(folder / "images.h5") as images:
        form = {"size": SIZE, "mean": images.mean, "std": images.std}
        batches = TrainBatches(
            *images.load("train"),
            batch_size=BATCH,
            augment=Augment(pad=4),
            seed=0,
            rank=rank,
            world=world,
            **form,
        )
        plan = Plan(1, 1, "adam", 1e-3, 0.0, "cosine", 0)
        held_out = Validation(*images.load("val"), **form)
        with clock("train"):
            train_classifier(
                fabric, network, batches, held_out, plan, folder / "train", Reporters()
            )
        checkpoints = [folder / f"{phase}.safetensors" for phase in range(1, phases + 1)]
        if rank == 0:
            for path in checkpoints:
                save_weights(path, network.state_dict(), {})
        shape = feature_shape(network.cpu(), SIZE)
        settings = Extraction(shape, "float16", None, 250, BATCH, SIZE)
        with clock("features"):
            shards = extract(
                fabric, network, checkpoints, images, settings, folder / "maps", Reporters()
            )
        count = images.counts["train"]
    if rank == 0:
        Manifest("float16", None, shape, phases, count, tuple(shards)).save(folder / "maps")
    fabric.barrier()
    with ShardStore.open(folder / "maps") as store:
        split = split_by_image(count, phases, 0.25, 0.02, 0)
        torch.manual_seed(0)
        judge = FmceNet(shape, phases)
        once = FmcePlan(1, BATCH, 1e-3, 0)
        with clock("fmce"):
            where = folder / "fmce"
            train_fmce(
                fabric, judge, store, split.train, split.validation, once, where, Reporters()
            )
        size = sum(shard.bytes for shard in store.manifest.shards)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_json(folder / f"rank-{rank}.json", {**seconds, "bytes": size, "memory": memory})


if __name__ == "__main__":
    main()
