"""One cell of tables I and II of arXiv 2405.04041, from the images to the figures, in slices.

    PYTHONPATH=. python benchmarks/replicate.py cifar10-resnet50 STATE --data DATA --minutes 9
    PYTHONPATH=. python benchmarks/replicate.py --render

A cell is a data set and a network. The first command works for about that many minutes (it looks at
the clock behind every point, shard and epoch of FMCE-Net), keeps all that it did in the folder
STATE, and goes on from there when it is given again; its exit status is 75 until it has written
benchmarks/results/CELL-SCALE-SEED.json (--points, --compile and the parts are added to the name).
The second command writes all results into docs/results.md.

DATA holds MNIST/raw, cifar-10-batches-py or cifar10/{train,test}, and mini-imagenet/{train,val}, as
their downloads leave them; where there is no val, a twentieth of the training images is taken. The
scale ``paper`` is the paper's setting; ``gpu`` the same with 6,000 training images, for minutes on
a GPU; ``cpu`` is a smaller one for two cores, and ``cpu-cut`` the same with a cosine that is cut
before it comes to rest (the paper's last marker lies at .73 to .97 of its epochs) and three times
as many epochs of FMCE-Net.

The commands are given in a clone, on a machine that has torch, torchvision, h5py, Lightning Fabric
and rich; fmce_ops need not be installed, and there may be no MLflow, no DVC and no network.

Maps that do not fit on the disk are made and judged in parts: FMCE-Net learns from the parts one
after the other, each with all its epochs, and then every part is made once more to be judged.
"""

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from fmce_ops.convergence import Markers, epoch_markers
from fmce_ops.data import Augment, Images, TrainBatches, prepare
from fmce_ops.errors import (
    DataError,
    DiskError,
    FmceError,
    MarkerError,
    ModelError,
    ParamsError,
    ShardError,
)
from fmce_ops.files import disk_reason, write_json, write_text
from fmce_ops.models import Classifier, FmceNet, build, feature_shape, load_into
from fmce_ops.progress import PlainProgress
from fmce_ops.shards import Manifest, ShardStore, Split, split_by_image, split_paper
from fmce_ops.training.classifier import (
    Plan,
    Validation,
    evaluate,
    point_file,
    train_classifier,
)
from fmce_ops.training.devices import Precision, launch, load
from fmce_ops.training.features import Extraction, extract
from fmce_ops.training.fmce import Epoch, FmcePlan, best_epoch, judge, train_fmce
from fmce_ops.training.losses import Point
from fmce_ops.training.metrics import Figures
from fmce_ops.training.reporter import Row
from lightning_fabric import Fabric
from numpy.typing import NDArray

from machine import commit, processor

