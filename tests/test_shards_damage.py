"""Whatever is wrong with a store is found before any of it is used, and named."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
from fmce_ops.errors import ShardError
from fmce_ops.files import file_digest, write_json
from fmce_ops.shards import Manifest, ShardStore, shard_file, verify
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_shards import make_store, random_maps

FIRST, LAST = shard_file(1, 0), shard_file(2, 1)


@pytest.fixture
def store(tmp_path):
    """Two phases of 40 images in two parts each."""
    folder = tmp_path / "store"
    make_store(folder, random_maps(2, 40, 4, 2, 2), parts=(25,))
    return folder


def refuses(folder: Path, message: str) -> None:
    """Both doors are shut, with a message that names the culprit."""
    for door in (verify, ShardStore.open):
        with pytest.raises(ShardError, match=message):
            door(folder)


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest in place."""
    tree = json.loads((folder / "manifest.json").read_text())
    change(tree)
    write_json(folder / "manifest.json", tree)


def vouch_for(folder: Path, name: str = FIRST) -> None:
    """Let the manifest vouch for a file as it is now, as an attacker would."""

    def change(tree):
        shard = next(shard for shard in tree["shards"] if shard["file"] == name)
        path = folder / name
        shard.update(bytes=path.stat().st_size, sha256=file_digest(path))

    edit(folder, change)


def test_missing(store):
    (store / LAST).unlink()
    refuses(store, f"{LAST} is missing")


@pytest.mark.parametrize("name", ["notes.txt", shard_file(2, 2), f".{FIRST}.123.tmp"])
def test_surplus(store, name):
    (store / name).touch()
    refuses(store, f"{name} is surplus")


def test_surplus_folder(store):
    (store / "old").mkdir()
    refuses(store, "old is surplus")


def test_a_shard_of_another_store(store, tmp_path):
    make_store(tmp_path / "other", random_maps(2, 40, 4, 2, 2, seed=1), parts=(25,))
    shutil.copy(tmp_path / "other" / LAST, store / LAST)
    refuses(store, f"{LAST} is damaged or from another store")


def test_a_shard_of_another_phase_even_if_the_manifest_vouches_for_it(store):
    shutil.copy(store / shard_file(2, 0), store / FIRST)
    refuses(store, f"{FIRST} is damaged or from another store")
    vouch_for(store)
    refuses(store, f"{FIRST} has phase 2 where 1 belongs")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_any_flipped_byte(tmp_path, compression):
    make_store(tmp_path, random_maps(1, 20, 4, 2, 2), compression=compression)
    path = tmp_path / FIRST
    good = path.read_bytes()

    @settings(max_examples=60, deadline=None)
    @given(place=st.integers(0, len(good) - 1), flip=st.integers(1, 255))
    def flipped(place, flip):
        path.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
        refuses(tmp_path, f"{FIRST} is damaged")

    flipped()
    path.write_bytes(good)
    verify(tmp_path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.99999), full=st.booleans())
def test_any_truncation(store, share, full):
    path = store / LAST
    good = path.read_bytes()
    path.write_bytes(good[: int(len(good) * share)])
    with pytest.raises(ShardError, match=rf"{LAST} has \d+ bytes, not {len(good)}"):
        verify(store, full=full)
    path.write_bytes(good)


def test_a_link_in_place_of_a_shard(store, tmp_path):
    (store / FIRST).rename(tmp_path / FIRST)
    (store / FIRST).symlink_to(tmp_path / FIRST)
    refuses(store, f"{FIRST} is a link")


def test_a_link_in_place_of_the_manifest(store, tmp_path):
    (store / "manifest.json").rename(tmp_path / "manifest.json")
    (store / "manifest.json").symlink_to(tmp_path / "manifest.json")
    refuses(store, "no plain file")


def test_a_pipe_in_place_of_a_shard(store):
    (store / FIRST).unlink()
    os.mkfifo(store / FIRST)
    refuses(store, f"{FIRST} is not a plain file")


