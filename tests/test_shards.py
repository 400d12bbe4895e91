"""What is written is what is read, whatever the shapes, types and batches."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fmce_ops.errors import ShardError
from fmce_ops.shards import (
    Manifest,
    ShardStore,
    ShardWriter,
    describe,
    existing,
    shard_file,
    verify,
)
from hypothesis import given, settings
from hypothesis import strategies as st

FIRST = shard_file(1, 0)


def make_store(
    folder: Path, maps: np.ndarray, parts: Sequence[int] = (), compression: str | None = None
) -> Manifest:
    """Store ``maps``: (phases, images, C, H, W), each phase cut at ``parts``; image i is i + 100
    in its data set and has class i % 10.
    """
    phases, images = maps.shape[:2]
    bounds = [0, *parts, images]
    shards = []
    for phase in range(1, phases + 1):
        for part, (start, stop) in enumerate(pairwise(bounds)):
            place = {"phase": phase, "part": part, "start": start, "count": stop - start}
            kind = {"shape": maps.shape[2:], "dtype": maps.dtype.name, "compression": compression}
            with ShardWriter(folder, **place, **kind) as writer:
                rows = np.arange(start, stop)
                writer.append(maps[phase - 1, start:stop], rows + 100, rows % 10)
            shards.append(writer.close())
    manifest = Manifest(
        maps.dtype.name, compression, maps.shape[2:], phases, images, tuple(shards), 10
    )
    manifest.save(folder)
    return manifest


def random_maps(*shape: int, dtype: str = "float16", seed: int = 0) -> np.ndarray:
    """Half zeros, like the output of a ReLU."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.maximum(values, 0).astype(dtype)


def write(folder: Path, maps: object, count: int = 2, **options: object) -> object:
    """One shard of phase 3 from one batch of 1x1x1 maps."""
    kind = {"phase": 3, "part": 0, "start": 0, "count": count, "shape": (1, 1, 1)} | options
    with ShardWriter(folder, **kind) as writer:
        writer.append(maps, np.arange(len(maps)) + 40, np.zeros(len(maps), int))
    return writer.close()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(["float16", "float32"]),
    compression=st.sampled_from([None, "zstd"]),
    batches=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    as_tensor=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory, shape, dtype, compression, batches, as_tensor, seed):
    folder = tmp_path_factory.mktemp("store")
    maps = random_maps(sum(batches), *shape, dtype=dtype, seed=seed)
    kind = {"shape": tuple(shape), "dtype": dtype, "compression": compression}
    place = {"phase": 1, "part": 0, "start": 0, "count": len(maps)}
    with ShardWriter(folder, **place, **kind) as writer:
        for piece in np.split(np.arange(len(maps)), np.cumsum(batches)[:-1]):
            values = torch.from_numpy(maps[piece]) if as_tensor else maps[piece]
            writer.append(values, piece, piece % 3)
    shard = writer.close()
    assert existing(folder, **place, **kind) == shard
    Manifest(**kind, phases=1, images=len(maps), shards=(shard,)).save(folder)
    with ShardStore.open(folder) as store:
        np.testing.assert_array_equal(store.batch(1, np.arange(len(maps))), maps)
        np.testing.assert_array_equal(store.label, np.arange(len(maps)) % 3)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_bytes_depend_neither_on_the_split_into_batches_nor_on_the_time(tmp_path, compression):
    maps = random_maps(300, 16, 4, 4)
    digests = set()
    for step in (300, 7, 64):
        place = {"phase": 2, "part": 1, "start": 5, "count": 300}
        with ShardWriter(tmp_path, **place, shape=(16, 4, 4), compression=compression) as writer:
            for first in range(0, 300, step):
                rows = np.arange(first, min(300, first + step))
                writer.append(maps[rows], rows, rows)
        digests.add(writer.close().sha256)
        time.sleep(1.1)  # HDF5 can write times, in seconds
    assert len(digests) == 1


