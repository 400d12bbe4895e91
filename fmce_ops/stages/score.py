"""Score the modules of a network that anybody trained, or that is being trained."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.data import Images, generator, read_pictures, to_input
from fmce_ops.errors import DataError, ModelError
from fmce_ops.maturity import (
    Judge,
    Score,
    bags,
    find_modules,
    load_judge,
    next_to_train,
    score,
    untrained,
)
from fmce_ops.maturity_figures import scores_figure
from fmce_ops.models import load_checkpoint, make_network
from fmce_ops.stages.evaluate import refuse_unknown_code
from fmce_ops.stages.networks import build_classifier
from fmce_ops.stages.params import load_params
from fmce_ops.stages.stage import IMAGES, now
from fmce_ops.tracking.monitor import named
from fmce_ops.tracking.registry import load_network, model_folder
from fmce_ops.tracking.runs import Run, tracked
from fmce_ops.training.reporter import Row

_SUFFIXES = (".safetensors", ".pt", ".pth")
_POLL = 1.0  # seconds between two looks into a folder


@dataclass(frozen=True)
class Asked:
    """What to score, with what: the options of ``fmce-ops score``.

    Attributes
    ----------
    model_uri : a logged classifier; None: ``network``.
    network : a torchvision name or package.module:factory; None: that of params.yaml.
    classes : that the network is made with; None: as many as it has by itself.
    weights : a file of weights; None: those of the model, or random ones.
    data : a folder of pictures or a file of ``prepare``; None: the project's images.
    size : side in pixels that the network sees; None: that of the data or the parameters.
    images : how many are taken, at random.
    modules : names; None: all functional modules.
    judge : URI of a judge; None: the one that comes with this package.
    """

    model_uri: str | None = None
    network: str | None = None
    classes: int | None = None
    weights: Path | None = None
    data: Path | None = None
    size: int | None = None
    images: int = 256
    modules: tuple[str, ...] | None = None
    judge: str | None = None


@dataclass(frozen=True)
class Scored:
    """The modules of a network, first to last, and the one to train next.

    Attributes
    ----------
    untrained : modules whose weights cannot be told from those of a fresh network.
    """

    network: str
    images: int
    modules: dict[str, Score]
    untrained: list[str]
    next: str

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


def score_network(asked: Asked, params_file: Path) -> Scored:
    """Score one network and record it as a run with its figure.

    Raises
    ------
    ModelError
        The network cannot be made, its weights do not fit, or it makes no feature map.
    DataError
        The images are missing or cannot be read.
    """
    judge, subject = _judge(asked), _subject(asked, params_file)
    if asked.weights is not None:
        load_checkpoint(subject.network, asked.weights)
    name = str(asked.weights or asked.model_uri or asked.network or "a fresh network")
    found = _scored(name, subject, asked, judge)
    with _recorded(asked, name) as run:
        _record(run, found, 1)
    return found


def watch_folder(
    asked: Asked,
    folder: Path,
    count: int | None,
    params_file: Path,
    skipped: Callable[[str], None],
) -> Iterator[Scored]:
    """Score each file of weights as it appears in ``folder``, in the order of their times.

    All are steps of one run. A file that cannot be scored is told to ``skipped`` once it has had
    the time to be written, and tried again when it has changed.

    Parameters
    ----------
    count : stop after so many; None: go on for ever.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give the one that the checkpoints appear in.")
    judge, subject = _judge(asked), _subject(asked, params_file)
    seen: dict[Path, int] = {}
    step = 0
    with _recorded(asked, str(folder)) as run:
        while count is None or step < count:
            for file in _new_files(folder, seen):
                try:
                    load_checkpoint(subject.network, file)
                    found = _scored(str(file), subject, asked, judge)
                except ModelError as error:
                    if time.time_ns() - seen[file] > 10 * _POLL * 1e9:
                        skipped(f"{file} is passed over: {error}")
                    else:
                        del seen[file]
                    continue
                step += 1
                _record(run, found, step)
                yield found
                if step == count:
                    return
            time.sleep(_POLL)


