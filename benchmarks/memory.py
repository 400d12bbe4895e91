"""Peak memory of the stages features and fmce with N images and with ten times as many.

    python benchmarks/memory.py            # prints the table
    python benchmarks/memory.py --write    # and keeps it in benchmarks/memory.md

Each measurement is a process of its own; the peak is the kernel's own figure for that process. The
larger store is larger than the peak, so that memory that grew with the images would be seen.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from fmce_ops.files import write_json

from machine import cores

IMAGES, PHASES, SHAPE = 1000, 3, (1024, 7, 7)  # at 10x: 3.0 GB of maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the table in memory.md")
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "IMAGES", "FOLDER"))
    options = parser.parse_args()
    if options.child:
        stage, images, folder = options.child
        {"features": features, "fmce": fmce}[stage](int(images), Path(folder))
        return
    text = report()
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def report() -> str:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peaks = {
            (stage, n): peak(stage, n, Path(folder) / str(n))
            for n in (IMAGES, 10 * IMAGES)
            for stage in ("features", "fmce")
        }
    for stage in ("features", "fmce"):
        small, large = peaks[stage, IMAGES], peaks[stage, 10 * IMAGES]
        rows.append(f"| {stage} | {small:.0f} | {large:.0f} | {large / small:.2f} | at most 1.2 |")
    maps = 10 * IMAGES * PHASES * SHAPE[0] * SHAPE[1] * SHAPE[2] * 2 / 2**20
    table = "\n".join(rows)
    return f"""# Memory

`python benchmarks/memory.py --write`; {cores()}. Peak resident memory of the \
process in MiB for {IMAGES} and for \
{10 * IMAGES} images, {PHASES} phases of {" x ".join(map(str, SHAPE))} float16; at the larger size \
the maps are {maps:.0f} MiB.

| stage | {IMAGES} images | {10 * IMAGES} images | ratio | goal |
|---|---|---|---|---|
{table}
"""


def peak(stage: str, images: int, folder: Path) -> float:
    """MiB at the peak of a process that does one stage."""
    words = [sys.executable, __file__, "--child", stage, str(images), str(folder)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) / 1024


def features(images: int, folder: Path) -> None:
    """Extract with a network of random weights at every phase."""
    import numpy as np
    import torch
    from fmce_ops.data import Images, prepare
    from fmce_ops.models import build, save_weights
    from fmce_ops.shards import Manifest
    from fmce_ops.training.devices import launch
    from fmce_ops.training.features import Extraction, extract
    from fmce_ops.training.reporter import Reporters

    folder.mkdir()
    pictures = folder / "raw" / "train"
    _write_pictures(pictures, images, np.random.default_rng(0))
    prepare(
        "image-folder",
        folder / "images.h5",
        root=pictures.parent,
        image_size=56,
        per_class=None,
        validation=0.01,
        test=0.01,
        seed=0,
    )
    network = build("shufflenet_v2_x0_5", 2, stem="small", in_size=56)
    checkpoints = []
    for phase in range(1, PHASES + 1):
        torch.manual_seed(phase)
        checkpoints.append(folder / f"{phase}.safetensors")
        save_weights(checkpoints[-1], network.state_dict(), {})
    settings = Extraction(SHAPE, "float16", None, 1024, 64, 56)
    store = folder / "store"
    with Images.open(folder / "images.h5") as source:
        shards = extract(launch(), network, checkpoints, source, settings, store, Reporters())
        count = source.counts["train"]
    Manifest("float16", None, SHAPE, PHASES, count, tuple(shards)).save(store)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _write_pictures(folder: Path, count: int, generator: object) -> None:
    from PIL import Image

    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
    for number in range(count):
        noise = generator.integers(0, 256, (14, 14), "uint8")
        Image.fromarray(noise).save(folder / "ab"[number % 2] / f"{number:06d}.png")


def fmce(images: int, folder: Path) -> None:
    """Open the store, which checks every byte, and train on a part of its rows drawn from all."""
    import numpy as np
    from fmce_ops.models import FmceNet
    from fmce_ops.shards import ShardStore, split_by_image
    from fmce_ops.training.devices import launch
    from fmce_ops.training.fmce import FmcePlan, train_fmce
    from fmce_ops.training.reporter import Reporters

    with ShardStore.open(folder / "store") as store:
        manifest = store.manifest
        split = split_by_image(manifest.images, PHASES, 0.25, 0.1, 0)
        network = FmceNet(SHAPE, PHASES)
        train = split.train[:: max(1, len(split.train) // 512)]  # the CPU is slow, the store large
        work = folder / "work"
        train_fmce(
            launch(),
            network,
            store,
            train,
            split.validation,
            FmcePlan(1, 64, 1e-3, 0),
            work,
            Reporters(),
        )
        for phase in range(1, PHASES + 1):
            assert all(np.isfinite(maps).all() for maps in store.scan(phase))
    write_json(folder / "done.json", True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main()
