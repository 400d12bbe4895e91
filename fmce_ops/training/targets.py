"""What a span of modules should have made: its inputs, outputs and targets as stores of shards.

The corrected logits of every training image are brought back through the modules behind the span
(feature-level reverse propagation, arXiv 2506.07188), once; every module then trains on its own.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fmce_ops.data import Images, to_input
from fmce_ops.errors import ModelError
from fmce_ops.files import write_json
from fmce_ops.reverse import Reversal, Status, nearest_logits, propagate
from fmce_ops.shards import Manifest, Shard, ShardStore, ShardWriter
from fmce_ops.training.reporter import Reporter, Row

INPUTS, OUTPUTS, VALIDATION = "inputs", "outputs", "validation"  # the stores of a span
OWN, TARGET = 1, 2  # the phases of the store of outputs
_REPORTED = ("residual", "change", "iterations", "status")  # of a `Reversal`
_Key = tuple[str, int]  # store and phase
_Rows = dict[_Key, Tensor]


@dataclass(frozen=True)
class Span:
    """Neighbouring functional modules that are trained as one.

    Attributes
    ----------
    name : as in the parameters, such as ``conv5`` or ``stage4..head``.
    before, inside, behind : the modules of the network in their order, divided at the span.
    following : names of the modules behind.
    """

    name: str
    before: nn.Sequential
    inside: nn.Sequential
    behind: nn.Sequential
    following: tuple[str, ...]


def find_span(modules: Mapping[str, nn.Module], name: str | None) -> Span:
    """Cut a network at a span.

    Parameters
    ----------
    modules : as `functional_modules` gives them; the last is the head.
    name : a module, ``first..last``, or None for the last module with weights before the head.

    Raises
    ------
    ModelError
        There is no such module, the last comes before the first, the span has no weights, or no
        module before the head has any.
    """
    names, weighted = list(modules), [known for known in modules if _has_weights(modules[known])]
    if name is None:
        inner = [known for known in names[:-1] if known in weighted]
        if not inner:
            raise ModelError(
                "the network has no module with weights before its head: "
                f"set posttrain.modules to [{names[-1]}]."
            )
        name = inner[-1]
    start, stop = _bounds(names, weighted, name)
    every = list(modules.values())
    parts = every[:start], every[start:stop], every[stop:]
    before, inside, behind = (nn.Sequential(*part) for part in parts)
    return Span(name, before, inside, behind, tuple(names[stop:]))


def _bounds(names: list[str], weighted: list[str], span: str) -> tuple[int, int]:
    """Where a span starts and stops; ``weighted`` are the names of modules with weights."""
    first, several, last = span.partition("..")
    if several and not (first and last):
        raise ModelError(
            f"the span {span!r} of posttrain.modules has an open end: write first..last."
        )
    last = last or first
    for end in (first, last):
        if end not in names:
            raise ModelError(
                f"posttrain.modules names {end!r}, which the network does not have: "
                f"choose among {', '.join(weighted)}."
            )
    start, stop = names.index(first), names.index(last) + 1
    if start >= stop:
        raise ModelError(f"the span {span!r} of posttrain.modules ends before it begins.")
    if not set(weighted) & set(names[start:stop]):
        raise ModelError(
            f"the span {span!r} of posttrain.modules has no weights to train: "
            f"choose among {', '.join(weighted)}."
        )
    return start, stop


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def whole_span(modules: Mapping[str, nn.Module]) -> str:
    """The name of the span that is the whole network."""
    names = list(modules)
    return f"{names[0]}..{names[-1]}"


def find_spans(modules: Mapping[str, nn.Module], names: Sequence[str] | None) -> list[Span]:
    """Every span of ``posttrain.modules``, or the one that `find_span` gives for None.

    Raises
    ------
    ModelError
        A span is none, or a module is in two of them.
    """
    wanted: Sequence[str | None] = names or [None]
    spans = [find_span(modules, name) for name in wanted]
    for position, module in enumerate(modules):
        within = [s.name for s in spans if 0 <= position - len(s.before) < len(s.inside)]
        if len(within) > 1:
            raise ModelError(
                f"posttrain.modules has {module!r} in two spans, {within[0]!r} and {within[1]!r}: "
                "leave one of them out, or make them one span."
            )
    return spans


@dataclass(frozen=True)
class TargetSettings:
    """How targets are made and stored."""

    margin: float
    pull: float
    size: int  # px, the side that the network sees
    images_per_shard: int
    batch_size: int


def write_targets(
    fabric: Fabric,
    span: Span,
    images: Images,
    settings: TargetSettings,
    folder: Path,
    reporter: Reporter,
    held_out: Tensor | None = None,
) -> dict[str, Any]:
    """Write the stores ``inputs``, ``outputs`` and ``validation`` of a span into ``folder``.

    ``inputs`` and ``validation`` hold what the span reads of the training and the validation
    images, ``outputs`` what it makes of the training images (phase `OWN`) and what it should have
    made (phase `TARGET`). Parts that an earlier, interrupted run finished are kept; with several
    processes each writes its share.

    Parameters
    ----------
    held_out : (N, K) logits of the training images by networks that never saw them; their mean
        with the network's own is corrected. None corrects the network's own.

    Returns
    -------
    Samples, how many of them changed, and for each module behind the span how its reverse steps
    went: residual, change and iterations, statuses.
    """
    network = nn.Sequential(span.before, span.inside, span.behind).to(fabric.device).eval()
    means = _class_means(fabric, network, images, settings, held_out) if settings.pull else None
    maker = _Maker(span, settings, means, held_out)
    shapes = maker.shapes(next(_pixels(fabric, images, "train", 0, 1, settings))[0])
    parts = [
        _Part(split, part, start, min(settings.images_per_shard, images.counts[split] - start))
        for split in ("train", "val")
        for part, start in enumerate(range(0, images.counts[split], settings.images_per_shard))
    ]
    mine = parts[fabric.global_rank :: fabric.world_size]
    reporter.begin(f"targets of {span.name}", len(mine))
    for step, part in enumerate(mine, start=1):
        began = time.perf_counter()
        kept = (folder / part.record).exists()
        if not kept:
            write_json(
                folder / part.record,
                _write_part(fabric, maker, images, settings, folder, part, shapes),
            )
        speed = part.count / (time.perf_counter() - began)
        now = time.time_ns() // 1_000_000
        reporter.row(Row(step, {"images_per_second": speed}, now, again=kept))
    fabric.barrier()  # every part is on the disk
    read = [json.loads((folder / part.record).read_text(encoding="utf-8")) for part in parts]
    if fabric.is_global_zero:
        for store in (INPUTS, OUTPUTS, VALIDATION):
            _write_manifest(store, read, images, folder)
    fabric.barrier()
    return _summary(span, [facts["facts"] for facts in read if facts["facts"]["samples"]])


@dataclass(frozen=True)
class _Part:
    """The images ``start`` up to ``start + count`` of a split."""

    split: str
    part: int
    start: int
    count: int

    @property
    def record(self) -> str:
        """The file that says that the part is done, and how it went."""
        return f"{self.split}-{self.part:04d}.json"


def _pixels(
    fabric: Fabric, images: Images, split: str, start: int, stop: int, settings: TargetSettings
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs of the network, labels and positions, batch by batch."""
    for first in range(start, stop, settings.batch_size):
        pixels, labels = images.read(split, first, min(first + settings.batch_size, stop))
        inputs = to_input(
            fabric.to_device(pixels), size=settings.size, mean=images.mean, std=images.std
        )
        yield inputs, fabric.to_device(labels), torch.arange(first, first + len(labels))