def replace(name: str, **options: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file[name][:]
        del file[name]
        file.create_dataset(name, **({"data": values} | options))

    return change


def soft_link(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.SoftLink("/index")


def external_link(file: h5py.File) -> None:
    del file["maps"]
    file["maps"] = h5py.ExternalLink(shard_file(1, 1), "/maps")


def external_storage(file: h5py.File) -> None:
    shape = file["maps"].shape
    del file["maps"]
    file.create_dataset("maps", shape, "<f2", external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File) -> None:
    shape = file["maps"].shape
    del file["maps"]
    layout = h5py.VirtualLayout(shape, "<f2")
    layout[:] = h5py.VirtualSource(shard_file(1, 1), "/maps", shape)
    file.create_virtual_dataset("maps", layout)


def absurd(file: h5py.File) -> None:
    del file["maps"]
    file.create_dataset("maps", (2**40, 2**10, 2, 2), "<f2", chunks=(1, 1, 2, 2))


def group(file: h5py.File) -> None:
    del file["maps"]
    file.create_group("maps")


def surplus_attribute(file: h5py.File) -> None:
    file.attrs["by"] = "someone"


def text_attribute(file: h5py.File) -> None:
    file.attrs["phase"] = "1"


def never_written(file: h5py.File) -> None:
    shape = file["maps"].shape
    del file["maps"]
    file.create_dataset("maps", shape, "<f2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (soft_link, "has a link for its label"),
        (external_link, "has a link for its maps"),
        (external_storage, "keeps its maps in another file"),
        (virtual, "has maps in pieces or elsewhere"),
        (absurd, r"has maps of shape \(1099511627776, 1024, 2, 2\)"),
        (group, "has something else for its maps"),
        (surplus_attribute, "has foreign attributes"),
        (text_attribute, "has no number phase"),
        (never_written, "is too short for its maps"),
        (replace("maps", dtype="<f4"), "has maps of type float32"),
        (replace("maps", dtype=">f2"), "has maps of type >f2"),
        (replace("maps", chunks=True), "has maps in pieces or elsewhere"),
        (replace("maps", compression="gzip"), "has maps with the filters"),
        (replace("maps", **hdf5plugin.LZ4()), "has maps with the filters"),
        (replace("label", data=np.zeros(24, int)), "has label of shape"),
        (replace("index", data=np.zeros(25)), "has index of type"),
        (lambda file: file.create_group("more"), "does not hold maps, index and label alone"),
        (lambda file: file.move("maps", "map"), "holds index, label, map"),
        (lambda file: file.attrs.create("start", 3), "has start 3 where 0 belongs"),
        (lambda file: file.attrs.create("format", 9), "has format 9 where 1 belongs"),
    ],
)
def test_a_hostile_header_that_the_manifest_vouches_for(store, change, message):
    with h5py.File(store / FIRST, "r+") as file:
        change(file)
    vouch_for(store)
    refuses(store, f"{FIRST} {message}")


def unknown_filter(file: h5py.File) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((25, 4, 2, 2))
    # Optional, or HDF5 itself refuses to create it.
    properties.set_filter(512, h5py.h5z.FLAG_OPTIONAL, ())
    shape = file["maps"].shape
    del file["maps"]
    file.create_dataset("maps", shape, "<f2", dcpl=properties)


def missing_chunks(file: h5py.File) -> None:
    shape, chunks = file["maps"].shape, file["maps"].chunks
    del file["maps"]
    file.create_dataset("maps", shape, "<f2", chunks=chunks, **hdf5plugin.Zstd())


def huge_chunks(file: h5py.File) -> None:
    shape = file["maps"].shape
    del file["maps"]
    file.create_dataset(
        "maps", shape, "<f2", chunks=(2**16, 4, 2, 2), maxshape=(None, 4, 2, 2), **hdf5plugin.Zstd()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_filter, r"has maps with the filters \[512\], not zstd alone"),
        (missing_chunks, "lacks some of its chunks"),
        (huge_chunks, r"has the chunk shape \(65536, 4, 2, 2\)"),
        (replace("maps"), r"has maps with the filters \[\], not zstd alone"),
    ],
)
def test_a_hostile_header_of_a_compressed_shard(tmp_path, change, message):
    make_store(tmp_path, random_maps(1, 25, 4, 2, 2), compression="zstd")
    with h5py.File(tmp_path / FIRST, "r+") as file:
        change(file)
    vouch_for(tmp_path)
    refuses(tmp_path, f"{FIRST} {message}")


@pytest.mark.parametrize("name", ["index", "label"])
def test_another_order_than_phase_1(store, name):
    with h5py.File(store / LAST, "r+") as file:
        file[name][:2] = file[name][:2][::-1]
    vouch_for(store, LAST)
    refuses(store, f"{LAST} has another {name} order than phase 1")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("label", 10, "label outside its 10 classes"),
        ("label", -1, "label outside its 10 classes"),
        ("index", -1, "index below 0"),
        ("index", 101, "same image twice"),
    ],
)
def test_impossible_numbers(tmp_path, name, value, message):
    make_store(tmp_path, random_maps(1, 25, 4, 2, 2))
    with h5py.File(tmp_path / FIRST, "r+") as file:
        file[name][0] = value
    vouch_for(tmp_path)
    refuses(tmp_path, message)


