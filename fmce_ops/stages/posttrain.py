"""Stage ``posttrain``: each module trained on its own target, beside its controls."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from torch import Tensor, nn

from fmce_ops.data import Images, to_input
from fmce_ops.figures import arms_figure, gradcam, targets_figure
from fmce_ops.files import write_json, write_table
from fmce_ops.models import Classifier, functional_modules, load_into
from fmce_ops.reverse import reverse
from fmce_ops.shards import ShardStore
from fmce_ops.stages.champion import on_validation
from fmce_ops.stages.folds import fold_logits
from fmce_ops.stages.networks import describe_classifier, trained_classifier
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import CHECKPOINTS, IMAGES, RESULTS, TARGETS, Stage, now, open_stage
from fmce_ops.stages.work import publish
from fmce_ops.tracking.registry import log_network, register
from fmce_ops.training.comparison import Interval, paired
from fmce_ops.training.devices import launch
from fmce_ops.training.posttrain import (
    ARMS,
    Arm,
    Job,
    Judgement,
    PosttrainEpoch,
    PosttrainPlan,
    Stores,
    best_of,
    best_weights,
    check_mode,
    jobs,
    judge_images,
    train_span,
)
from fmce_ops.training.reporter import Reporter, Row
from fmce_ops.training.targets import (
    INPUTS,
    OUTPUTS,
    OWN,
    TARGET,
    VALIDATION,
    Span,
    TargetSettings,
    find_spans,
    most_changed,
    whole_span,
    write_targets,
)

SECTIONS = ["data", "model", "train", "posttrain"]
NAME = "fmce-posttrained"
_PLAN = {"mode", "epochs", "batch_size", "lr", "schedule", "weight_decay"}
PICTURES = 4  # images that are shown with their targets
METRICS, TABLE = RESULTS / "posttrain.json", RESULTS / "posttrain.csv"


def run(params: Params, progress: Reporter | None = None) -> None:
    """Write ``results/posttrain.json``, ``posttrain.csv``, ``data/targets/``; register the best."""
    fabric = launch(params.train.precision)  # which the trainings of the folds alone use
    with (
        open_stage(
            "posttrain",
            params,
            SECTIONS,
            inputs=[IMAGES, CHECKPOINTS],
            outputs=[METRICS, TABLE, TARGETS],
            progress=progress,
            fabric=fabric,
        ) as stage,
        Images.open(IMAGES) as images,
    ):
        classifier = trained_classifier(params, len(images.classes))
        study = _Study(fabric, stage, params, images, classifier)
        spans = study.spans
        for span in spans:
            check_mode(params.posttrain.mode, span)
        held_out = fold_logits(fabric, stage, params, images) if params.posttrain.folds else None
        facts = {span.name: study.write_targets(span, held_out) for span in spans}
        histories = study.train()
        if fabric.is_global_zero:
            incoming = study.judge("untouched", 0, classifier, {})
            outcomes = [study.compose(histories, arm, seed) for arm, seed in study.pairs()]
            _publish(study, facts, histories, incoming, outcomes)


@dataclass(frozen=True)
class _Choice:
    """The job that is best on validation, of one span, arm and seed."""

    job: Job
    best: PosttrainEpoch


_Histories = dict[tuple[str, Job], list[PosttrainEpoch]]


@dataclass(frozen=True)
class _Outcome:
    """A composed network: which spans got new weights, and how it judges."""

    arm: str
    seed: int
    network: Classifier
    changed: dict[str, _Choice]
    val: Judgement
    test: Judgement


@dataclass(frozen=True)
class _Study:
    """What the parts of the stage share."""

    fabric: Fabric
    stage: Stage
    params: Params
    images: Images
    classifier: Classifier

    @property
    def spans(self) -> list[Span]:
        """The spans to train, of the network as it came in."""
        return self.spans_of(self.classifier)

    def spans_of(self, classifier: Classifier) -> list[Span]:
        """The same spans of a copy of the network."""
        modules, settings = functional_modules(classifier), self.params.posttrain
        soft = settings.mode == "soft"
        names = settings.modules or ([whole_span(modules)] if soft else None)
        return find_spans(modules, names)

    def pairs(self) -> list[tuple[Arm, int]]:
        """Every arm with every seed."""
        return [(arm, seed) for arm in ARMS for seed in range(self.params.posttrain.seeds)]

    def write_targets(self, span: Span, held_out: Tensor | None) -> dict[str, Any]:
        """The stores of a span, and how the reverse steps went; held_out: (N, K) logits."""
        settings = self.params.posttrain
        how = TargetSettings(
            margin=settings.margin,
            pull=settings.pull,
            size=self.params.data.image_size,
            images_per_shard=settings.images_per_shard,
            batch_size=settings.batch_size,
        )
        folder = self.stage.folder / span.name
        reporter = self.stage.reporter
        return write_targets(self.fabric, span, self.images, how, folder, reporter, held_out)

    def train(self) -> _Histories:
        """Train every job, side by side where there are processes for it."""
        settings = self.params.posttrain
        plan = PosttrainPlan(**settings.model_dump(include=_PLAN))
        every = [
            (span, job)
            for span in self.spans
            for job in jobs(settings.mode, settings.alphas, settings.seeds)
        ]
        mine = every[self.fabric.global_rank :: self.fabric.world_size]
        self.stage.reporter.begin("posttrain", len(mine))
        for step, (span, job) in enumerate(mine, start=1):
            best = best_of(self._train_job(span, job, plan))
            values = {"val/accuracy": best.val_accuracy, "val/loss": best.val_loss}
            self.stage.reporter.row(Row(step, values, now()))
        self.fabric.barrier()
        # What was trained here or elsewhere is read from the work folder.
        found = {(span.name, job): self._train_job(span, job, plan) for span, job in every}
        incoming = {
            (span, Job("untouched", 0.0, job.seed)): history[:1]
            for (span, job), history in found.items()
            if job.arm == "ce"
        }
        return incoming | found

    def _train_job(self, span: Span, job: Job, plan: PosttrainPlan) -> list[PosttrainEpoch]:
        folder = self.stage.folder / span.name
        with Stores.open(folder) as stores:
            return train_span(span, stores, plan, job, folder / job.name, self.fabric.device)

    def choose(self, histories: _Histories, span: str, arm: str, seed: int) -> _Choice:
        """The alpha and epoch that are best on validation."""
        choices = [
            _Choice(job, best_of(history))
            for (name, job), history in histories.items()
            if (name, job.arm, job.seed) == (span, arm, seed)
        ]
        return max(choices, key=lambda choice: choice.best.rank)

    def compose(self, histories: _Histories, arm: str, seed: int) -> _Outcome:
        """Put new weights into the spans one by one, where that is better on validation."""
        network, changed = copy.deepcopy(self.classifier), dict[str, _Choice]()
        standing = self.on(network, "val")
        for span in self.spans_of(network):
            choice = self.choose(histories, span.name, arm, seed)
            if choice.best.epoch == 0:
                continue
            before = copy.deepcopy(span.inside.state_dict())
            load_into(span.inside, best_weights(self.stage.folder / span.name / choice.job.name))
            found = self.on(network, "val")
            if found.rank > standing.rank:
                standing, changed[span.name] = found, choice
            else:
                span.inside.load_state_dict(before)
        return self.judge(arm, seed, network, changed)

    def judge(
        self, arm: str, seed: int, network: Classifier, changed: dict[str, _Choice]
    ) -> _Outcome:
        """Judge a network on validation and test."""
        val, test = self.on(network, "val"), self.on(network, "test")
        return _Outcome(arm, seed, network, changed, val, test)

    def on(self, network: Classifier, split: str) -> Judgement:
        """Judge a network on a split."""
        size = self.params.data.image_size
        return judge_images(network, self.images, split, size, self.fabric.device)


def _publish(
    study: _Study,
    facts: dict[str, Any],
    histories: _Histories,
    incoming: _Outcome,
    outcomes: Sequence[_Outcome],
) -> None:
    stage = study.stage
    publish(_stores(study), TARGETS)
    seeds = range(study.params.posttrain.seeds)
    by_arm: dict[str, list[_Outcome]] = {"untouched": [replace(incoming, seed=s) for s in seeds]}
    for outcome in outcomes:
        by_arm.setdefault(outcome.arm, []).append(outcome)
    gains = {
        control: {
            split: asdict(paired(_accuracies(by_arm["frp"], split), _accuracies(theirs, split)))
            for split in ("val", "test")
        }
        for control, theirs in by_arm.items()
        if control != "frp"
    }
    winner = max(by_arm["frp"], key=_rank)
    best = max([winner, *outcomes], key=_rank)
    arms = {arm: [_record(o) for o in found] for arm, found in by_arm.items()}
    summary = {
        "mode": study.params.posttrain.mode,
        "folds": study.params.posttrain.folds,
        "targets": facts,
        "arms": arms,
        "gain_of_frp": gains,
        "best_on_validation": {"arm": best.arm, **_record(best)},
        "changed": sorted(winner.changed),
        "val_accuracy": winner.val.accuracy,
        "test_accuracy": winner.test.accuracy,
    }
    write_json(METRICS, summary)
    write_table(TABLE, _rows(study, histories))
    tests = {arm: _accuracies(found, "test") for arm, found in by_arm.items()}
    intervals = {
        control: {split: Interval(**interval) for split, interval in found.items()}
        for control, found in gains.items()
    }
    stage.figure(arms_figure(tests, intervals), "arms.png")
    for old in (RESULTS / stage.name).glob("targets-*.png"):  # of other spans, perhaps
        old.unlink()
    for span in study.spans:
        stage.figure(_before_and_after(study, span, winner), f"targets-{span.name}.png")
    if stage.run:
        _log(study, histories, [o for found in by_arm.values() for o in found], gains)
        _register(study, winner)


def _stores(study: _Study) -> dict[str, Path]:
    """The files of all stores, by their name in ``data/targets``."""
    files = {}
    for span in study.spans:
        for store in (INPUTS, OUTPUTS, VALIDATION):
            folder = study.stage.folder / span.name / store
            for file in sorted(folder.iterdir()):
                files[f"{span.name}/{store}/{file.name}"] = file
    return files


def _rank(outcome: _Outcome) -> tuple[float, float]:
    return outcome.val.rank


def _accuracies(outcomes: Sequence[_Outcome], split: str) -> list[float]:
    return [getattr(outcome, split).accuracy for outcome in outcomes]


def _record(outcome: _Outcome) -> dict[str, Any]:
    chosen = {
        name: {"alpha": choice.job.alpha, "epoch": choice.best.epoch}
        for name, choice in outcome.changed.items()
    }
    judged = {"val": asdict(outcome.val), "test": asdict(outcome.test)}
    return {"seed": outcome.seed, "changed": chosen, **judged}


def _rows(study: _Study, histories: _Histories) -> list[list[object]]:
    """Every epoch of every job."""
    names = ["module", "arm", "alpha", "seed", "epoch", "train_loss", "val_loss", "val_accuracy"]
    rows: list[list[object]] = [list(names)]
    for (span, job), history in histories.items():
        for e in history:
            loss = "" if e.epoch == 0 else e.train_loss
            head = [span, job.arm, job.alpha, job.seed]
            rows.append([*head, e.epoch, loss, e.val_loss, e.val_accuracy])
    return rows


def _before_and_after(study: _Study, span: Span, winner: _Outcome) -> Figure:
    """The images whose targets ask for the greatest change."""
    with ShardStore.open(TARGETS / span.name / OUTPUTS) as store:
        rows = most_changed(store, PICTURES)
        made, target = (torch.from_numpy(store.batch(phase, rows)) for phase in (OWN, TARGET))
    if not len(span.behind):
        made, target = _before_head(span, rows, target)
    pixels, labels = zip(*(study.images.read("train", row, row + 1) for row in rows), strict=True)
    images, label = torch.cat(pixels), torch.cat(labels)
    inputs = to_input(
        images, size=study.params.data.image_size, mean=study.images.mean, std=study.images.std
    )
    heat = [gradcam(network.cpu(), inputs, label) for network in (study.classifier, winner.network)]
    names = [study.images.classes[number] for number in label.tolist()]
    return targets_figure(images, names, made.numpy(), target.numpy(), heat[0], heat[1])


def _before_head(span: Span, rows: list[int], target: Tensor) -> tuple[Tensor, Tensor]:
    """What the head of a span reads of the images at the rows, and what it should have read."""
    with ShardStore.open(TARGETS / span.name / INPUTS) as store:
        read = torch.from_numpy(store.batch(1, rows))
    *body, head = copy.deepcopy(span.inside).cpu().eval()
    with torch.inference_mode():
        made = nn.Sequential(*body)(read)
    return made, reverse(head, target, made).x


def _log(
    study: _Study,
    histories: _Histories,
    outcomes: Sequence[_Outcome],
    gains: dict[str, dict[str, dict[str, Any]]],
) -> None:
    """A child run for each arm, seed and span; the comparison in the parent."""
    run = study.stage.run
    assert run is not None
    for outcome in outcomes:
        for span in study.spans:
            choice = study.choose(histories, span.name, outcome.arm, outcome.seed)
            name = f"{outcome.arm} seed {outcome.seed} {span.name}"
            tags = {"fmce.arm": outcome.arm, "fmce.seed": str(outcome.seed)}
            tags |= {"fmce.module": span.name, "fmce.kept": str(span.name in outcome.changed)}
            with run.child(name, {**tags, "fmce.stage": "posttrain-arm"}) as child:
                child.params({"alpha": choice.job.alpha, "best_epoch": choice.best.epoch})
                history = histories[span.name, choice.job]
                child.begin(name, len(history) - 1)
                for epoch in history:
                    child.row(epoch.row())
                figures = {"val": outcome.val, "test": outcome.test}
                child.final({f"{s}/final_accuracy": j.accuracy for s, j in figures.items()}, now())
    finals = {
        f"gain_over_{control}/{split}": interval["mean"]
        for control, splits in gains.items()
        for split, interval in splits.items()
    }
    run.final(finals, now())
    run.file(METRICS)
    run.file(TABLE)


def _register(study: _Study, winner: _Outcome) -> None:
    run, images = study.stage.run, study.images
    assert run is not None
    network = describe_classifier(study.params, images, study.stage.inputs[str(IMAGES)])
    example = images.read("train", 0, 2)[0].to(torch.float32).numpy()
    step = max((choice.best.epoch for choice in winner.changed.values()), default=0)
    uri = log_network(run, NAME, network, winner.network.state_dict(), example, step=step)

    judge = on_validation(network, images, study.fabric.device)
    made = register(run, NAME, uri, winner.val.accuracy, judge)
    changed = ", ".join(sorted(winner.changed)) or "none: the incoming weights stay"
    run.tags(
        {
            "fmce.registered": f"{made.name} version {made.version} ({made.alias})",
            "fmce.changed_modules": changed,
        }
    )