@torch.inference_mode()
def _class_means(
    fabric: Fabric,
    network: nn.Module,
    images: Images,
    settings: TargetSettings,
    held_out: Tensor | None,
) -> Tensor:
    """(K, K) mean logits of each class's images that are classified correctly; NaN for none."""
    classes = len(images.classes)
    sums = torch.zeros(classes, classes, dtype=torch.float64, device=fabric.device)
    counts = torch.zeros(classes, dtype=torch.float64, device=fabric.device)
    for inputs, labels, positions in _pixels(
        fabric, images, "train", 0, images.counts["train"], settings
    ):
        logits = _source(network(inputs), positions, held_out).double()
        right = logits.argmax(1) == labels
        sums.index_add_(0, labels[right], logits[right])
        counts += torch.bincount(labels[right], minlength=classes)
    return (sums / counts[:, None]).float()


def _source(logits: Tensor, positions: Tensor, held_out: Tensor | None) -> Tensor:
    """(n, K) what is corrected at n positions: the logits, or their mean with the held-out ones."""
    if held_out is None:
        return logits
    return torch.lerp(logits, held_out[positions].to(logits.device), 0.5)


def corrected(
    logits: Tensor, labels: Tensor, settings: TargetSettings, means: Tensor | None
) -> Tensor:
    """(N, K) the nearest correct logits, pulled by ``settings.pull`` towards their class's mean.

    Those of a class that has no mean stay where they are.
    """
    nearest = nearest_logits(logits, labels, settings.margin)
    if means is None:
        return nearest
    own = means[labels]
    return torch.lerp(nearest, torch.where(own.isfinite(), own, nearest), settings.pull)


