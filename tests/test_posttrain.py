"""Targets of spans, and their training beside the controls."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from fmce_ops.data import to_input
from fmce_ops.errors import ModelError, TrainingError
from fmce_ops.models import build, functional_modules, load_weights
from fmce_ops.reverse import nearest_logits
from fmce_ops.shards import ShardStore
from fmce_ops.training.comparison import paired
from fmce_ops.training.devices import launch
from fmce_ops.training.posttrain import (
    Job,
    PosttrainPlan,
    Stores,
    best_of,
    best_weights,
    jobs,
    judge_images,
    train_span,
)
from fmce_ops.training.reporter import Reporters
from fmce_ops.training.targets import (
    OWN,
    TARGET,
    TargetSettings,
    find_span,
    most_changed,
    write_targets,
)
from scipy.stats import ttest_rel
from torch import nn

from tests.project import digits

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
    ("name", "words"), [("stage9", "does not have"), ("conv5..stage2", "ends before it begins")]
)
def test_a_span_that_is_none_is_named(name, words):
    with pytest.raises(ModelError, match=words):
        find_span(functional_modules(network()), name)


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
    assert facts["residual"]["worst"] <= 1e-3
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


def plan(mode="mixed", epochs=3, lr=3e-3):
    return PosttrainPlan(mode, epochs, 32, lr, 0.05)


def trained(made, folder, job, plan):
    span, stores, _ = made
    with Stores.open(stores) as opened:
        return train_span(span, opened, plan, job, folder, torch.device("cpu"))


@pytest.mark.parametrize("mode", ["mixed", "local"])
@pytest.mark.parametrize("arm", ["ce", "anchor", "frp"])
def test_a_training_that_was_cut_goes_on_to_the_same_bytes(made, tmp_path, mode, arm):
    job = Job(arm, 1.0, 3)
    whole = trained(made, tmp_path / "whole", job, plan(mode))
    trained(made, tmp_path / "cut", job, plan(mode, epochs=1))
    cut = trained(made, tmp_path / "cut", job, plan(mode))
    figures = [(e.epoch, e.train_loss, e.val_loss, e.val_accuracy) for e in whole[1:]]
    assert figures == [(e.epoch, e.train_loss, e.val_loss, e.val_accuracy) for e in cut[1:]]
    files = [best_weights(tmp_path / name).read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_local_training_comes_nearer_to_its_targets(made, tmp_path):
    history = trained(made, tmp_path, Job("frp", 0.0, 0), plan("local", epochs=6))
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
    assert len(jobs("local", (0.1, 1.0), 3)) == 9


def test_the_interval_is_that_of_the_paired_t_test():
    ours, theirs = [0.71, 0.74, 0.70, 0.77], [0.70, 0.71, 0.71, 0.73]
    known = ttest_rel(ours, theirs).confidence_interval()
    found = paired(ours, theirs)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert paired([0.5], [0.4]).low is None