RESULTS = Path(__file__).resolve().parent / "results"
SPLITS = {"image": split_by_image, "paper": split_paper}
PHASES, TEST, VALIDATION = 10, 0.25, 0.1
LEAST = 3  # images of a part: one each to learn from, to choose the epoch by, and to be judged
NOT_YET, USER_ERROR, INTERRUPTED = 75, 2, 130  # exit statuses
IMAGES = "images.h5"
DOWNLOADS = {  # where the download of a data set leaves it
    "mnist": "MNIST/raw",
    "cifar10": "cifar-10-batches-py",
    "mini-imagenet": "mini-imagenet/train",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """A data set and a network, with the paper's settings and its figures."""

    dataset: str
    backbone: str
    epochs: int
    mu: float
    markers: tuple[int, ...]
    top1: float
    fmce: float  # accuracy of FMCE-Net


CELLS = {
    "mnist-resnet50": Cell(
        *("mnist", "resnet50", 100, 1e-4),
        *((7, 13, 20, 29, 40, 50, 60, 65, 70, 74), 0.9926, 0.9994),
    ),
    "mnist-shufflenet": Cell(
        *("mnist", "shufflenet_v2_x1_0", 100, 1e-4),
        *((7, 12, 18, 25, 33, 43, 54, 65, 71, 76), 0.9927, 0.9942),
    ),
    "cifar10-resnet50": Cell(
        *("cifar10", "resnet50", 150, 1e-4),
        *((11, 19, 29, 42, 59, 80, 93, 98, 104, 109), 0.9158, 0.9409),
    ),
    "cifar10-shufflenet": Cell(
        *("cifar10", "shufflenet_v2_x1_0", 150, 1e-4),
        *((11, 20, 30, 45, 65, 83, 95, 101, 107, 113), 0.8734, 0.9200),
    ),
    "mini-imagenet-resnet50": Cell(
        *("mini-imagenet", "resnet50", 150, 1e-3),
        *((10, 18, 26, 36, 48, 61, 76, 94, 114, 145), 0.7860, 0.9989),
    ),
    "mini-imagenet-shufflenet": Cell(
        *("mini-imagenet", "shufflenet_v2_x1_0", 250, 1e-3),
        *((9, 15, 23, 35, 50, 70, 94, 124, 161, 215), 0.7133, 0.9987),
    ),
}


@dataclass(frozen=True)
class Setting:
    """How a cell is trained and judged; None stands for what the paper gives for the cell."""

    size: int  # px that the network sees
    images: int | None  # for training, over all classes
    epochs: int | None
    horizon: int | None  # epochs of the half cosine, where it is cut before its end
    points_per_epoch: int
    batch_size: int
    lr: float
    mu: float | None
    relative: bool  # mu is in units of the largest loss
    method: str  # of smoothing
    fmce_epochs: int
    fmce_batch_size: int
    precision: Precision
    seed: int


SCALES = {
    "paper": Setting(
        *(224, None, None, None, 1, 256, 1e-3, None, False, "paper", 10, 256, "32-true", 0)
    ),
    "gpu": Setting(
        *(224, 6000, None, None, 1, 256, 1e-3, None, False, "paper", 10, 256, "32-true", 0)
    ),
    "cpu": Setting(64, 2000, 24, None, 2, 64, 5e-4, None, False, "ema", 10, 64, "32-true", 0),
    "cpu-cut": Setting(64, 2000, 24, 32, 2, 64, 5e-4, None, False, "ema", 30, 64, "32-true", 0),
}


class SliceOverError(Exception):
    """The slice is over; what it did is in the folder."""


class Slice(PlainProgress):
    """Prints every step, and ends the slice once its minutes are over.

    Every loop writes a step down before it tells of it. Steps of earlier slices are told again and
    never end a slice, so that each slice comes at least one step further.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def row(self, row: Row) -> None:
        """Print the step."""
        super().row(row)
        if not row.again and time.monotonic() > self._end:
            raise SliceOverError


@dataclass(frozen=True)
class Work:
    """What every step of a cell needs."""

    name: str
    scale: str
    cell: Cell
    setting: Setting
    folder: Path
    disk: float  # bytes that maps may take
    fabric: Fabric
    reporter: Slice
    compile: bool

    @property
    def epochs(self) -> int:
        return self.setting.epochs or self.cell.epochs

    @property
    def images(self) -> Path:
        return self.folder / IMAGES

    def network(self, classes: int) -> Classifier:
        torch.manual_seed(self.setting.seed)
        return build(self.cell.backbone, classes, in_size=self.setting.size)

    @property
    def seconds(self) -> dict[str, float]:
        """Of each step, over all slices."""
        path = self.folder / "seconds.json"
        return self.read(path, numbers) if path.exists() else {}

    def read(self, path: Path, parse: Callable[[Any], T]) -> T:
        """What ``parse`` makes of the JSON that an earlier step or slice wrote into the folder."""
        try:
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):  # the start of a number is a number too
                raise ValueError
            return parse(json.loads(text))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: start the cell again.") from error

    @contextmanager
    def clock(self, step: str) -> Iterator[None]:
        """Add the time within to a step, also when the slice ends there."""
        started, known = time.monotonic(), self.seconds
        try:
            yield
        finally:
            known[step] = known.get(step, 0.0) + time.monotonic() - started
            write_json(self.folder / "seconds.json", known)


def numbers(found: Any) -> dict[str, Any]:
    """A number for each name, as they were written."""
    return {name: number(value) for name, value in found.items()}


def number(found: Any) -> Any:
    """A finite number, as it is.

    Raises
    ------
    ValueError
        It is something else.
    """
    if type(found) not in (int, float) or not math.isfinite(found):
        raise ValueError
    return found


def run(work: Work, data: Path) -> dict[str, Any]:
    """All of the cell that is not done yet; the result.

    Raises
    ------
    SliceOverError
        The slice ended first.
    """
    if not work.images.exists():
        with work.clock("prepare"):
            make_images(work, data)
    with Images.open(work.images) as images:
        refuse_points(work, images)
        keep_origin(work)
        parts = parts_of(work, images)  # before the hours of training: the disk may be too small
        history, top1 = train(work, images)
        markers = find_markers(work, history)
        checkpoints = keep_markers(work, markers)
        for number, rows in enumerate(parts):
            learn(work, images, checkpoints, rows, number)
        for number, rows in enumerate(parts):
            judge_part(work, images, checkpoints, rows, number, len(parts))
        found = {split: judged(work, len(parts), split) for split in SPLITS}
        return result(work, images, history, top1, markers, len(parts), found)


def refuse_points(work: Work, images: Images) -> None:
    """Refuse more points in an epoch than it has steps.

    Raises
    ------
    ParamsError
        There are more.
    """
    steps = max(1, images.counts["train"] // work.setting.batch_size)
    if work.setting.points_per_epoch > steps:
        raise ParamsError(
            f"--points is {work.setting.points_per_epoch}, but an epoch of {work.name} has {steps} "
            "steps: ask for fewer."
        )


def keep_origin(work: Work) -> None:
    """Write down what this slice runs with: its machine and commit, beside those before it.

    Raises
    ------
    ParamsError
        The slices before had other settings.
    """
    path = work.folder / "origin.json"
    settings = {"cell": work.name, **asdict(work.setting), "compile": work.compile}
    known = work.read(path, origin) if path.exists() else {"settings": settings, "on": []}
    if known["settings"] != settings:
        raise ParamsError(
            f"{work.folder} was begun with other settings: give those again, or another folder."
        )
    here = [hardware(work.fabric), commit()]
    if here not in known["on"]:
        write_json(path, {**known, "on": [*known["on"], here]})


def origin(found: Any) -> dict[str, Any]:
    """What `keep_origin` wrote.

    Raises
    ------
    ValueError
        It is something else.
    """
    on = [[str(machine), str(made_by)] for machine, made_by in found["on"]]
    return {"settings": dict(found["settings"]), "on": on}


def make_images(work: Work, data: Path) -> None:
    """The images of the cell, in one file."""
    kind, root = source(work.cell.dataset, data)
    classes = 100 if work.cell.dataset == "mini-imagenet" else 10
    few = work.setting.images
    prepare(
        kind,
        work.images,
        root=root,
        image_size=work.setting.size,
        per_class=few // classes if few else None,
        validation=0.05,
        test=0.2,
        seed=0,
    )


def source(dataset: str, data: Path) -> tuple[str, Path]:
    """Kind and root of a data set, as `prepare` takes them.

    Raises
    ------
    DataError
        It is not there, and `prepare` would try to download it.
    """
    folder, download = data / dataset, data / DOWNLOADS[dataset]
    if (folder / "train").is_dir():
        return "image-folder", folder
    if download.is_dir():
        return dataset, data
    raise DataError(
        f"{download} does not exist: give with --data the folder that holds MNIST/raw, "
        "cifar-10-batches-py or cifar10/{train,test}, and mini-imagenet/{train,val}."
    )


def train(work: Work, images: Images) -> tuple[list[Point], float]:
    """The original task: its loss curve, and the accuracy of its last weights on test images."""
    setting = work.setting
    done = work.folder / "trained.json"
    if not done.exists():
        network = work.network(len(images.classes))
        if work.compile:
            network.compile()
        seen = {"size": setting.size, "mean": images.mean, "std": images.std}
        flip = work.cell.dataset != "mnist"
        batches = TrainBatches(
            *load(work.fabric, images, "train"),
            batch_size=setting.batch_size,
            augment=Augment(pad=setting.size // 8, flip=flip),
            seed=setting.seed,
            **seen,
        )
        held_out = Validation(*load(work.fabric, images, "val"), **seen)
        tested = Validation(*load(work.fabric, images, "test"), **seen)
        plan = Plan(
            *(work.epochs, setting.points_per_epoch, "adam"),
            *(setting.lr, 0.0, "cosine", setting.seed, setting.horizon),
        )
        where = work.folder / "train"
        with work.clock("train"):
            history = train_classifier(
                *(work.fabric, network, batches, held_out, plan, where), work.reporter
            )
        load_into(network, point_file(where, len(history)))
        top1 = evaluate(work.fabric, network.to(work.fabric.device), tested)[1]
        write_json(done, {"history": [asdict(point) for point in history], "top1": top1})
    return work.read(done, lambda found: trained(found, work.epochs * setting.points_per_epoch))


def trained(found: Any, points: int) -> tuple[list[Point], float]:
    """Loss curve and accuracy, as `train` wrote them.

    Raises
    ------
    ValueError
        The curve has another number of points.
    """
    history = [Point(**numbers(row)) for row in found["history"]]
    if len(history) != points:
        raise ValueError
    return history, number(found["top1"])


def find_markers(work: Work, history: list[Point]) -> Markers:
    """The points that made the scores."""
    setting = work.setting
    try:
        return epoch_markers(
            [point.train_loss for point in history],
            PHASES,
            setting.mu or work.cell.mu,
            relative=setting.relative,
            method=setting.method,
        )
    except MarkerError as error:
        raise MarkerError(
            f"{str(error).rpartition(': ')[0]}: remove {work.folder} and start the cell again with "
            f"--points {2 * setting.points_per_epoch} or more."
        ) from error


def keep_markers(work: Work, markers: Markers) -> list[Path]:
    """The weights of the markers; those of all other points are removed."""
    where = work.folder / "train"
    kept = [point_file(where, point) for point in markers.points]
    for path in set(where.glob("point-*.safetensors")) - set(kept):
        path.unlink()
    return kept


def extraction(work: Work, images: Images) -> Extraction:
    """How maps are made and stored."""
    network = work.network(len(images.classes))
    shape = feature_shape(network, work.setting.size)
    return Extraction(shape, "float16", None, 1024, 256, work.setting.size)


def parts_of(work: Work, images: Images) -> list[range]:
    """The training images in as many pieces as the disk asks for, settled in the first slice.

    Raises
    ------
    ParamsError
        The maps of a piece that can be split do not fit on the disk.
    """
    count, path = images.counts["train"], work.folder / "parts.json"
    if not path.exists():
        each = PHASES * 2 * math.prod(extraction(work, images).shape)
        needed = math.ceil(count * each / work.disk)
        try:
            pieces(count, needed)
        except ValueError as error:
            raise ParamsError(
                f"the maps may take {work.disk / 1e9:.3g} GB and those of one image take "
                f"{each / 1e9:.3g}, which leaves a part with fewer than {LEAST} images: "
                "give more with --disk."
            ) from error
        write_json(path, needed)
    return work.read(path, lambda found: pieces(count, found))


def pieces(count: int, most: int) -> list[range]:
    """The images 0 up to ``count`` in ``most`` pieces or fewer; the last is the smallest.

    Raises
    ------
    ValueError
        A piece has fewer than `LEAST` images, or ``most`` is no number of pieces.
    """
    if type(most) is not int or most < 1:
        raise ValueError
    size = math.ceil(count / most)
    found = [range(start, min(start + size, count)) for start in range(0, count, size)]
    if len(found[-1]) < LEAST:
        raise ValueError
    return found


def store(
    work: Work, images: Images, checkpoints: list[Path], rows: range, number: int
) -> ShardStore:
    """The maps of a part; those of other parts are removed first."""
    folder = work.folder / f"maps-{number}"
    for other in work.folder.glob("maps-*"):
        if other != folder:
            shutil.rmtree(other)
    if not (folder / "manifest.json").exists():
        settings = extraction(work, images)
        network = work.network(len(images.classes))
        with work.clock("features"):
            shards = extract(
                *(work.fabric, network, checkpoints, images, settings, folder),
                *(work.reporter, rows),
            )
        Manifest(
            *(settings.dtype, settings.compression, settings.shape, PHASES, len(rows)),
            shards=tuple(shards),
            classes=len(images.classes),
        ).save(folder)
    return ShardStore.open(folder)


def fmce_net(work: Work, maps: ShardStore) -> FmceNet:
    """The network before it has learnt."""
    torch.manual_seed(work.setting.seed)
    channels, height, width = maps.manifest.shape
    return FmceNet((channels, height, width), PHASES)


def rows_of(work: Work, maps: ShardStore, split: str) -> Split:
    """Training, validation and test rows of a part."""
    images = maps.manifest.images
    return SPLITS[split](images, PHASES, TEST, VALIDATION, work.setting.seed)


def best_of(work: Work, split: str, number: int) -> Path:
    """The weights of FMCE-Net after a part."""
    return work.folder / f"fmce-{split}" / f"part-{number}" / "best.safetensors"


def learn(work: Work, images: Images, checkpoints: list[Path], rows: range, number: int) -> None:
    """FMCE-Net of either split goes on with a part."""
    for split in SPLITS:
        where = best_of(work, split, number).parent
        if (where / "done.json").exists():
            continue
        with store(work, images, checkpoints, rows, number) as maps:
            network = fmce_net(work, maps)
            if number:
                load_into(network, best_of(work, split, number - 1))
            chosen, setting = rows_of(work, maps, split), work.setting
            plan = FmcePlan(setting.fmce_epochs, setting.fmce_batch_size, 1e-3, setting.seed)
            with work.clock(f"fmce, split by {split}"):
                history = train_fmce(
                    *(work.fabric, network, maps, chosen.train, chosen.validation),
                    *(plan, where, work.reporter),
                )
        write_json(where / "done.json", asdict(best_epoch(history)))


def confusion_file(work: Work, split: str, number: int) -> Path:
    """The counts of the test maps of a part."""
    return work.folder / f"fmce-{split}" / f"confusion-{number}.json"


def judge_part(
    work: Work, images: Images, checkpoints: list[Path], rows: range, number: int, parts: int
) -> None:
    """FMCE-Net of either split, after the last part, judges its test maps of a part."""
    for split in SPLITS:
        path = confusion_file(work, split, number)
        if path.exists():
            continue
        with store(work, images, checkpoints, rows, number) as maps:
            network = fmce_net(work, maps)
            load_into(network, best_of(work, split, parts - 1))
            network.to(work.fabric.device)
            chosen = rows_of(work, maps, split).test
            matrix, _ = judge(work.fabric, network, maps, chosen, 256)
        write_json(path, matrix.tolist())


def judged(work: Work, parts: int, split: str) -> dict[str, Any]:
    """Figures of the test maps of all parts together."""
    total = np.zeros((PHASES, PHASES), np.int64)
    for number in range(parts):
        total += work.read(confusion_file(work, split, number), confusion)
    last = best_of(work, split, parts - 1).parent / "done.json"
    best = work.read(last, lambda found: Epoch(**numbers(found)))
    return {
        **asdict(Figures.of(total)),
        "best_epoch": best.epoch,
        "validation_accuracy": best.val_accuracy,
        "confusion": total.tolist(),
    }


def confusion(found: Any) -> NDArray[np.int64]:
    """(K, K) counts of a part, as `judge_part` wrote them.

    Raises
    ------
    ValueError
        They are something else.
    """
    counts = np.array(found)
    of_maps = counts.shape == (PHASES, PHASES) and counts.dtype == np.int64
    if not of_maps or counts.min() < 0 or not counts.any():
        raise ValueError
    return counts


def result(
    work: Work,
    images: Images,
    history: list[Point],
    top1: float,
    markers: Markers,
    parts: int,
    found: dict[str, Any],
) -> dict[str, Any]:
    """Everything that a reader needs to believe the figures, or to repeat them."""
    names = ("torch", "torchvision", "h5py", "lightning-fabric", "numpy")
    on = work.read(work.folder / "origin.json", origin)["on"]
    return {
        "cell": work.name,
        "scale": work.scale,
        "setting": asdict(work.setting),
        "compile": work.compile,
        "epochs": work.epochs,
        "images": images.counts,
        "side": images.side,
        "map": list(extraction(work, images).shape),
        "parts": parts,
        "losses": [point.train_loss for point in history],
        "top1": top1,
        "markers": asdict(markers),
        "fmce": found,
        "seconds": {step: round(seconds, 1) for step, seconds in work.seconds.items()},
        "hardware": "; ".join(dict.fromkeys(machine for machine, _ in on)),
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
        "commit": "; ".join(dict.fromkeys(made_by for _, made_by in on)),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware(fabric: Fabric) -> str:
    """What the cell ran on."""
    if fabric.device.type == "cuda":
        return torch.cuda.get_device_name(fabric.device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def render() -> None:
    """Replace the tables of docs/results.md by those of all results.

    Raises
    ------
    DataError
        The page or a result is damaged.
    """
    page = RESULTS.parents[1] / "docs" / "results.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"{page} lacks the line {BEGIN} or {END}: put it back.")
    results = [rendered(path) for path in sorted(RESULTS.glob("*.json"))]
    write_text(page, f"{before}{BEGIN}\n{tables(results)}{END}{after}")


def rendered(path: Path) -> dict[str, Any]:
    """A result that has all that the tables show.

    Raises
    ------
    DataError
        It lacks some of it.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        tables([found])
        return found
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no result of a cell: remove it and run the cell.") from error


BEGIN, END = "<!-- tables: python benchmarks/replicate.py --render -->", "<!-- end -->"


def tables(results: list[dict[str, Any]]) -> str:
    """Tables I and II, published beside ours, and what each cell took."""
    cells, scales = list(CELLS), list(SCALES)
    results = sorted(
        results,
        key=lambda r: (cells.index(r["cell"]), scales.index(r["scale"]), r["setting"]["seed"]),
    )
    published = [
        f"| {name} | published | {cell.epochs} | {cell.mu:g} | {listed(cell.markers)} | "
        f"{cell.top1:.4f} |"
        for name, cell in CELLS.items()
    ]
    one = [*published, *map(row_one, results)]
    two = [f"| {n} | published | maps | {c.fmce:.4f} | | | | | | |" for n, c in CELLS.items()]
    two += [row for found in results for row in rows_two(found)]
    names = list(CELLS)
    for rows in (one, two):
        rows.sort(key=lambda row: names.index(row.split("|")[1].strip()))
    return "\n".join(
        [
            "### Table I: the original task",
            "",
            "| cell | scale, seed | epochs | mu | markers | top-1 |",
            "|---|---|---|---|---|---|",
            *one,
            "",
            "Markers are epochs at the scales `paper` and `gpu`, and points (halves of an epoch) "
            "at the others; mu in brackets was not reached, and the last point serves.",
            "",
            "### Table II: FMCE-Net on test maps",
            "",
            "| cell | scale, seed | split by | accuracy | precision | recall | F1 "
            "| within one | over published | errors between the last two |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *two,
            "",
            "Maps are those of the classifier's training images, as in the paper; test maps are a "
            "quarter of them, 5,000 at the scales `cpu` and `cpu-cut`; split by images, all ten of "
            "a quarter of the images. Of the published table the accuracy alone was at hand.",
            "",
            "### What each cell was, and took",
            "",
            "| cell | scale, seed | images: training, test | map | parts | minutes | on | commit |",
            "|---|---|---|---|---|---|---|---|",
            *map(row_cost, results),
            "",
            "Minutes are those of the clock for images, training, maps and FMCE-Net's training, "
            "most with other work beside it; the last judgements are not among them.",
            "",
        ]
    )


def listed(markers: Any) -> str:
    """As the paper prints them."""
    return f"[{' '.join(map(str, markers))}]"


def label(found: dict[str, Any]) -> str:
    """Scale and seed, and in how many parts the maps were judged if not at once."""
    parts = f", {found['parts']} parts" if found["parts"] > 1 else ""
    return f"{found['scale']}, {found['setting']['seed']}{parts}"


def row_one(found: dict[str, Any]) -> str:
    """A row of table I."""
    markers = found["markers"]
    mu = f"{markers['mu']:.2g}" if markers["converged"] else f"({markers['mu']:.2g})"
    points, usual = found["setting"]["points_per_epoch"], SCALES[found["scale"]].points_per_epoch
    told = "" if points == usual else f", {points} points an epoch"
    return (
        f"| {found['cell']} | {label(found)} | {found['epochs']} | {mu} | "
        f"{listed(markers['points'])}{told} | {found['top1']:.4f} |"
    )


def rows_two(found: dict[str, Any]) -> list[str]:
    """The rows of table II, one for each split."""
    names = ("accuracy", "precision", "recall", "f1", "within_one")
    rows = []
    for split, figures in found["fmce"].items():
        over = figures["accuracy"] - CELLS[found["cell"]].fmce
        cells = [f"{figures[name]:.4f}" for name in names]
        words = "images" if split == "image" else "maps"
        start = f"| {found['cell']} | {label(found)} | {words} | "
        late = late_errors(np.array(figures["confusion"]))
        rows.append(f"{start}{' | '.join(cells)} | {over:+.4f} | {late} |")
    return rows


def late_errors(confusion: NDArray[np.int64]) -> str:
    """Share of the misjudged maps that lie between the last two phases; empty if none is."""
    errors = confusion.sum() - confusion.trace()
    return f"{(confusion[-2, -1] + confusion[-1, -2]) / errors:.2f}" if errors else ""


def row_cost(found: dict[str, Any]) -> str:
    """What a cell was, and took."""
    minutes = sum(found["seconds"].values()) / 60
    shape, counts = "x".join(map(str, found["map"])), found["images"]
    compiled = ", torch.compile" if found["compile"] else ""
    return (
        f"| {found['cell']} | {label(found)} | {counts['train']}, {counts['test']} at "
        f"{found['setting']['size']} px | {shape} | {found['parts']} | {minutes:.0f} | "
        f"{found['hardware']}{compiled} | {found['commit']} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says; what a user can cause is one sentence and exit 2."""
    given = parsed(arguments)
    try:
        if given.render:
            render()
        else:
            replicate(given)
    except SliceOverError:
        print("the slice is over: give the same command again")
        sys.exit(NOT_YET)
    except KeyboardInterrupt:
        print("stopped; what was done is kept: give the same command again", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except FmceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cell", nargs="?", choices=CELLS)
    parser.add_argument("state", nargs="?", type=Path, help="folder that keeps all that is done")
    layout = "folder with MNIST/raw, cifar-10-batches-py or cifar10/, mini-imagenet/; the first "
    layout += "slice makes its own images of it"
    parser.add_argument("--data", type=Path, default=Path("data/raw"), help=layout)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--minutes", type=positive, default=math.inf, help="of this slice")
    parser.add_argument("--seed", type=seed, default=0)
    disk = "GB that maps may take, settled by the first slice; half of what is free"
    parser.add_argument("--disk", type=positive, help=disk)
    points = "records of loss and weights in an epoch, from which markers are taken; the scale's"
    parser.add_argument("--points", type=count, help=points)
    compiled = {"action": argparse.BooleanOptionalAction, "default": torch.cuda.is_available()}
    words = "train through torch.compile, as on a GPU unless told otherwise"
    parser.add_argument("--compile", **compiled, help=words)
    parser.add_argument("--render", action="store_true", help="write docs/results.md")
    given = parser.parse_args(arguments)
    if not given.render and (given.cell is None or given.state is None):
        parser.error("give a cell and a folder for its state, or --render")
    return given


def positive(text: str) -> float:
    """A finite number above zero."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return number


def count(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return number


def seed(text: str) -> int:
    """What torch and NumPy take as a seed."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**32 - 1")
    return number


def replicate(given: argparse.Namespace) -> None:
    """Work at a cell, and write its result."""
    name = name_of(given)
    folder = given.state / name
    if not (folder / IMAGES).exists():
        source(CELLS[given.cell].dataset, given.data)  # before a folder is made for nothing
    with held(folder):
        with Slice(given.minutes) as reporter, restartable(folder):
            found = run(work_of(given, folder, reporter), given.data)
        name += f"-parts{found['parts']}" if found["parts"] > 1 else ""
        write_json(RESULTS / f"{name}.json", found)
        shutil.rmtree(folder)
    print(f"{RESULTS.name}/{name}.json is written")


def name_of(given: argparse.Namespace) -> str:
    """Of the folder and the result of a cell: what else is asked for makes another."""
    name = f"{given.cell}-{given.scale}-{given.seed}"
    if given.points not in (None, SCALES[given.scale].points_per_epoch):
        name += f"-points{given.points}"
    return name + ("-compile" if given.compile else "")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder of a cell, and hold it against other processes.

    Raises
    ------
    DiskError
        It cannot be made, or another process holds it.
    """
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DiskError(
            f"{folder} is in use by another process: "
            "wait until that has ended, or choose another folder for the state."
        ) from error
    except OSError as error:
        raise DiskError(
            f"{folder} cannot be made a folder ({disk_reason(error)}): "
            "choose another folder for the state."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def restartable(folder: Path) -> Iterator[None]:
    """Say what to do where a file in the folder of a cell is missing or damaged.

    The library's own advice names commands that this script does not have. What does not name the
    folder, as an error in ``--data``, is left as it is.
    """
    try:
        yield
    except (DataError, ModelError, ShardError) as error:
        what = str(error).rpartition(": ")[0]
        if str(folder) not in what:
            raise
        raise DataError(f"{what}: remove the folder {folder} and start the cell again.") from error


def work_of(given: argparse.Namespace, folder: Path, reporter: Slice) -> Work:
    """What the command line asks for, on this machine."""
    setting = replace(SCALES[given.scale], seed=given.seed)
    if given.points:
        setting = replace(setting, points_per_epoch=given.points)
    if torch.cuda.is_available():
        setting = replace(setting, precision="bf16-mixed")
    disk = 1e9 * given.disk if given.disk else shutil.disk_usage(folder).free / 2
    return Work(
        *(given.cell, given.scale, CELLS[given.cell], setting, folder),
        *(disk, launch(setting.precision), reporter, given.compile),
    )


if __name__ == "__main__":
    main()
