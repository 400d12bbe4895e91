"""FMCS data: the feature maps that the backbone makes of the training images at every phase."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from fmce_ops.data import Images, to_input
from fmce_ops.models import Classifier, load_into
from fmce_ops.shards import Shard, ShardWriter, existing
from fmce_ops.training.reporter import Reporter, Row


@dataclass(frozen=True)
class Extraction:
    """What to extract and how to store it."""

    shape: tuple[int, int, int]
    dtype: str
    compression: str | None
    images_per_shard: int
    batch_size: int
    size: int  # px, the side that the network sees


@dataclass(frozen=True)
class _Part:
    """The images ``start`` up to ``start + count`` in one phase."""

    phase: int
    part: int
    start: int
    count: int


def extract(
    fabric: Fabric,
    classifier: Classifier,
    checkpoints: list[Path],
    images: Images,
    settings: Extraction,
    folder: Path,
    reporter: Reporter,
    chosen: range | None = None,
) -> list[Shard]:
    """Write one shard for each phase and part; those that are whole already are kept.

    ``chosen`` are the training images whose maps are made, in one piece; all of them if not given.
    With several processes each writes its share of the parts. Batches never cross a part, so the
    bytes of a shard do not depend on what was done before or by whom.

    Returns
    -------
    The records of all shards, sorted by phase and part, on every process.
    """
    classifier.to(fabric.device).to(memory_format=torch.channels_last).eval()
    rows = range(images.counts["train"]) if chosen is None else chosen
    parts = list(_parts(len(checkpoints), len(rows), settings.images_per_shard))
    mine = parts[fabric.global_rank :: fabric.world_size]
    reporter.begin("features", len(mine))
    loaded, shards = 0, []
    for step, part in enumerate(mine, start=1):
        started = time.perf_counter()
        shard = kept = existing(folder, **_layout(part, settings))
        if shard is None:
            if loaded != part.phase:
                load_into(classifier, checkpoints[part.phase - 1])
                loaded = part.phase
            shard = _write(fabric, classifier, images, rows.start, part, settings, folder)
        shards.append(shard)
        speed = part.count / (time.perf_counter() - started)
        values = {"phase": float(part.phase), "images_per_second": speed}
        now = time.time_ns() // 1_000_000
        reporter.row(Row(step, values, now, again=kept is not None))
    return sorted(_gathered(fabric, shards), key=lambda shard: (shard.phase, shard.part))


def _gathered(fabric: Fabric, mine: list[Shard]) -> list[Shard]:
    if fabric.world_size == 1:
        return mine
    everyones: list[list[Shard]] = [[] for _ in range(fabric.world_size)]
    torch.distributed.all_gather_object(everyones, mine)
    return [shard for shards in everyones for shard in shards]


def _parts(phases: int, images: int, per_shard: int) -> Iterator[_Part]:
    for phase in range(1, phases + 1):
        for part, start in enumerate(range(0, images, per_shard)):
            yield _Part(phase, part, start, min(per_shard, images - start))


def _layout(part: _Part, settings: Extraction) -> dict[str, Any]:
    """What the writer and its check of an existing shard are both told."""
    return {
        **asdict(part),
        "shape": settings.shape,
        "dtype": settings.dtype,
        "compression": settings.compression,
    }


def _write(
    fabric: Fabric,
    classifier: Classifier,
    images: Images,
    first: int,
    part: _Part,
    settings: Extraction,
    folder: Path,
) -> Shard:
    begin, end = first + part.start, first + part.start + part.count
    writer = ShardWriter(folder, **_layout(part, settings))
    with writer, _appending(writer, fabric.device) as append:
        for start in range(begin, end, settings.batch_size):
            pixels, labels = images.read("train", start, min(start + settings.batch_size, end))
            maps = _maps(fabric, classifier, pixels, images, settings)
            append(maps, torch.arange(start, start + len(labels)).numpy(), labels.numpy())
    return writer.close()


@contextmanager
def _appending(writer: ShardWriter, device: torch.device) -> Iterator[Callable[..., None]]:
    """On a GPU the next maps are made while the last ones go to the disk.

    On a CPU making and writing would take the cores from each other, and both would take longer.
    """
    if device.type != "cuda":
        yield writer.append
        return
    written: Future[None] | None = None

    def append(*maps: Any) -> None:
        nonlocal written
        if written:
            written.result()
        written = disk.submit(writer.append, *maps)

    with ThreadPoolExecutor(1) as disk:
        yield append
        if written:
            written.result()


@torch.inference_mode()
def _maps(
    fabric: Fabric, classifier: Classifier, pixels: Tensor, images: Images, settings: Extraction
) -> Tensor:
    inputs = to_input(
        fabric.to_device(pixels), size=settings.size, mean=images.mean, std=images.std
    )
    with fabric.autocast():
        return classifier.features(inputs)
