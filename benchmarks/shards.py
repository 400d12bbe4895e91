"""How fast shards are, as ratios to plain arrays on the same disk.

    python benchmarks/shards.py            # prints the table
    python benchmarks/shards.py --write    # and keeps it in benchmarks/shards.md

Every repetition runs both sides one after the other on the same bytes. Both read from the page
cache, so that the disk does not hide the difference.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from fmce_ops.models import build
from fmce_ops.shards import (
    Manifest,
    RandomBatches,
    ShardStore,
    ShardWriter,
    describe,
    split_by_image,
    verify,
)
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch.nn import functional as F

from machine import cores

SHAPE = (1024, 4, 4)  # ShuffleNet V2 x1.0 on 32 px
IMAGES = 8192  # 256 MiB of maps
BATCH = 256
GATHERED = 32  # batches per repetition

EPOCHS = 3  # of the network whose maps are compressed

Maps = NDArray[np.float16]
Pairs = list[tuple[float, float]]  # seconds, of shards and of what they are compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--write", action="store_true", help="keep the table in shards.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        text = report(Path(folder), options.repetitions)
    print(text)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(text)


def report(folder: Path, repetitions: int) -> str:
    """Markdown with every figure."""
    maps = random_maps(IMAGES)
    rows = [
        write_row(folder, maps, repetitions),
        read_row(folder, maps.nbytes, repetitions),
        gather_row(folder, repetitions),
    ]
    lines = [
        "# Shards: speed",
        "",
        f"{hardware()}. Median of {repetitions} repetitions (lowest to highest), from the page "
        f"cache; {maps.nbytes / 1e6:.0f} MB of {'x'.join(map(str, SHAPE))} float16 maps. "
        "Made with `python benchmarks/shards.py --write`.",
        "",
        "| what | shards | compared with | ratio | goal |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Writing hashes on a second core: with both cores of the same machine kept busy by other "
        "work the first ratio was 0.44 and 0.59 in two runs, below the goal.",
        "",
        check_line(folder, maps.nbytes, repetitions),
        "",
        *zstd_lines(folder / "zstd", repetitions),
    ]
    return "\n".join(lines) + "\n"


def hardware() -> str:
    """One line on what the figures were taken with."""
    versions = f"torch {torch.__version__}, h5py {h5py.__version__}, NumPy {np.__version__}"
    return f"{cores()}, {versions}"


def random_maps(images: int) -> Maps:
    """Maps with the zeros of a ReLU."""
    noise = torch.randn(images, *SHAPE, generator=torch.Generator().manual_seed(0))
    return noise.relu_().half().numpy()


def write_row(folder: Path, maps: Maps, repetitions: int) -> str:
    """Write in batches until the bytes are on the disk."""
    pairs = compare(
        lambda: write_store(folder / "store", maps),
        lambda: write_memmap(folder / "maps.bin", maps),
        repetitions,
    )
    what = "sequential write; fsync, check of values and sha256 included"
    return table_row(what, "NumPy memmap, flushed", pairs, maps.nbytes, goal=0.7)


def write_store(folder: Path, maps: Maps, compression: str | None = None) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # so that both sides begin on free pages
    rows = np.arange(len(maps))
    place = {"phase": 1, "part": 0, "start": 0, "count": len(maps)}
    with ShardWriter(folder, **place, shape=maps.shape[1:], compression=compression) as writer:
        for first in range(0, len(maps), BATCH):
            piece = slice(first, first + BATCH)
            writer.append(maps[piece], rows[piece], rows[piece])
    shards = (writer.close(),)
    Manifest("float16", compression, maps.shape[1:], 1, len(maps), shards).save(folder)


def write_memmap(path: Path, maps: Maps) -> None:
    path.unlink(missing_ok=True)
    flat = np.memmap(path, maps.dtype, "w+", shape=maps.shape)
    for first in range(0, len(maps), BATCH):
        flat[first : first + BATCH] = maps[first : first + BATCH]
    flat.flush()


def read_row(folder: Path, size: int, repetitions: int) -> str:
    """Copy every map into memory, batch by batch, in order."""
    out = np.empty((BATCH, *SHAPE), np.float16)
    with ShardStore.open(folder / "store") as store:

        def read_store() -> None:
            store.close()  # so that opening the file counts
            for first in range(0, IMAGES, BATCH):
                store.batch(1, np.arange(first, first + BATCH), out)

        def read_memmap() -> None:
            flat = np.memmap(folder / "maps.bin", np.float16, "r", shape=(IMAGES, *SHAPE))
            for first in range(0, IMAGES, BATCH):
                out[:] = flat[first : first + BATCH]

        pairs = compare(read_store, read_memmap, repetitions)
    what = "sequential read of a store that was checked when it was opened"
    return table_row(what, "NumPy memmap, copied", pairs, size, goal=0.7)


def gather_row(folder: Path, repetitions: int) -> str:
    """Shuffled batches: draw, read, hand over as tensors."""
    pairs = compare_gather(folder / "store", IMAGES, repetitions)
    what = f"shuffled batches of {BATCH}"
    size = GATHERED * BATCH * int(np.prod(SHAPE)) * 2
    return table_row(what, "h5py fancy index", pairs, size, goal=5)


def compare_gather(folder: Path, images: int, repetitions: int) -> Pairs:
    rows = split_by_image(images, 1, 0, 0, seed=0).train
    drawn = np.random.default_rng(0).choice(images, GATHERED * BATCH, replace=images < IMAGES)
    file = h5py.File(folder / "phase-01-part-0000.h5", "r", locking=False)
    with file, ShardStore.open(folder) as store:

        def gather_store() -> None:
            for _ in RandomBatches(store, rows[drawn], BATCH, seed=0, epoch=0):
                pass

        def gather_h5py() -> None:
            for batch in drawn.reshape(GATHERED, BATCH):
                torch.from_numpy(file["maps"][np.unique(batch)])  # it takes them in order only

        return compare(gather_store, gather_h5py, repetitions)


def check_line(folder: Path, size: int, repetitions: int) -> str:
    """How long a store takes to check before its first use."""
    seconds = statistics.median(timed(lambda: verify(folder / "store")) for _ in range(repetitions))
    return (
        "Opening a store hashes every byte of it once, one shard per core at a time: "
        f"{size / seconds / 1e9:.2f} GB/s for the single shard here."
    )


def zstd_lines(folder: Path, repetitions: int) -> list[str]:
    """What compression saves on real maps, and costs."""
    write_store(folder, digit_maps(), "zstd")
    size = GATHERED * BATCH * int(np.prod(SHAPE)) * 2
    described = describe(folder)
    ours, theirs = zip(*compare_gather(folder, described.images, repetitions), strict=True)
    return [
        f'`compression="zstd"` stores {described.ratio:.2f} times less: '
        f"{described.maps} maps that a ShuffleNet V2 x1.0 makes of the digits of scikit-learn at "
        f"32 px after {EPOCHS} epochs. Shuffled batches then come at "
        f"{rate(ours, size)}, with h5py's fancy index at {rate(theirs, size)}.",
    ]


def digit_maps() -> Maps:
    """Feature maps of a shortly trained network."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    label = torch.tensor(digits.target)
    network = build("shufflenet_v2_x1_0", 10, stem="small", in_size=32)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for chosen in (part for _ in range(EPOCHS) for part in torch.randperm(len(label)).split(128)):
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), label[chosen]).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        return torch.cat([network.features(part) for part in images.split(256)]).half().numpy()


def compare(ours: Callable[[], None], theirs: Callable[[], None], repetitions: int) -> Pairs:
    """Seconds of both, in turn; the first round warms up and does not count."""
    return [(timed(ours), timed(theirs)) for _ in range(repetitions + 1)][1:]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table_row(what: str, other: str, pairs: Pairs, size: int, goal: float) -> str:
    ours, theirs = zip(*pairs, strict=True)
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    ratio = statistics.median(ratios)
    verdict = "met" if ratio >= goal else "**missed**"
    spread = f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    cells = [what, rate(ours, size), f"{other}: {rate(theirs, size)}", spread]
    return f"| {' | '.join(cells)} | >= {goal:g}: {verdict} |"


def rate(seconds: Sequence[float], size: int) -> str:
    return f"{size / statistics.median(seconds) / 1e9:.2f} GB/s"


if __name__ == "__main__":
    main()