def test_not_hdf5_at_all(store):
    (store / FIRST).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2000))
    vouch_for(store)
    refuses(store, f"{FIRST} cannot be read")


def set_shard(number: int, **values: object) -> Callable[[dict], None]:
    return lambda tree: tree["shards"][number].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(note=1), "unknown or missing fields: 'note'"),
        (lambda tree: tree.pop("dtype"), "unknown or missing fields: 'dtype'"),
        (set_shard(0, note=1), "unknown or missing fields: 'note'"),
        (lambda tree: tree["shards"][0].pop("sha256"), "unknown or missing fields: 'sha256'"),
        (lambda tree: tree.update(format=2), "has format 2"),
        (lambda tree: tree.update(dtype="float64"), "has dtype 'float64'"),
        (lambda tree: tree.update(compression="lzf"), "has compression 'lzf'"),
        (lambda tree: tree.update(shape=[4, "2", 2]), "has the map shape"),
        (lambda tree: tree.update(shape=[2**40, 2**40]), "absurd map shape"),
        (lambda tree: tree.update(shape=4), "has shape that are not a list"),
        (lambda tree: tree.update(phases=0), "has phases 0"),
        (lambda tree: tree.update(phases=3), "up to phase 2, row 40"),
        (lambda tree: tree.update(images=True), "has images True"),
        (lambda tree: tree.update(images=41), "from row 0 where"),
        (lambda tree: tree.update(images=1e3), "has images 1000.0"),
        (lambda tree: tree.update(images=10**30), "has images 10{30},"),
        (lambda tree: tree.update(classes="ten"), "has classes 'ten'"),
        (lambda tree: tree.update(provenance=[]), "provenance that is not a dictionary"),
        (lambda tree: tree.update(shards={}), "has shards that are not a list"),
        (lambda tree: tree.update(shards=[1]), "has int for a Shard"),
        (set_shard(0, file="../x.h5"), r"names a shard '\.\./x\.h5'"),
        (set_shard(0, file=7), "names a shard 7"),
        (set_shard(0, start=1), "from row 1 where"),
        (set_shard(1, start=20), "from row 20 where"),
        (set_shard(0, count=24), "from row 25 where"),
        (set_shard(1, count=16), "rows beyond the last image"),
        (set_shard(0, bytes=-1), "the bytes -1"),
        (set_shard(0, sha256="A" * 64), "sha256 that is none"),
        (set_shard(0, sha256=None), "sha256 that is none"),
        (lambda tree: tree["shards"].insert(0, tree["shards"][0]), "from row 0 where"),
        (lambda tree: tree["shards"].reverse(), "where 'phase-01-part-0000.h5' from row 0"),
        (lambda tree: tree["shards"].pop(1), "where 'phase-01-part-0001.h5' from row 25"),
    ],
)
def test_a_manifest_that_makes_no_sense(store, change, message):
    edit(store, change)
    refuses(store, rf"manifest\.json cannot be used \(.*{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "has list for a Manifest"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_manifest_that_is_none(store, text, message):
    (store / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    refuses(store, message)


def test_a_manifest_with_a_key_given_twice(store):
    path = store / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 1,\n  "format": 1'))
    refuses(store, "edited by hand")


def test_no_manifest(store):
    (store / "manifest.json").unlink()
    refuses(store, "has no manifest")


def test_provenance_is_json(store):
    manifest = Manifest.load(store)
    with pytest.raises(ShardError, match="provenance"):
        dataclasses.replace(manifest, provenance={"loss": float("nan")}).save(store)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("opened_before", [True, False])
def test_a_shard_that_changes_under_an_open_store(tmp_path, compression, opened_before):
    make_store(tmp_path, random_maps(1, 20, 64, 4, 4), compression=compression)
    with ShardStore.open(tmp_path) as store:
        if opened_before:
            store.batch(1, [3])
        with (tmp_path / FIRST).open("r+b") as file:
            file.seek(5000)
            file.write(b"!")
            os.utime(file.fileno())
        with pytest.raises(ShardError, match=f"{FIRST} was changed after it was checked"):
            store.batch(1, [3])


def test_a_shard_that_is_cut_under_an_open_store(tmp_path):
    make_store(tmp_path, random_maps(1, 20, 64, 4, 4))
    with ShardStore.open(tmp_path) as store:
        os.truncate(tmp_path / FIRST, 5000)
        with pytest.raises(ShardError, match="became shorter"):
            store.batch(1, [19])