def test_float32_input_is_rounded_to_float16(tmp_path):
    values = torch.tensor([1 / 3, 65504.0], dtype=torch.float32).reshape(2, 1, 1, 1)
    shard = write(tmp_path, values, phase=1)
    Manifest("float16", None, (1, 1, 1), 1, 2, (shard,)).save(tmp_path)
    stored = ShardStore.open(tmp_path).batch(1, [0, 1]).ravel()
    assert stored.tolist() == [0.333251953125, 65504.0]


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_a_value_beyond_float16_names_phase_and_image_and_the_way_out(tmp_path, kind):
    maps = kind(np.array([1.0, 7e4], np.float32).reshape(2, 1, 1, 1))
    with pytest.raises(ShardError, match=r"Phase 3, image 41: .*70000.*float32"):
        write(tmp_path, maps)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, maps, dtype="float32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("given", ["<f4", ">f4", np.longdouble])
def test_a_value_that_is_not_finite_names_phase_and_image(tmp_path, value, dtype, given):
    maps = np.array([1.0, value], given).reshape(2, 1, 1, 1)
    with pytest.raises(ShardError, match="Phase 3, image 41: the feature map is not finite"):
        write(tmp_path, maps, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (np.ones((1, 1, 1, 1)), {}, "promised 2 maps and got 1"),
        (np.ones((3, 1, 1, 1)), {}, "promised 2 maps and was given 3"),
        (np.ones((2, 1, 2, 1)), {}, r"takes maps of shape \(1, 1, 1\)"),
        (np.ones((2, 1, 1, 1)), {"dtype": "bfloat16"}, "has dtype 'bfloat16'"),
        (np.ones((2, 1, 1, 1)), {"compression": "gzip"}, "has compression 'gzip'"),
        (np.ones((2, 1, 1, 1)), {"shape": (1, 0, 1)}, "has the map shape"),
    ],
)
def test_what_does_not_fit_leaves_nothing(tmp_path, maps, options, message):
    with pytest.raises(ShardError, match=message):
        write(tmp_path, maps, **options)
    assert list(tmp_path.iterdir()) == []


def test_labels_are_whole_numbers(tmp_path):
    with (
        pytest.raises(ShardError, match="whole number"),
        ShardWriter(tmp_path, phase=1, part=0, start=0, count=1, shape=(1,)) as writer,
    ):
        writer.append(np.ones((1, 1)), [0], [0.5])
    assert list(tmp_path.iterdir()) == []


def test_an_exception_of_the_caller_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyError),
        ShardWriter(tmp_path, phase=1, part=0, start=0, count=1, shape=(1,)),
    ):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time, numpy as np
