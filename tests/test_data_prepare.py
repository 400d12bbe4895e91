"""Preparing real data sets: splits, statistics, bytes, damage."""

import gzip
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fmce_ops.data import Images, ImagesSummary, prepare
from fmce_ops.errors import DataError, ParamsError
from fmce_ops.files import file_digest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, MNIST
from torchvision.transforms import functional


def make(dataset: str, out: Path, root: Path = Path("unused"), **changes) -> ImagesSummary:
    settings = {"image_size": 32, "per_class": None, "validation": 0.1, "test": 0.2, "seed": 0}
    return prepare(dataset, out, root=root, **(settings | changes))


def noise_image(path: Path, width: int, height: int, mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of ten 20 px images each, all training."""
    for index in range(20):
        name = "cat" if index % 2 else "dog"
        noise_image(tmp_path / "set" / "train" / name / f"{index}.png", 20, 20, seed=index)
    return tmp_path / "set"


class TestDigits:
    def test_every_image_lands_in_exactly_one_split(self, tmp_path: Path) -> None:
        make("digits", tmp_path / "images.h5")
        with Images.open(tmp_path / "images.h5") as images:
            stored = torch.cat([images.load(split)[0] for split in images.counts]).flatten(1)
        original = np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(1797, 64)
        assert sorted(map(bytes, stored.numpy())) == sorted(map(bytes, original))

    def test_the_held_out_fractions_hold_in_every_class(self, tmp_path: Path) -> None:
        make("digits", tmp_path / "images.h5")
        total = np.bincount(load_digits().target)
        with Images.open(tmp_path / "images.h5") as images:
            for split, share in (("val", 0.1), ("test", 0.2)):
                counts = np.bincount(images.load(split)[1].numpy())
                assert np.abs(counts - share * total).max() <= 0.5

    def test_statistics_are_those_of_the_training_split(self, tmp_path: Path) -> None:
        summary = make("digits", tmp_path / "images.h5")
        with Images.open(tmp_path / "images.h5") as images:
            pixels = images.load("train")[0].numpy() / 255
        assert summary.mean == pytest.approx([pixels.mean()], rel=1e-12)
        assert summary.std == pytest.approx([pixels.std()], rel=1e-12)

    def test_images_stay_at_their_own_size_unless_it_is_too_large(self, tmp_path: Path) -> None:
        assert make("digits", tmp_path / "a.h5", image_size=8).side == 8
        assert make("digits", tmp_path / "b.h5", image_size=6).side == 6

    def test_per_class_thins_all_splits_by_one_factor(self, tmp_path: Path) -> None:
        summary = make("digits", tmp_path / "images.h5", per_class=20)
        # Of some 126 training images of a class 20 stay: 18 validation images become 3,
        # 36 test images 6 (5 or 6 where a class is smaller).
        assert summary.counts["train"] == 200
        assert summary.counts["val"] == 30
        assert 50 <= summary.counts["test"] <= 60
        assert make("digits", tmp_path / "one.h5", per_class=1).counts == {
            "train": 10,
            "val": 10,
            "test": 10,
        }

    def test_a_slice_of_a_split_holds_a_mix_of_classes(self, tmp_path: Path) -> None:
        make("digits", tmp_path / "images.h5")
        with Images.open(tmp_path / "images.h5") as images:
            assert len(set(images.read("train", 0, 60)[1].tolist())) >= 8

    def test_a_seed_gives_the_same_bytes_in_another_process(self, tmp_path: Path) -> None:
        make("digits", tmp_path / "here.h5", per_class=10)
        call = (
            "from pathlib import Path; from fmce_ops.data import prepare; import sys; "
            "prepare('digits', Path(sys.argv[1]), root=Path('unused'), image_size=32, "
            "per_class=10, validation=0.1, test=0.2, seed=0)"
        )
        there = tmp_path / "there.h5"
        subprocess.run([sys.executable, "-c", call, str(there)], check=True)
        make("digits", tmp_path / "other.h5", per_class=10, seed=1)
        assert file_digest(there) == file_digest(tmp_path / "here.h5")
        assert file_digest(tmp_path / "other.h5") != file_digest(there)

    @pytest.mark.parametrize("change", [{"validation": 0.0}, {"test": 1.0}, {"per_class": 0}])
    def test_a_share_out_of_range_is_refused(self, tmp_path: Path, change) -> None:
        with pytest.raises(ParamsError, match="give"):
            make("digits", tmp_path / "images.h5", **change)

    def test_a_class_without_training_images_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="Class '0' has no image in the split 'train'"):
            make("digits", tmp_path / "images.h5", validation=0.5, test=0.5)
        assert list(tmp_path.iterdir()) == []

    def test_an_unknown_data_set_lists_the_known(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"'didgits'.*digits, mnist, fashion-mnist"):
            make("didgits", tmp_path / "images.h5")


class TestIdxFiles:
    @pytest.mark.parametrize(
        ("dataset", "name"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
    )
    def test_the_official_test_split_is_kept(
        self, shared_data: Path, tmp_path: Path, dataset: str, name: str
    ) -> None:
        raw = tmp_path / name / "raw"
        shutil.copytree(shared_data / name / "raw", raw)
        summary = make(dataset, tmp_path / "images.h5", tmp_path)
        assert summary.counts["test"] == 10_000
        assert summary.counts["train"] + summary.counts["val"] == 60_000
        assert (summary.channels, summary.side, len(summary.classes)) == (1, 28, 10)
        with gzip.open(raw / "t10k-images-idx3-ubyte.gz") as file:
            official = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 784)
        with Images.open(tmp_path / "images.h5") as images:
            stored = images.load("test")[0].flatten(1).numpy()
        assert sorted(map(bytes, stored)) == sorted(map(bytes, official))

    def test_missing_files_are_named_with_their_place(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(MNIST, "mirrors", [])
        with pytest.raises(DataError, match=r"MNIST/raw.*train-images-idx3-ubyte, .*put the"):
            make("mnist", tmp_path / "images.h5", tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[:1_000_000],
            lambda content: content[:9],
            lambda content: b"\0\0\x07" + content[3:],  # no such type of values
            lambda content: content[:3] + b"\xff" + content[4:],  # 255 dimensions
        ],
    )
    def test_a_damaged_file_is_named(
        self, shared_data: Path, tmp_path: Path, monkeypatch, damage
    ) -> None:
        monkeypatch.setattr(MNIST, "mirrors", [])
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for packed in (shared_data / "MNIST" / "raw").glob("*.gz"):
            (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        bad = raw / "t10k-images-idx3-ubyte"
        bad.write_bytes(damage(bad.read_bytes()))
        with pytest.raises(DataError, match=r"damaged ones: t10k-images-idx3-ubyte; put"):
            make("mnist", tmp_path / "images.h5", tmp_path)


class TestCifar:
    @pytest.fixture
    def root(self, shared_data: Path, tmp_path: Path, monkeypatch) -> Path:
        """The python version of CIFAR-10 with 40 real images in each of two files."""
        base = tmp_path / CIFAR10.base_folder
        base.mkdir()
        files = {}
        for name, archive in (("data_batch_1", "train-1.zip"), ("test_batch", "test.zip")):
            files[name] = cifar_batch(shared_data / "cifar10" / archive, per_class=4)
        files["batches.meta"] = {"label_names": [f"class {k}" for k in range(10)]}
        for name, content in files.items():
            (base / name).write_bytes(pickle.dumps(content))
        known = {name: file_digest(base / name, "md5") for name in files}
        monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", known["data_batch_1"]]])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", known["test_batch"]]])
        meta = CIFAR10.meta | {"md5": known["batches.meta"]}
        monkeypatch.setattr(CIFAR10, "meta", meta)
        return tmp_path

    def test_colour_images_keep_their_pixels(self, root: Path, tmp_path: Path) -> None:
        summary = make("cifar10", tmp_path / "images.h5", root, validation=0.25)
        assert summary.counts == {"train": 30, "val": 10, "test": 40}
        assert (summary.channels, summary.side) == (3, 32)
        batch = pickle.loads((root / CIFAR10.base_folder / "test_batch").read_bytes())
        with Images.open(tmp_path / "images.h5") as images:
            stored = images.load("test")[0].flatten(1).numpy()
        assert sorted(map(bytes, stored)) == sorted(map(bytes, batch["data"]))

    def test_a_truncated_batch_is_named(self, root: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(CIFAR10, "url", (tmp_path / "absent.tar.gz").as_uri())
        batch = root / CIFAR10.base_folder / "data_batch_1"
        batch.write_bytes(batch.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"damaged ones: data_batch_1; put"):
            make("cifar10", tmp_path / "images.h5", root)


def cifar_batch(archive: Path, per_class: int) -> dict:
    with zipfile.ZipFile(archive) as packed:
        names = sorted(name for name in packed.namelist() if name.endswith(".webp"))
        by_class: dict[str, list[str]] = {}
        for name in names:
            by_class.setdefault(name.split("/")[1], []).append(name)
        rows, labels = [], []
        for label, members in enumerate(by_class.values()):
            for name in members[:per_class]:
                with packed.open(name) as file:
                    pixels = np.asarray(Image.open(file).convert("RGB"))
                rows.append(pixels.transpose(2, 0, 1).ravel())
                labels.append(label)
    return {"data": np.stack(rows), "labels": labels}


class TestImageFolder:
    def test_images_of_one_size_keep_their_pixels(self, folder: Path, tmp_path: Path) -> None:
        summary = make("image-folder", tmp_path / "images.h5", folder)
        assert summary.classes == ("cat", "dog")
        assert summary.counts == {"train": 14, "val": 2, "test": 4}
        assert (summary.channels, summary.side) == (3, 20)
        originals = {
            np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()
            for path in folder.glob("train/*/*.png")
        }
        with Images.open(tmp_path / "images.h5") as images:
            stored = torch.cat([images.load(split)[0] for split in images.counts])
        assert {bytes(image.numpy()) for image in stored} == originals

    def test_splits_that_are_there_are_used(self, folder: Path, tmp_path: Path) -> None:
        for split, count in (("val", 3), ("test", 5)):
            for index in range(count):
                for name in ("cat", "dog"):
                    noise_image(folder / split / name / f"{index}.JPG", 20, 20, seed=index)
        summary = make("image-folder", tmp_path / "images.h5", folder)
        assert summary.counts == {"train": 20, "val": 6, "test": 10}

    def test_an_oblong_image_is_resized_and_cropped_to_its_centre(
        self, folder: Path, tmp_path: Path
    ) -> None:
        shutil.rmtree(folder)
        for split in ("train", "val", "test"):
            noise_image(folder / split / "cat" / "a.png", 60, 40)
        make("image-folder", tmp_path / "images.h5", folder, image_size=20)
        with Images.open(tmp_path / "images.h5") as images:
            stored = images.load("train")[0][0].float()
        original = Image.open(folder / "train" / "cat" / "a.png")
        expected = functional.center_crop(functional.resize(original, 20), 20)
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
        assert (stored - expected).abs().max() <= 2

    def test_grey_stays_grey_until_one_image_has_colour(self, folder: Path, tmp_path: Path) -> None:
        for index, path in enumerate(folder.glob("train/*/*.png")):
            noise_image(path, 20, 20, "L", seed=index)
        assert make("image-folder", tmp_path / "grey.h5", folder).channels == 1
        noise_image(folder / "train" / "cat" / "colour.png", 20, 20)
        assert make("image-folder", tmp_path / "mixed.h5", folder).channels == 3

    def test_a_constant_channel_can_still_be_normalised(self, folder: Path, tmp_path: Path) -> None:
        for path in folder.glob("train/*/*.png"):
            Image.fromarray(np.full((20, 20, 3), (10, 0, 255), np.uint8)).save(path)
        summary = make("image-folder", tmp_path / "images.h5", folder)
        assert summary.mean == pytest.approx([10 / 255, 0, 1])
        assert summary.std == (1, 1, 1)

    def test_a_truncated_image_is_named(self, folder: Path, tmp_path: Path) -> None:
        bad = folder / "train" / "cat" / "1.png"
        bad.write_bytes(bad.read_bytes()[:400])
        with pytest.raises(DataError, match=r"cat/1\.png cannot be read .*truncated.*replace it"):
            make("image-folder", tmp_path / "images.h5", folder)
        bad.write_text("not an image")
        with pytest.raises(DataError, match=r"cat/1\.png cannot be read .*identify.*replace it"):
            make("image-folder", tmp_path / "images.h5", folder)
        assert not (tmp_path / "images.h5").exists()

    def test_images_lie_as_their_camera_was_held(self, folder: Path, tmp_path: Path) -> None:
        turned = folder / "train" / "cat" / "1.png"
        upright = np.asarray(Image.open(turned))
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: what is seen lies a quarter turn clockwise
        Image.fromarray(np.rot90(upright).copy()).save(turned, exif=exif)
        make("image-folder", tmp_path / "images.h5", folder)
        with Images.open(tmp_path / "images.h5") as images:
            stored = {
                bytes(image.numpy()) for split in images.counts for image in images.load(split)[0]
            }
        assert upright.transpose(2, 0, 1).tobytes() in stored

    def test_a_huge_image_is_not_called_damaged(self, folder, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(DataError, match=r"png cannot be read .*400 pixels.* exceeds limit"):
            make("image-folder", tmp_path / "images.h5", folder)

    def test_a_class_whose_name_is_no_text_is_refused(self, folder: Path, tmp_path: Path) -> None:
        (folder / "train" / os.fsdecode(b"caf\xe9")).mkdir()
        with pytest.raises(DataError, match=r"class folder 'caf\\udce9' .* rename it"):
            make("image-folder", tmp_path / "images.h5", folder)

    def test_sixteen_bit_pixels_are_refused(self, folder: Path, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "train" / "cat" / "1.png")
        with pytest.raises(DataError, match=r"cat/1\.png.*convert it to 8 bits"):
            make("image-folder", tmp_path / "images.h5", folder)

    def test_pictures_without_class_folders_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "flat" / "train").mkdir(parents=True)
        noise_image(tmp_path / "flat" / "train" / "a.png", 20, 20)
        with pytest.raises(DataError, match="train has no folder of a class"):
            make("image-folder", tmp_path / "images.h5", tmp_path / "flat")

    def test_missing_and_surplus_classes_are_named(self, folder: Path, tmp_path: Path) -> None:
        noise_image(folder / "test" / "cat" / "a.png", 20, 20)
        with pytest.raises(DataError, match="'dog' has no image in the split 'test'"):
            make("image-folder", tmp_path / "images.h5", folder)
        noise_image(folder / "test" / "emu" / "a.png", 20, 20)
        with pytest.raises(DataError, match="emu has no counterpart"):
            make("image-folder", tmp_path / "images.h5", folder)

    def test_a_folder_without_train_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="train does not exist"):
            make("image-folder", tmp_path / "images.h5", tmp_path)

    def test_a_hundred_classes_of_photographs(self, shared_data: Path, tmp_path: Path) -> None:
        (archive,) = (shared_data / "mini-imagenet").glob("*.zip")
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(tmp_path / "photographs")
        root = next((tmp_path / "photographs").rglob("train")).parent
        summary = make("image-folder", tmp_path / "a.h5", root, image_size=64, per_class=6)
        # 48 training images of a class are thinned to 6: 12 validation and 12 test images to 2.
        assert summary.counts == {"train": 600, "val": 200, "test": 200}
        assert (summary.side, len(summary.classes)) == (64, 100)


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    noise_image(tmp_path / "set" / "train" / "cat" / "0.bmp", 200, 200)
    first = tmp_path / "set" / "train" / "cat" / "0.bmp"
    for index in range(1, 700):
        first.with_name(f"{index}.bmp").hardlink_to(first)
    call = (
        "import sys, resource; from pathlib import Path; from fmce_ops.data import prepare; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        "prepare('image-folder', Path(sys.argv[2]), root=Path(sys.argv[1]), image_size=200, "
        "per_class=None, validation=0.1, test=0.1, seed=0); print(peak() - before)"
    )
    command = [sys.executable, "-c", call, str(tmp_path / "set"), str(tmp_path / "images.h5")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # 84 MB of pixels pass through; two blocks of 64 images and the list of a third are 23 MB.
    assert (tmp_path / "images.h5").stat().st_size > 83e6
    assert grown < 50_000, grown  # kB


FULL_DISK = """
import sys
from pathlib import Path
from fmce_ops.data import prepare
from fmce_ops.errors import DiskError

small = Path(sys.argv[1])
try:
    prepare("digits", small / "images.h5", root=small, image_size=32, per_class=None,
            validation=0.1, test=0.2, seed=0)
except DiskError as error:
    print(error, list(small.iterdir()))
"""


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    own_mounts = ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=100k tmpfs {tmp_path}"
    if not shutil.which("unshare") or subprocess.run([*own_mounts, "sh", "-c", mount]).returncode:
        pytest.skip("this system lets no test mount a disk, so that a full one cannot be made")
    run = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    command = [*own_mounts, "sh", "-c", run, sys.executable, FULL_DISK]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "images.h5 could not be written (no space left on device)" in output
    assert output.rstrip().endswith("[]")
