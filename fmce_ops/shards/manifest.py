"""The manifest: the one file that says which shards make up a store, and vouches for each."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmce_ops.errors import ShardError
from fmce_ops.files import remove_leftovers, write_text

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = ("float16", "float32")
COMPRESSIONS = (None, "zstd")
_LIMIT = 2**48  # no count or size of an honest store comes near it; products stay exact
_ITEM_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Shard:
    """One whole file of a store, as the manifest vouches for it.

    Attributes
    ----------
    file : str
        Name inside the store's folder.
    phase, part : int
        Phase counts from 1, the parts of a phase from 0.
    start, count : int
        The shard holds positions ``start`` to ``start + count - 1`` of its phase.
    bytes : int
        Size of the file.
    sha256 : str
        Hex digest of the whole file.
    """

    file: str
    phase: int
    part: int
    start: int
    count: int
    bytes: int
    sha256: str


def shard_file(phase: int, part: int) -> str:
    """Name of a shard inside its folder, e.g. ``phase-01-part-0000.h5``."""
    return f"phase-{phase:02d}-part-{part:04d}.h5"


@dataclass(frozen=True)
class Manifest:
    """What a store holds: ``phases`` x ``images`` maps of one shape.

    Attributes
    ----------
    dtype : {"float16", "float32"}
    compression : {None, "zstd"}
    shape : tuple of int
        Shape of one map, e.g. ``(C, H, W)``.
    phases, images : int
        Every image has one map in every phase.
    shards : tuple of Shard
        Sorted by phase and part; the parts of each phase cover the images without gap.
    classes : int or None
        Number of classes that the labels count, where that is known.
    provenance : dict
        Where the maps come from; anything that JSON can hold.
    format : int
        Version of the layout.

    Raises
    ------
    ShardError
        A value is not what it must be, or the shards do not cover every map exactly once.
    """

    dtype: str
    compression: str | None
    shape: tuple[int, ...]
    phases: int
    images: int
    shards: tuple[Shard, ...]
    classes: int | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        _check_values(self)
        _check_cover(self)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check ``folder/manifest.json``.

        Raises
        ------
        ShardError
            The file is missing, is not exactly what `save` writes, or makes no sense.
        """
        path = Path(folder) / MANIFEST
        try:
            text = _read(path)
            manifest = _parse(text)
            # Also finds what a parser forgives: a key given twice, 1.0 for 1, bytes at the end.
            _check(manifest._text() == text, "has a manifest that was edited by hand")
        except ShardError as error:
            raise ShardError(
                f"{path} cannot be used ({error}): restore the folder or make the store again."
            ) from error
        return manifest

    def save(self, folder: Path) -> None:
        """Write ``folder/manifest.json``, whole or not at all."""
        remove_leftovers(Path(folder) / MANIFEST)  # they would be surplus in the store
        write_text(Path(folder) / MANIFEST, self._text())

    @property
    def digest(self) -> str:
        """md5 of the bytes of ``manifest.json``; as the shards' digests are in it, of the store."""
        return hashlib.md5(self._text().encode(), usedforsecurity=False).hexdigest()

    @property
    def map_bytes(self) -> int:
        """Bytes of one map before compression."""
        return map_bytes(self.shape, self.dtype)

    def _text(self) -> str:
        tree = dataclasses.asdict(self)
        try:
            return json.dumps(tree, indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ShardError(
                f"The provenance of a store cannot be written as JSON ({error}): "
                "give it plain values, and no NaN."
            ) from error


def map_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one map before compression."""
    return math.prod(shape) * _ITEM_BYTES[dtype]


def check_layout(dtype: str, compression: str | None, shape: tuple[int, ...]) -> None:
    """Raise `ShardError` unless maps of this kind can be stored."""
    _check(dtype in DTYPES, f"has dtype {dtype!r}, not one of {', '.join(DTYPES)}")
    _check(compression in COMPRESSIONS, f"has compression {compression!r}, not zstd or none")
    _check(
        1 <= len(shape) <= 4 and all(_is_count(side, 1) for side in shape),
        f"has the map shape {shape!r}, not one to four positive numbers",
    )
    _check(map_bytes(shape, dtype) < _LIMIT, f"has the absurd map shape {shape!r}")


def _check_values(manifest: Manifest) -> None:
    _check(
        type(manifest.format) is int and manifest.format == FORMAT,
        f"has format {manifest.format!r}, and this version reads format {FORMAT}",
    )
    check_layout(manifest.dtype, manifest.compression, manifest.shape)
    for name in ("phases", "images"):
        value = getattr(manifest, name)
        _check(_is_count(value, 1), f"has {name} {value!r}, not a sensible positive number")
    classes = manifest.classes
    _check(classes is None or _is_count(classes, 1), f"has classes {classes!r}, not a number")
    _check(type(manifest.provenance) is dict, "has a provenance that is not a dictionary")
    for shard in manifest.shards:
        _check_shard(shard)


def _check_shard(shard: Shard) -> None:
    for name, least in (("phase", 1), ("part", 0), ("start", 0), ("count", 1), ("bytes", 1)):
        value = getattr(shard, name)
        _check(_is_count(value, least), f"gives {shard.file!r} the {name} {value!r}")
    expected = shard_file(shard.phase, shard.part)
    _check(shard.file == expected, f"names a shard {shard.file!r} where {expected!r} belongs")
    digest = shard.sha256
    _check(
        isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef"),
        f"gives {shard.file!r} a sha256 that is none",
    )


def _check_cover(manifest: Manifest) -> None:
    """The shards must follow one another, phase by phase, without gap, overlap or repeat."""
    phase, part, row = 1, 0, 0
    for shard in manifest.shards:
        if row == manifest.images:
            phase, part, row = phase + 1, 0, 0
        _check(
            (shard.phase, shard.part, shard.start) == (phase, part, row),
            f"lists {shard.file!r} from row {shard.start} "
            f"where {shard_file(phase, part)!r} from row {row} belongs",
        )
        part, row = part + 1, row + shard.count
        _check(row <= manifest.images, f"gives {shard.file!r} rows beyond the last image")
    _check(
        (phase, row) == (manifest.phases, manifest.images),
        f"lists shards up to phase {phase}, row {row}, "
        f"not phase {manifest.phases}, row {manifest.images}",
    )


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ShardError(f"the store {problem}")


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value < _LIMIT


def _read(path: Path) -> str:
    _check(path.exists(), "has no manifest")
    _check(path.is_file() and not path.is_symlink(), "has a manifest that is no plain file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"the manifest cannot be read: {error}") from error


def _parse(text: str) -> Manifest:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError("the manifest is not JSON") from error
    values = _fields(Manifest, tree)
    values["shape"] = tuple(_list(values["shape"], "shape"))
    shards = [_fields(Shard, item) for item in _list(values["shards"], "shards")]
    values["shards"] = tuple(Shard(**shard) for shard in shards)
    return Manifest(**values)


def _fields(kind: type[Manifest] | type[Shard], tree: object) -> dict[str, Any]:
    """The values of ``tree``, once it has exactly the fields of ``kind``."""
    if not isinstance(tree, dict):
        raise ShardError(f"the store has {type(tree).__name__} for a {kind.__name__}")
    wrong = sorted({field.name for field in dataclasses.fields(kind)} ^ set(tree))
    _check(not wrong, f"has unknown or missing fields: {', '.join(map(repr, wrong))}")
    return dict(tree)


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ShardError(f"the store has {name} that are not a list")
    return value