def _new_files(folder: Path, seen: dict[Path, int]) -> list[Path]:
    """Weights that were written since they were last seen; ``seen`` is brought up to date."""
    times = {}
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # gone already, or a link to nowhere
            if file.suffix in _SUFFIXES:
                times[file] = file.stat().st_mtime_ns
    fresh = [file for file, changed in times.items() if seen.get(file) != changed]
    seen.update(times)
    return sorted(fresh, key=lambda file: (times[file], file.name))


def _judge(asked: Asked) -> Judge:
    if asked.judge is None:
        return load_judge()
    _, judge = load_network(model_folder(asked.judge))
    if not isinstance(judge, Judge):
        raise ModelError(f"{asked.judge} is no judge of maturity: give models:/fmce-maturity@….")
    return judge


@dataclass(frozen=True)
class _Subject:
    """The network, one of the same architecture with random weights, and images for it."""

    network: nn.Module
    fresh: nn.Module
    inputs: Tensor


def _subject(asked: Asked, params_file: Path) -> _Subject:
    torch.manual_seed(0)
    if asked.model_uri is not None:
        folder = model_folder(asked.model_uri)
        refuse_unknown_code(folder, params_file)
        described, network = load_network(folder)
        if described.kind not in ("classifier", "pathways"):
            raise ModelError(
                f"{asked.model_uri} is a {described.kind}: give a network that takes images."
            )
        pixels, _, _ = _pixels(asked, described.spec["image_size"])
        return _Subject(network, described.build(), described.prepare(pixels))
    if asked.network is not None:
        network = make_network(asked.network, asked.classes)
        size = asked.size or 224
    else:
        params = load_params(params_file)
        with Images.open(IMAGES) as images:
            network = build_classifier(params, len(images.classes))
        size = asked.size or params.data.image_size
    pixels, mean, std = _pixels(asked, size)
    inputs = to_input(pixels, size=size, mean=mean, std=std)
    return _Subject(network, copy.deepcopy(network), inputs)


def _pixels(asked: Asked, size: int) -> tuple[Tensor, Sequence[float], Sequence[float]]:
    """Images drawn at random, uint8 (n, c, s, s), and the statistics of their channels."""
    source = asked.data or IMAGES
    if asked.data and not source.exists():
        raise DataError(f"{source} is missing: give a folder of pictures, or a file of 'prepare'.")
    if source.is_dir():
        pixels = read_pictures(source, size, asked.images)
        values = pixels.float().transpose(0, 1).flatten(1) / 255
        return pixels, values.mean(1).tolist(), values.std(1).clamp_min(1e-3).tolist()
    with Images.open(source) as images:
        pixels, _ = images.load("train")
        order = torch.randperm(len(pixels), generator=generator(0))[: asked.images]
        return pixels[order], images.mean, images.std


def _scored(name: str, subject: _Subject, asked: Asked, judge: Judge) -> Scored:
    network, inputs = subject.network.eval(), subject.inputs
    found = score(network, inputs, asked.modules, judge=judge)
    at_start = untrained(network, subject.fresh, find_modules(network, inputs, asked.modules))
    read = sum(map(len, bags(inputs)))
    return Scored(name, read, found, at_start, next_to_train(found, at_start))


@contextlib.contextmanager
def _recorded(asked: Asked, name: str) -> Iterator[Run]:
    told = {key: str(value) for key, value in asdict(asked).items() if value is not None}
    tags = {"fmce.stage": "score", "fmce.backbone": asked.network or "", "fmce.scored": name}
    with tracked("score", params=told, tags=tags, system_metrics=False) as run:
        yield run


def _record(run: Run, found: Scored, step: int) -> None:
    values = named(found.modules)
    run.row(Row(step, values, now()))
    figure = scores_figure(found.modules, found.untrained, found.next, found.network)
    run.figure(figure, f"maturity-{step:04d}.png")