@dataclass(frozen=True)
class _Maker:
    """Makes the rows of all stores from a batch of inputs of the network."""

    span: Span
    settings: TargetSettings
    means: Tensor | None
    held_out: Tensor | None

    def shapes(self, example: Tensor) -> dict[_Key, tuple[int, ...]]:
        """Shape of one row in each store and phase."""
        read = self.span.before(example)
        made = self.span.inside(read)
        return {
            (INPUTS, 1): read.shape[1:],
            (OUTPUTS, OWN): made.shape[1:],
            (OUTPUTS, TARGET): made.shape[1:],
            (VALIDATION, 1): read.shape[1:],
        }

    def rows(
        self, split: str, inputs: Tensor, labels: Tensor, positions: Tensor
    ) -> tuple[_Rows, tuple[Reversal, ...]]:
        """The rows of a batch, and how the modules behind the span were reversed."""
        read = self.span.before(inputs)
        if split == "val":
            return {(VALIDATION, 1): read}, ()
        passed = [self.span.inside(read)]
        for module in self.span.behind:
            passed.append(module(passed[-1]))
        source = _source(passed[-1], positions, self.held_out)
        target = corrected(source, labels, self.settings, self.means)
        reversals: tuple[Reversal, ...] = ()
        if len(self.span.behind):
            found = propagate(list(self.span.behind), target, passed[:-1])
            target, reversals = found.targets[0], found.results
        rows = {(INPUTS, 1): read, (OUTPUTS, OWN): passed[0], (OUTPUTS, TARGET): target}
        return rows, reversals


@torch.no_grad()
def _write_part(
    fabric: Fabric,
    maker: _Maker,
    images: Images,
    settings: TargetSettings,
    folder: Path,
    part: _Part,
    shapes: Mapping[_Key, tuple[int, ...]],
) -> dict[str, Any]:
    """Write a shard for each store and phase; float32, for targets differ little from outputs."""
    facts = _Facts()
    stop = part.start + part.count
    keys = [key for key in shapes if (key[0] == VALIDATION) == (part.split == "val")]
    with ExitStack() as open_writers:
        writers = {}
        for store, phase in keys:
            writer = ShardWriter(
                folder / store,
                phase=phase,
                part=part.part,
                start=part.start,
                count=part.count,
                shape=shapes[store, phase],
                dtype="float32",
            )
            writers[store, phase] = open_writers.enter_context(writer)
        for inputs, labels, positions in _pixels(
            fabric, images, part.split, part.start, stop, settings
        ):
            rows, reversals = maker.rows(part.split, inputs, labels, positions)
            facts.add(rows, reversals)
            for key, writer in writers.items():
                writer.append(rows[key], positions.numpy(), labels.cpu().numpy())
    records = [[store, vars(writer.close())] for (store, _), writer in writers.items()]
    shape = {store: list(shapes[store, phase]) for store, phase in keys}
    return {"shards": records, "shapes": shape, "facts": asdict(facts)}


@dataclass
class _Facts:
    """How a part went; of each module behind the span, one value for each sample solved for."""

    samples: int = 0
    changed: int = 0
    steps: list[dict[str, list[float]]] = field(default_factory=list)

    def add(self, rows: _Rows, reversals: Sequence[Reversal]) -> None:
        """Count a batch."""
        if (OUTPUTS, OWN) not in rows:
            return
        own, target = rows[OUTPUTS, OWN], rows[OUTPUTS, TARGET]
        self.samples += len(own)
        self.changed += int((own != target).flatten(1).any(1).sum())
        self.steps = self.steps or [{name: [] for name in _REPORTED} for _ in reversals]
        for step, reversal in zip(self.steps, reversals, strict=True):
            solved = reversal.status != Status.UNCHANGED
            for name, values in step.items():
                values.extend(getattr(reversal, name)[solved].tolist())


def _write_manifest(
    store: str, parts: Sequence[Mapping[str, Any]], images: Images, folder: Path
) -> None:
    records = [record for part in parts for name, record in part["shards"] if name == store]
    shards = sorted((Shard(**record) for record in records), key=lambda s: (s.phase, s.part))
    shape = next(part["shapes"][store] for part in parts if store in part["shapes"])
    Manifest(
        dtype="float32",
        compression=None,
        shape=tuple(shape),
        phases=shards[-1].phase,
        images=images.counts["val" if store == VALIDATION else "train"],
        shards=tuple(shards),
        classes=len(images.classes),
    ).save(folder / store)


def _summary(span: Span, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {name: sum(p[name] for p in parts) for name in ("samples", "changed")}
    steps = zip(*(part["steps"] for part in parts), strict=True)
    summary["reversed"] = {
        name: _spread({what: list(chain(*(part[what] for part in step))) for what in _REPORTED})
        for name, step in zip(span.following, steps, strict=True)
    }
    return summary


def _spread(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median and worst of all samples, and how many ended how."""
    statuses = values["status"]
    counts = {s.name.lower(): statuses.count(s) for s in Status if s in statuses}
    found: dict[str, Any] = {"status": counts}
    for name in ("residual", "change", "iterations"):
        if values[name]:
            spread = {"median": float(np.median(values[name])), "worst": float(max(values[name]))}
            found[name] = spread
    return found


def most_changed(store: ShardStore, count: int) -> list[int]:
    """Positions of the images whose target lies farthest from what the span makes."""
    distances = [
        np.linalg.norm((target - own).reshape(len(own), -1), axis=1)
        for own, target in zip(store.scan(OWN), store.scan(TARGET), strict=True)
    ]
    order = np.argsort(-np.concatenate(distances), kind="stable")
    return [int(row) for row in order[:count]]