from pathlib import Path
from fmce_ops.shards import ShardWriter
writer = ShardWriter(Path(sys.argv[1]), phase=1, part=0, start=0, count=100, shape=(1024, 4, 4))
writer.append(np.ones((99, 1024, 4, 4), np.float16), np.arange(99), np.arange(99))
print("writing", flush=True)
time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_under_the_name_and_the_next_one_cleans_up(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    place = {"phase": 1, "part": 0, "start": 0, "count": 100, "shape": (1024, 4, 4)}
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    assert existing(tmp_path, **place) is None
    with ShardWriter(tmp_path, **place) as writer:
        rows = np.arange(100)
        writer.append(np.ones((100, 1024, 4, 4)), rows, rows)
    assert [path.name for path in tmp_path.iterdir()] == [FIRST]
    assert existing(tmp_path, **place) == writer.close()


def test_what_a_kill_left_of_the_manifest_is_gone_once_it_is_written(tmp_path):
    manifest = make_store(tmp_path, random_maps(1, 3, 2, 2, 2))
    left = tmp_path / ".manifest.json.123.tmp"
    left.touch()
    with pytest.raises(ShardError, match=f"{left.name} is surplus"):
        verify(tmp_path)
    manifest.save(tmp_path)
    verify(tmp_path)


def test_a_finished_shard_of_other_parameters_is_not_taken_for_this_one(tmp_path):
    write(tmp_path, np.ones((2, 1, 1, 1)), phase=1)
    place = {"phase": 1, "part": 0, "count": 2}
    with pytest.raises(ShardError, match="has start 0 where 7 belongs"):
        existing(tmp_path, **place, start=7, shape=(1, 1, 1))
    with pytest.raises(ShardError, match="maps of shape"):
        existing(tmp_path, **place, start=0, shape=(2, 1, 1))
    (tmp_path / FIRST).write_bytes(b"no shard")
    with pytest.raises(ShardError, match=f"{FIRST} cannot be read"):
        existing(tmp_path, **place, start=0, shape=(1, 1, 1))


@pytest.mark.parametrize("compression", ["", "zstd"])
@pytest.mark.parametrize("limit", [3000, 200_000])
def test_a_full_disk_is_said_in_one_sentence_and_leaves_nothing(tmp_path, compression, limit):
    script = """
import resource, signal, sys, numpy as np
from pathlib import Path
from fmce_ops.errors import DiskError
from fmce_ops.shards import ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
maps = np.random.default_rng(0).random((20, 1024, 4, 4))
try:
    kind = {"shape": (1024, 4, 4), "compression": sys.argv[2] or None}
    with ShardWriter(Path(sys.argv[1]), phase=1, part=0, start=0, count=20, **kind) as writer:
        writer.append(maps, np.arange(20), np.arange(20))
except DiskError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path), compression, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "could not be written (file too large)" in done.stdout, done.stderr
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_verify_and_describe_sum_up_the_store(tmp_path):
    maps = random_maps(3, 50, 64, 4, 4)
    manifest = make_store(tmp_path, maps, parts=(20,), compression="zstd")
    report, description = verify(tmp_path), describe(tmp_path)
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.h5"))
    assert (report.shards, report.maps, report.bytes) == (6, 150, on_disk)
    assert report.digest == manifest.digest == description.digest
    assert [(p.phase, p.shards, p.maps) for p in description.phases] == [
        (k, 2, 50) for k in (1, 2, 3)
    ]
    assert sum(p.bytes for p in description.phases) == description.bytes == on_disk
    assert description.ratio == maps.nbytes / on_disk > 1.3


def test_digest_is_the_md5_of_the_file_as_dvc_has_it(tmp_path):
    manifest = make_store(tmp_path, random_maps(1, 2, 1, 1, 1))
    known = subprocess.run(
        ["md5sum", tmp_path / "manifest.json"], capture_output=True, text=True, check=True
    )
    assert known.stdout.split()[0] == manifest.digest
    assert Manifest.load(tmp_path) == manifest


MEASURED = """
import resource, sys, numpy as np
from pathlib import Path
from fmce_ops.shards import RandomBatches, ShardStore, ShardWriter, Manifest, split_by_image
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, shape = Path(sys.argv[1]), (1024, 4, 4)
before = peak()
shards = []
for part in range(2):
    with ShardWriter(folder, phase=1, part=part, start=part * 5000, count=5000, shape=shape) as w:
        for start in range(part * 5000, part * 5000 + 5000, 250):
            rows = np.arange(start, start + 250)
            w.append(np.full((250, *shape), start, np.float16), rows, rows)
    shards.append(w.close())
Manifest("float16", None, shape, 1, 10000, tuple(shards)).save(folder)
with ShardStore.open(folder) as store:
    for maps in store.scan(1):
        assert len(maps)
    rows = split_by_image(10000, 1, 0, 0, seed=0).train
    read = sum(batch.maps.nbytes for batch in RandomBatches(store, rows, 256, 0, 0))
print(read, peak() - before)
"""


def test_memory_does_not_grow_with_the_store(tmp_path):
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read, grown = map(int, done.stdout.split())
    assert read == 10000 * 1024 * 16 * 2 > 300e6
    assert grown < 100e6
