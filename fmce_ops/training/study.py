"""A run as data: what is read of its modules' feature maps at checkpoints of known maturity."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fmce_ops.errors import ShardError
from fmce_ops.maturity import (
    DESCRIPTORS,
    FEW,
    SIZES,
    FunctionalModule,
    describe_bags,
    describe_views,
    find_modules,
    module_maps,
    restarted,
    views,
)
from fmce_ops.models import Classifier, load_into
from fmce_ops.shards import Manifest, Shard, ShardStore, ShardWriter, existing
from fmce_ops.training.maturity import StudiedRun
from fmce_ops.training.reporter import Reporter, Row

_SINGLE = 32  # images that are described one by one, as a map alone and by their views


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a point of a run, and how mature the run was: 0 to 1."""

    file: Path
    point: int
    maturity: float


def choose_points(maturity: Sequence[float], count: int) -> list[int]:
    """At most ``count`` 1-based points of a run, spread evenly over its maturity.

    The first point that reaches each of ``count`` equal steps from 0 to 1.
    """
    curve = np.asarray(maturity)
    wanted = np.linspace(0, curve.max(), count)
    return sorted({int(np.argmax(curve >= level - 1e-12)) + 1 for level in wanted})


def bag_sizes(images: int) -> list[int]:
    """Of the bags that are described of so many images.

    Images one by one, the same by their views, and disjoint bags of each of SIZES from FEW on.
    """
    single = [1] * min(images, _SINGLE)
    return single + single + [s for s in SIZES if s >= FEW for _ in range(images // s)]


def describe_run(
    fabric: Fabric,
    classifier: Classifier,
    checkpoints: Sequence[Checkpoint],
    inputs: Tensor,
    folder: Path,
    reporter: Reporter,
    provenance: dict[str, Any],
    *,
    step: int = 0,
) -> Manifest:
    """Write a shard for each checkpoint; those that are whole already are kept.

    A row is a bag of images, its label their count; it holds (2, modules, DESCRIPTORS) in float32,
    of the checkpoint and of the network with random weights.
    The manifest's provenance gets the names of the ``modules``, the ``maturity`` and the ``points``
    of the checkpoints.

    Parameters
    ----------
    inputs : (N, 3, H, W), as the network takes them.
    step : the last that the run has reported before.
    """
    classifier.to(fabric.device).to(memory_format=torch.channels_last).eval()
    inputs = fabric.to_device(inputs)
    modules = find_modules(classifier, inputs)
    sizes = bag_sizes(len(inputs))
    with restarted(classifier) as possible:
        start = _described(classifier, inputs, modules)
    start = start if possible else torch.full_like(start, torch.nan)
    shape = (2, len(modules), DESCRIPTORS)
    reporter.begin("describe", step + len(checkpoints))
    shards: list[Shard] = []
    for phase, checkpoint in enumerate(checkpoints, start=1):
        layout: dict[str, Any] = {"phase": phase, "part": 0, "start": 0, "count": len(sizes)}
        layout |= {"shape": shape, "dtype": "float32", "compression": None}
        shard = kept = existing(folder, **layout)
        if shard is None:
            load_into(classifier, checkpoint.file)
            bags = _described(classifier, inputs, modules)
            both = torch.stack([bags, start], dim=1)
            with ShardWriter(folder, **layout) as writer:
                writer.append(both, range(len(sizes)), sizes)
            shard = writer.close()
        shards.append(shard)
        values = {"maturity": checkpoint.maturity, "point": float(checkpoint.point)}
        now = time.time_ns() // 1_000_000
        reporter.row(Row(step + phase, values, now, again=kept is not None))
    known = {
        "modules": [module.name for module in modules],
        "maturity": [checkpoint.maturity for checkpoint in checkpoints],
        "points": [checkpoint.point for checkpoint in checkpoints],
    }
    return Manifest(
        dtype="float32",
        compression=None,
        shape=shape,
        phases=len(checkpoints),
        images=len(sizes),
        shards=tuple(shards),
        provenance={**provenance, **known},
    )


def _described(network: nn.Module, inputs: Tensor, modules: Sequence[FunctionalModule]) -> Tensor:
    """Of each bag and module: (bags, modules, DESCRIPTORS)."""
    network.eval()
    single = min(len(inputs), _SINGLE)
    sizes = bag_sizes(len(inputs))
    maps = module_maps(network, inputs, modules)
    bags = torch.stack([describe_bags(m, sizes[:single] + sizes[2 * single :]) for m in maps], 1)
    seen = views(inputs[:single])
    maps = module_maps(network, seen.flatten(0, 1), modules)
    of_one = [describe_views(m.unflatten(0, seen.shape[:2])) for m in maps]
    rows = [bags[:single], torch.stack(of_one, dim=1), bags[single:]]
    return torch.cat(rows).cpu()


def read_run(folder: Path, name: str) -> StudiedRun:
    """The run that :func:`describe_run` described in a store.

    Raises
    ------
    ShardError
        The store is damaged, or holds something else.
    """
    with ShardStore.open(folder) as store:
        manifest = store.manifest
        try:
            modules = tuple(manifest.provenance["modules"])
            maturity = torch.tensor(manifest.provenance["maturity"], dtype=torch.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise _no_run(folder) from error
        if manifest.shape != (2, len(modules), DESCRIPTORS) or maturity.shape != (manifest.phases,):
            raise _no_run(folder)
        rows = [np.concatenate(list(store.scan(k))) for k in range(1, manifest.phases + 1)]
    read = torch.from_numpy(np.stack(rows))
    truth = maturity[:, None].expand(-1, len(modules))
    return StudiedRun(name, modules, read[:, :, 0], read[0, :, 1], truth)


def _no_run(folder: Path) -> ShardError:
    return ShardError(
        f"{folder} does not hold what this version reads of a run: "
        "run 'dvc repro study' to describe it again."
    )
