"""Targets of spans, and their training beside the controls."""

import copy
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fmce_ops.data import Images, to_input
from fmce_ops.errors import ModelError, TrainingError
from fmce_ops.models import build, functional_modules, load_into, load_weights
from fmce_ops.reverse import nearest_logits
from fmce_ops.shards import RandomBatches, ShardStore
from fmce_ops.stages.folds import draw_folds, fold_logits
from fmce_ops.stages.networks import build_classifier
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import Stage
from fmce_ops.stages.train import training_batches
from fmce_ops.training.classifier import point_file
from fmce_ops.training.comparison import paired
from fmce_ops.training.devices import launch
from fmce_ops.training.posttrain import (
    Job,
    PosttrainPlan,
    Stores,
    best_of,
    best_weights,
    check_mode,
    jobs,
    judge_images,
    soft_loss,
    train_span,
)
from fmce_ops.training.posttrain import _record as posttrain_record
from fmce_ops.training.reporter import Reporters
from fmce_ops.training.targets import (
    OWN,
    TARGET,
    TargetSettings,
    corrected,
    find_span,
    find_spans,
    most_changed,
    write_targets,
)
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import ttest_rel
from torch import nn

from tests.project import SMALL, digits

SIZE = 16
SETTINGS = TargetSettings(margin=1.0, pull=0.0, size=SIZE, images_per_shard=60, batch_size=32)


