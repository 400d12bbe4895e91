"""Figures of a store for a table, from its manifest alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmce_ops.shards.manifest import Manifest


@dataclass(frozen=True)
class PhaseSize:
    """Shards, maps and bytes on disk of one phase."""

    phase: int
    shards: int
    maps: int
    bytes: int


@dataclass(frozen=True)
class Description:
    """What a store holds.

    Attributes
    ----------
    phases : tuple of PhaseSize
    images, shards, maps, bytes : int
        Totals; ``bytes`` on disk, without the manifest.
    shape : tuple of int
        Of one map.
    dtype : str
    compression : str or None
    ratio : float
        Bytes of the maps before compression, per byte on disk.
    digest : str
        md5 of the manifest.
    provenance : dict
    """

    phases: tuple[PhaseSize, ...]
    images: int
    shards: int
    maps: int
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    compression: str | None
    ratio: float
    digest: str
    provenance: dict[str, Any]


def describe(folder: Path) -> Description:
    """Read the manifest in ``folder`` and sum up; the shards are not touched.

    Raises
    ------
    ShardError
        The manifest is missing or makes no sense.
    """
    manifest = Manifest.load(folder)
    phases = tuple(_phase_size(manifest, phase) for phase in range(1, manifest.phases + 1))
    maps = manifest.phases * manifest.images
    size = sum(phase.bytes for phase in phases)
    return Description(
        phases=phases,
        images=manifest.images,
        shards=len(manifest.shards),
        maps=maps,
        bytes=size,
        shape=manifest.shape,
        dtype=manifest.dtype,
        compression=manifest.compression,
        ratio=maps * manifest.map_bytes / size,
        digest=manifest.digest,
        provenance=manifest.provenance,
    )


def _phase_size(manifest: Manifest, phase: int) -> PhaseSize:
    shards = [shard for shard in manifest.shards if shard.phase == phase]
    size = sum(shard.bytes for shard in shards)
    return PhaseSize(phase, len(shards), sum(shard.count for shard in shards), size)