@cache
def network():
    """Untrained, but with the statistics of batch norm that a trained one would have."""
    torch.manual_seed(0)
    made = build("shufflenet_v2_x0_5", 10, stem="small", in_size=SIZE).train()
    for _ in range(20):
        made(torch.randn(64, 3, SIZE, SIZE))
    return made.eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    with digits(tmp_path_factory.mktemp("images"), 15, SIZE) as opened:
        yield opened


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """The stores of conv5 with their folder and facts."""
    folder = tmp_path_factory.mktemp("span")
    span = find_span(functional_modules(network()), "conv5")
    facts = write_targets(launch(), span, images, SETTINGS, folder, Reporters())
    return span, folder, facts


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The stores of the whole network as one span, as `made`."""
    folder = tmp_path_factory.mktemp("whole")
    span = find_span(functional_modules(network()), "conv1..head")
    facts = write_targets(launch(), span, images, SETTINGS, folder, Reporters())
    return span, folder, facts


def test_modules_are_found_by_name_and_range():
    modules = functional_modules(network())
    assert find_span(modules, None).name == "conv5"
    span = find_span(modules, "stage4..head")
    assert [len(part) for part in (span.before, span.inside, span.behind)] == [4, 3, 0]
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        whole = span.behind(span.inside(span.before(x)))
        assert torch.equal(whole, nn.Sequential(*modules.values())(x))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stage9", "does not have: choose among conv1, stage2, stage3, stage4, conv5, head.$"),
        ("conv5..stage2", "ends before it begins"),
        ("conv5..", "an open end: write first..last"),
        ("..conv5", "an open end: write first..last"),
        ("maxpool", "no weights to train: choose among conv1, stage2, stage3, stage4, conv5, head"),
    ],
)
def test_a_span_that_is_none_is_named(name, words):
    with pytest.raises(ModelError, match=words):
        find_span(functional_modules(network()), name)


def test_a_class_without_a_right_answer_is_not_pulled():
    logits, labels = torch.tensor([[9.0, 2.0, 3.0], [1.0, 0.0, 2.0]]), torch.tensor([1, 2])
    settings = TargetSettings(0.0, 0.5, SIZE, 60, 32)
    means = torch.tensor([[0.0] * 3, [torch.nan] * 3, [0.0, 0.0, 4.0]])
    found = corrected(logits, labels, settings, means)
    assert found.tolist() == [[5.5, 5.5, 3.0], [0.5, 0.0, 3.0]]


def test_a_network_without_weights_before_its_head_is_told_so():
    modules = {"pool": nn.AvgPool2d(2), "relu": nn.ReLU(), "head": nn.Linear(4, 2)}
    with pytest.raises(ModelError, match=r"set posttrain.modules to \[head\]"):
        find_span(modules, None)


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (("conv5", "conv5"), "conv5"),
        (("conv5", "stage4..conv5"), "conv5"),
        (("conv1..stage3", "stage2"), "stage2"),
    ],
)
def test_a_module_in_two_spans_is_named(names, module):
    with pytest.raises(ModelError) as error:
        find_spans(functional_modules(network()), names)
    assert str(error.value) == (
        f"posttrain.modules has {module!r} in two spans, {names[0]!r} and {names[1]!r}: "
        "leave one of them out, or make them one span."
    )
    apart = find_spans(functional_modules(network()), ("conv5", "stage2..stage4"))
    assert [span.name for span in apart] == ["conv5", "stage2..stage4"]


def test_targets_classify_as_they_should_and_own_outputs_are_the_spans(made, images):
    span, folder, facts = made
    pixels, labels = images.load("train")
    inputs = to_input(pixels, size=SIZE, mean=images.mean, std=images.std)
    with torch.inference_mode():
        outputs = span.inside(span.before(inputs))
        wanted = nearest_logits(span.behind(outputs), labels, 1.0)
    with ShardStore.open(folder / "outputs") as store:
        own, target = (store.batch(phase, range(len(labels))) for phase in (OWN, TARGET))
        assert torch.equal(torch.from_numpy(store.label), labels)
        farthest = most_changed(store, 3)
    np.testing.assert_allclose(own, outputs, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        reached = span.behind(torch.from_numpy(target))
    torch.testing.assert_close(reached, wanted, rtol=1e-2, atol=5e-3)
    changed = (own != target).reshape(len(own), -1).any(1)
    assert facts["samples"] == len(labels)
    assert facts["changed"] == changed.sum() > 0
    solved = facts["reversed"]["head"]
    assert list(facts["reversed"]) == ["head"] and solved["residual"]["worst"] <= 1e-3
    assert solved["status"] == {"reached": facts["changed"]}
    distance = np.linalg.norm((target - own).reshape(len(own), -1), axis=1)
    assert farthest[0] == distance.argmax()


def test_parts_that_are_there_are_kept(made, images):
    span, folder, facts = made
    shard = folder / "outputs" / "phase-02-part-0001.h5"
    before = shard.stat().st_mtime_ns
    assert write_targets(launch(), span, images, SETTINGS, folder, Reporters()) == facts
    assert shard.stat().st_mtime_ns == before
    (folder / "train-0001.json").unlink()
    digest = shard.read_bytes()
    assert write_targets(launch(), span, images, SETTINGS, folder, Reporters()) == facts
    assert shard.read_bytes() == digest
    assert shard.stat().st_mtime_ns > before


def test_pulled_targets_lie_nearer_to_the_mean_of_their_class(made, images, tmp_path):
    span, folder, _ = made
    pulled = TargetSettings(1.0, 0.5, SIZE, 60, 32)
    write_targets(launch(), span, images, pulled, tmp_path, Reporters())
    with ShardStore.open(folder / "outputs") as a, ShardStore.open(tmp_path / "outputs") as b:
        rows = range(a.manifest.images)
        plain, drawn = a.batch(TARGET, rows), b.batch(TARGET, rows)
    assert not np.allclose(plain, drawn)


def plan(mode="mixed", epochs=3, lr=3e-3, schedule="one-cycle"):
    return PosttrainPlan(mode, epochs, 32, lr, schedule, 0.05)


def trained(made, folder, job, plan):
    span, stores, _ = made
    with Stores.open(stores) as opened:
        return train_span(span, opened, plan, job, folder, torch.device("cpu"))


def killed(made, folder, job, plan, epoch, monkeypatch):
    """A training that is killed before the given epoch is on the disk."""

    def record(*args):
        if len(args[-1].history) > epoch:
            raise KeyboardInterrupt
        posttrain_record(*args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("fmce_ops.training.posttrain._record", record)
        trained(made, folder, job, plan)


@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
@pytest.mark.parametrize(
    ("mode", "span"), [("mixed", "made"), ("local", "made"), ("soft", "whole")]
)
@pytest.mark.parametrize("arm", ["ce", "anchor", "frp"])
def test_a_training_that_was_cut_goes_on_to_the_same_bytes(
    request, tmp_path, monkeypatch, mode, span, arm, schedule
):
    made, job, how = request.getfixturevalue(span), Job(arm, 1.0, 3), plan(mode, schedule=schedule)
    uncut = trained(made, tmp_path / "whole", job, how)
    for epoch in (1, 2, 3):
        killed(made, tmp_path / "cut", job, how, epoch, monkeypatch)
    cut = trained(made, tmp_path / "cut", job, how)
    figures = [(e.epoch, e.train_loss, e.val_loss, e.val_accuracy, e.lr) for e in uncut[1:]]
    assert figures == [(e.epoch, e.train_loss, e.val_loss, e.val_accuracy, e.lr) for e in cut[1:]]
    files = [best_weights(tmp_path / name).read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_the_rate_rises_and_falls_in_one_cycle_or_stays(made, tmp_path):
    for schedule in ("one-cycle", "constant"):
        how = plan(epochs=10, lr=1e-3, schedule=schedule)
        history = trained(made, tmp_path / schedule, Job("ce", 0.0, 0), how)[1:]
        rates = [epoch.lr for epoch in history]
        assert [epoch.row().values["lr"] for epoch in history] == rates
        if schedule == "constant":
            assert rates == [1e-3] * 10
        else:
            top = rates.index(max(rates))
            assert rates[0] == pytest.approx(1e-3 / 25)
            assert rates[top] == pytest.approx(1e-3, rel=0.02) and top in (2, 3)
            assert rates[top:] == sorted(rates[top:], reverse=True) and rates[-1] < 1e-4


def test_the_modules_of_one_network_train_in_any_order(made, images, tmp_path):
    own = functional_modules(copy.deepcopy(network()))
    early, late = find_spans(own, ("stage4", "conv5"))
    write_targets(launch(), early, images, SETTINGS, tmp_path / "early", Reporters())
    for span, folder in ((early, tmp_path / "early"), (late, made[1])):
        history = trained(
            (span, folder, None), tmp_path / span.name, Job("frp", 1.0, 0), plan(epochs=1)
        )
        assert history[1].train_loss > 0
    assert all(p.requires_grad for part in own.values() for p in part.parameters())


def test_local_training_comes_nearer_to_its_targets(made, tmp_path):
    history = trained(
        made, tmp_path, Job("frp", 0.0, 0), plan("local", epochs=6, schedule="constant")
    )
    assert history[-1].train_loss < 0.7 * history[1].train_loss


def test_anchors_in_local_mode_hold_the_span_where_it_is(made, tmp_path):
    history = trained(made, tmp_path, Job("anchor", 0.0, 0), plan("local", epochs=1, lr=1e-5))
    assert history[1].train_loss < 1e-6


def test_the_best_weights_are_those_of_the_best_epoch(made, images, tmp_path):
    history = trained(made, tmp_path, Job("ce", 0.0, 0), plan(epochs=4))
    best = best_of(history)
    assert best.rank == max(epoch.rank for epoch in history)
    state, _ = load_weights(best_weights(tmp_path))
    fresh = find_span(functional_modules(copy.deepcopy(network())), "conv5")
    fresh.inside.load_state_dict(state)
    whole = nn.Sequential(fresh.before, fresh.inside, fresh.behind)
    found = judge_images(whole, images, "val", SIZE, torch.device("cpu"))
    assert found.accuracy == pytest.approx(best.val_accuracy)
    assert found.loss == pytest.approx(best.val_loss, rel=1e-4)


@pytest.mark.parametrize("mode", ["mixed", "local"])
def test_the_arms_of_a_seed_see_the_same_batches_and_train_the_span_alone(
    made, images, tmp_path, monkeypatch, mode
):
    span, shown = made[0], dict[Job, list[list[int]]]()
    every = jobs(mode, (0.1, 1.0), 2)

    class Watched(RandomBatches):
        def __iter__(self):
            for batch in super().__iter__():
                shown[job].append(batch.position.tolist())
                yield batch

    monkeypatch.setattr("fmce_ops.training.posttrain.RandomBatches", Watched)
    before = copy.deepcopy(network().state_dict())
    for job in every:
        shown[job] = []
        trained(made, tmp_path / job.name, job, plan(mode))
        state, _ = load_weights(best_weights(tmp_path / job.name))
        assert set(state) == set(span.inside.state_dict())
    first, other = (shown[Job("ce", 0.0, seed)] for seed in (0, 1))
    assert [shown[job] for job in every] == [(first, other)[job.seed] for job in every]
    epochs = [tuple(epoch) for epoch in np.split(np.concatenate(first), 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(images.counts["train"]))] * 3
    assert len({*epochs, tuple(np.concatenate(other)[: len(epochs[0])])}) == 4
    assert all(torch.equal(value, before[name]) for name, value in network().state_dict().items())


def test_batch_norm_statistics_stay(made, tmp_path):
    trained(made, tmp_path, Job("frp", 1.0, 0), plan())
    state, _ = load_weights(best_weights(tmp_path))
    before = made[0].inside.state_dict()
    for name in state:
        if "running" in name:
            assert torch.equal(state[name], before[name])


def test_a_loss_that_is_not_finite_stops_the_job(made, tmp_path):
    with pytest.raises(TrainingError, match=r"lower posttrain.lr"):
        trained(made, tmp_path, Job("ce", 0.0, 0), plan(lr=1e30))


def test_every_arm_alpha_and_seed_is_a_job():
    mixed = jobs("mixed", (0.1, 1.0), 3)
    assert len(mixed) == 3 + 6 + 6
    assert len({job.name for job in mixed}) == len(mixed)
    assert len(jobs("local", (0.1, 1.0), 3)) == len(jobs("soft", (0.1, 1.0), 3)) == 9


def test_the_interval_is_that_of_the_paired_t_test():
    ours, theirs = [0.71, 0.74, 0.70, 0.77], [0.70, 0.71, 0.71, 0.73]
    known = ttest_rel(ours, theirs).confidence_interval()
    found = paired(ours, theirs)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert paired([0.5], [0.4]).low is None


def test_the_soft_loss_is_the_divergence_of_the_softened_probabilities():
    logits, target = np.random.default_rng(0).normal(0, 4, (2, 7, 10))
    divergence = rel_entr(softmax(target / 3, 1), softmax(logits / 3, 1)).sum(1).mean()
    tensors = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(target)
    loss = soft_loss(*tensors)
    assert loss.item() == pytest.approx(9 * divergence)
    loss.backward()
    gradient = 3 * (softmax(logits / 3, 1) - softmax(target / 3, 1)) / 7  # worked out by hand
    np.testing.assert_allclose(tensors[0].grad, gradient, atol=1e-12)


def test_soft_training_learns_from_its_targets_by_that_loss(whole, tmp_path):
    _, stores, _ = whole
    job = Job("frp", 0.0, 0)
    one_step = PosttrainPlan("soft", 1, 1000, 1e-3, "constant", 0.0)
    (_, first) = trained(whole, tmp_path / "one", job, one_step)
    with ShardStore.open(stores / "outputs") as store:
        own, wanted = (store.batch(phase, range(store.manifest.images)) for phase in (OWN, TARGET))
    softened = np.exp(log_softmax(wanted / 3, 1)), np.exp(log_softmax(own / 3, 1))
    assert first.train_loss == pytest.approx(9 * rel_entr(*softened).sum(1).mean(), rel=1e-4)
    history = trained(whole, tmp_path / "many", job, plan("soft", epochs=6, schedule="constant"))
    assert history[-1].train_loss < 0.7 * history[1].train_loss


@pytest.mark.parametrize("name", ["conv5", "stage4..conv5"])
def test_soft_targets_need_the_head_in_the_span(name):
    span = find_span(functional_modules(network()), name)
    with pytest.raises(ModelError) as error:
        check_mode("soft", span)
    first = name.partition("..")[0]
    assert str(error.value) == (
        f"posttrain.mode is soft, but the span '{name}' of posttrain.modules does not end with "
        f"the head, which makes the logits: write '{first}..head', or choose mixed or local."
    )
    check_mode("local", span)
    check_mode("soft", find_span(functional_modules(network()), f"{first}..head"))


def test_held_out_logits_are_averaged_with_the_networks_own_before_the_correction(
    whole, images, tmp_path
):
    span, folder, _ = whole
    with ShardStore.open(folder / "outputs") as store:
        own, labels = store.batch(OWN, range(store.manifest.images)), store.label
    held_out = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)) * 5
    held_out[::2] += 20 * torch.eye(10)[labels[::2]]  # some of every class are right
    pulled = TargetSettings(1.0, 0.25, SIZE, 60, 32)
    write_targets(launch(), span, images, pulled, tmp_path, Reporters(), held_out)
    with ShardStore.open(tmp_path / "outputs") as store:
        found = store.batch(TARGET, range(len(own)))
        np.testing.assert_array_equal(store.batch(OWN, range(len(own))), own)
    source = (own + held_out.numpy()) / 2
    right = source.argmax(1) == labels
    means = np.stack([source[right & (labels == label)].mean(0) for label in range(10)])
    nearest = nearest_logits(torch.from_numpy(source), torch.from_numpy(labels), 1.0).numpy()
    np.testing.assert_allclose(found, 0.75 * nearest + 0.25 * means[labels], atol=1e-4)


def test_held_out_logits_like_the_networks_own_leave_every_target(made, images, tmp_path):
    span, folder, _ = made
    with torch.inference_mode(), ShardStore.open(folder / "outputs") as store:
        own = [span.behind(torch.from_numpy(maps)) for maps in store.scan(OWN)]
    write_targets(launch(), span, images, SETTINGS, tmp_path, Reporters(), torch.cat(own))
    with ShardStore.open(folder / "outputs") as a, ShardStore.open(tmp_path / "outputs") as b:
        rows = range(a.manifest.images)
        np.testing.assert_allclose(a.batch(TARGET, rows), b.batch(TARGET, rows), atol=1e-3)


def fold_params(folds, model=SMALL["model"], **train):
    return Params.model_validate(
        {
            "data": SMALL["data"],
            "model": model,
            "train": {"batch_size": 16, "lr": 0.002, **train},
            "markers": {"phases": 2},
            "posttrain": {"folds": folds},
        }
    )


def test_every_image_is_in_one_fold_of_its_seed():
    fold = draw_folds(107, 5, 3)
    assert sorted(torch.bincount(fold).tolist()) == [21, 21, 21, 22, 22]
    assert torch.equal(fold, draw_folds(107, 5, 3))
    assert not torch.equal(fold, draw_folds(107, 5, 4))


def test_the_batches_of_chosen_rows_hold_these_and_no_others(images):
    pixels, _ = images.load("train")
    inputs = to_input(pixels, size=SIZE, mean=images.mean, std=images.std).flatten(1)
    rows = (draw_folds(len(pixels), 3, 0) != 1).nonzero()[:, 0]
    batches = training_batches(launch(), images, fold_params(3), rows)
    assert batches.steps == len(rows) // 16
    shown = [batches.batch(epoch, step)[0] for epoch in range(8) for step in range(batches.steps)]
    same = torch.cdist(torch.cat(shown).flatten(1), inputs) < 0.5  # apart by more, all of them
    seen = same.any(0)
    assert torch.equal(seen.nonzero()[:, 0], rows)


def perceptron(num_classes):
    """Wide enough to learn any labels of a hundred images by heart, and quick."""
    hidden = nn.Sequential(nn.Conv2d(3, 256, SIZE), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(256, num_classes))
    return nn.Sequential(OrderedDict(hidden=hidden, head=head))


@pytest.fixture
def random_labels(tmp_path):
    """Digits of which nothing can be learnt but what was seen: their labels are drawn."""
    with digits(tmp_path, 12, SIZE) as opened:
        path = opened.path
    with h5py.File(path, "r+") as file:
        labels = file["train/labels"]
        labels[:] = np.random.default_rng(0).permutation(labels[:])
    with Images.open(path) as opened:
        yield opened


def test_the_network_of_a_fold_knows_what_it_saw_and_nothing_of_its_fold(random_labels, tmp_path):
    backbone = "tests.test_posttrain:perceptron"
    model = {"backbone": backbone, "stem": "standard", "cut": "hidden"}
    params = fold_params(2, model, epochs=30)
    stage = Stage("posttrain", tmp_path, None, Reporters(), {})
    logits = fold_logits(launch(), stage, params, random_labels)
    pixels, labels = random_labels.load("train")
    assert (logits.argmax(1) == labels).double().mean() < 0.3
    inputs = to_input(pixels, size=SIZE, mean=random_labels.mean, std=random_labels.std)
    fold = draw_folds(len(labels), 2, params.train.seed)
    for number in (0, 1):
        classifier = build_classifier(params, 10).eval()
        load_into(classifier, point_file(tmp_path / f"fold-{number}", 30))
        with torch.inference_mode():
            found = classifier(inputs)
        assert (found.argmax(1) == labels)[fold != number].double().mean() > 0.9
        torch.testing.assert_close(logits[fold == number], found[fold == number])


@dataclass(frozen=True)
class Cut(Stage):
    """A stage whose second fold is killed behind its second epoch."""

    @contextmanager
    def beneath(self, name, tags):
        yield self if name == "fold 1" else Reporters()

    def begin(self, task, total):
        return

    def row(self, row):
        if row.step == 2:
            raise KeyboardInterrupt


def test_folds_that_were_cut_go_on_to_the_same_bytes(images, tmp_path):
    params, found = fold_params(2, epochs=3), []
    for name in ("uncut", "cut"):
        (tmp_path / name).mkdir()
    with pytest.raises(KeyboardInterrupt):
        fold_logits(
            launch(), Cut("posttrain", tmp_path / "cut", None, Reporters(), {}), params, images
        )
    assert not point_file(tmp_path / "cut" / "fold-1", 3).exists()
    for name in ("uncut", "cut"):
        stage = Stage("posttrain", tmp_path / name, None, Reporters(), {})
        found.append(fold_logits(launch(), stage, params, images))
        kept = sorted(file.name for file in Path(tmp_path / name).glob("*/point-*"))
        assert kept == [point_file(tmp_path, 3).name] * 2  # of each fold the last
    assert torch.equal(*found)
