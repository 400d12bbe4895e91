"""The loops: exact after a kill, equal to plain loops, the same on several processes.

Run as a script it is one of the processes that the tests start: ``test_training.py TASK FOLDER``.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fmce_ops.data import Augment, Images, TrainBatches, prepare, to_input
from fmce_ops.errors import ShardError, TrainingError
from fmce_ops.files import file_digest
from fmce_ops.models import Classifier, FmceNet, build, load_weights, save_weights
from fmce_ops.shards import Manifest, RandomBatches, ShardStore, ShardWriter, split_by_image
from fmce_ops.training.classifier import (
    Plan,
    Validation,
    evaluate,
    point_file,
    train_classifier,
)
from fmce_ops.training.devices import launch
from fmce_ops.training.features import Extraction, _appending, extract
from fmce_ops.training.fmce import Epoch, FmcePlan, best_epoch, judge, train_fmce
from fmce_ops.training.losses import Point, read_losses, write_losses
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import nn

from tests.project import free_port

pytestmark = pytest.mark.timeout(240)
MEAN, STD = (0.3,), (0.37,)


class KilledError(Exception):
    """Stands for the death of the process."""


class Listener:
    """Keeps what a loop tells, and kills it when it is told of step ``until``."""

    def __init__(self, until=None):
        self.until, self.tasks, self.rows = until, [], []

    def begin(self, task, total):
        self.tasks.append((task, total))

    def row(self, row):
        self.rows.append(row)
        if row.step == self.until:
            raise KilledError

    @property
    def steps(self):
        return [row.step for row in self.rows]


class Printer(Listener):
    """Says aloud what it is told."""

    def row(self, row):
        super().row(row)
        print("step", row.step, flush=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose by more, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fabric():
    yield launch()
    torch.use_deterministic_algorithms(False)


def half_precision():
    """Half precision with a scale for the gradients, which is first too large; also without a GPU.

    Each call is as a process of its own.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return Fabric(accelerator="cpu", devices=1, plugins=plugin)


def tiny(dropout=0.0, norm=True):
    """A classifier of 8 px images with 1,226 weights, the same at every call."""
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 16, 3, stride=2, padding=1)]
    layers += [nn.BatchNorm2d(16)] if norm else []
    layers += [nn.ReLU(), nn.Dropout(dropout)]
    return Classifier(nn.Sequential(*layers), 16, 10)


def shuffle_net():
    torch.manual_seed(5)
    return build("shufflenet_v2_x0_5", 10, stem="small", in_size=16)


@cache
def bunch_of_digits():
    return load_digits()


def digits(start, stop):
    """Real images uint8 (n, 1, 8, 8) and labels."""
    bunch = bunch_of_digits()
    images = torch.from_numpy(bunch.images[start:stop] * 15).to(torch.uint8)[:, None]
    return images, torch.from_numpy(bunch.target[start:stop]).long()


def batches(fabric, *, size=8, images=150, batch_size=32):
    pixels, labels = (part.to(fabric.device) for part in digits(0, images))
    return TrainBatches(
        pixels,
        labels,
        batch_size=batch_size,
        size=size,
        mean=MEAN,
        std=STD,
        augment=Augment(pad=1),
        seed=3,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )


def validation(fabric, size=8):
    pixels, labels = (part.to(fabric.device) for part in digits(400, 460))
    return Validation(pixels, labels, size, MEAN, STD)


def plan(**changes):
    settings = {
        "epochs": 3,
        "points_per_epoch": 1,
        "optimizer": "adam",
        "lr": 0.01,
        "weight_decay": 0.001,
        "schedule": "cosine",
        "seed": 3,
    }
    return Plan(**(settings | changes))


def train(fabric, folder, network, settings, *, size=8, until=None):
    """Train until the end or the kill; the loss curve is None after a kill."""
    listener, history = Listener(until), None
    with suppress(KilledError):
        data = batches(fabric, size=size), validation(fabric, size)
        history = train_classifier(fabric, network, *data, settings, folder, listener)
    return history, listener


def digests(folder, points):
    return [file_digest(point_file(folder, point)) for point in range(1, points + 1)]


CASES = {
    "dropout, two points per epoch": (
        lambda: tiny(dropout=0.5),
        {"points_per_epoch": 2, "optimizer": "sgd"},
    ),
    "constant learning rate": (tiny, {"schedule": "constant", "optimizer": "adamw"}),
    "without batch norm": (lambda: tiny(dropout=0.2, norm=False), {"points_per_epoch": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_point_it_ends_as_if_it_had_never_stopped(tmp_path, fabric, case):
    network, changes = CASES[case]
    settings = plan(**changes)
    expected, told = train(fabric, tmp_path / "straight", network(), settings)
    assert told.tasks == [("train", settings.points)]
    assert told.steps == list(range(1, settings.points + 1))
    for point in told.steps:
        folder = tmp_path / f"killed-{point}"
        _, before = train(fabric, folder, network(), settings, until=point)
        assert before.steps == told.steps[:point]
        found, after = train(fabric, folder, network(), settings)
        assert found == expected
        assert digests(folder, settings.points) == digests(tmp_path / "straight", settings.points)
        assert after.steps == told.steps
        assert after.rows[:point] == before.rows  # the times and speeds of then, too


def test_half_precision_goes_on_with_the_scale_that_it_had(tmp_path):
    settings = plan(points_per_epoch=2)
    expected, _ = train(half_precision(), tmp_path / "straight", tiny(), settings)
    train(half_precision(), tmp_path / "killed", tiny(), settings, until=3)
    found, _ = train(half_precision(), tmp_path / "killed", tiny(), settings)
    assert found == expected
    assert digests(tmp_path / "killed", 6) == digests(tmp_path / "straight", 6)


def test_a_network_of_torchvision_learns_and_survives_a_kill(tmp_path, fabric):
    settings = plan(epochs=5)
    expected, _ = train(fabric, tmp_path / "straight", shuffle_net(), settings, size=16)
    assert expected[0].train_loss > expected[1].train_loss > expected[2].train_loss
    assert expected[-1].train_accuracy > 3 / 10  # chance is 1 / 10
    train(fabric, tmp_path / "killed", shuffle_net(), settings, size=16, until=2)
    found, told = train(fabric, tmp_path / "killed", shuffle_net(), settings, size=16)
    assert found == expected
    assert digests(tmp_path / "killed", 5) == digests(tmp_path / "straight", 5)
    assert told.steps == [1, 2, 3, 4, 5]


HOME = {"PYTHONPATH": str(Path(__file__).parents[1])}


def start(*arguments, command=(sys.executable,)):
    """Start this file as a script, on one thread, so that all processes compute alike."""
    return subprocess.Popen(
        [*command, __file__, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **HOME},
    )


def ends_well(process):
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return output


def long_training(fabric, folder, listener):
    settings = plan(epochs=12, points_per_epoch=2, optimizer="sgd")
    data = batches(fabric), validation(fabric)
    return train_classifier(fabric, tiny(dropout=0.3), *data, settings, folder, listener)


def task_train_twice(folder):
    """One training that nobody disturbs and one that says when to strike."""
    fabric = launch()
    long_training(fabric, folder / "straight", Listener())
    long_training(fabric, folder / "killed", Printer())


def task_go_on(folder):
    long_training(launch(), folder / "killed", Printer())


def test_a_process_that_was_shot_goes_on_and_ends_with_the_same_bytes(tmp_path):
    victim = start("train_twice", tmp_path)
    for line in victim.stdout:
        if line == "step 9\n":
            victim.send_signal(signal.SIGKILL)  # somewhere in the tenth point or soon behind it
            break
    victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "killed").glob("point-*"))
    assert 9 <= len(left) < 24
    steps = ends_well(start("go_on", tmp_path)).splitlines()
    assert steps == [f"step {k}" for k in range(1, 25)]
    assert digests(tmp_path / "killed", 24) == digests(tmp_path / "straight", 24)
    states = [torch.load(tmp_path / name / "state.pt") for name in ("killed", "straight")]
    assert states[0]["history"] == states[1]["history"]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_training_is_the_plain_loop(tmp_path, fabric, optimizer):
    settings = plan(optimizer=optimizer, epochs=4)
    history, _ = train(fabric, tmp_path, trained := tiny(), settings)
    network = tiny().to(fabric.device)
    options = {"lr": 0.01, "weight_decay": 0.001}
    stepper = {
        "adam": lambda p: torch.optim.Adam(p, **options),
        "adamw": lambda p: torch.optim.AdamW(p, **options),
        "sgd": lambda p: torch.optim.SGD(p, momentum=0.9, **options),
    }[optimizer](network.parameters())
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, T_max=4)
    for epoch in range(4):
        network.train()
        losses, right = [], 0
        assert history[epoch].lr == pytest.approx(annealing.get_last_lr()[0], rel=1e-9)
        for step in range(4):  # 150 images make four batches of 32
            images, labels = batches(fabric).batch(epoch, step)
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            losses.append(loss.item())
            right += (logits.argmax(1) == labels).sum().item()
        annealing.step()
        network.eval()
        with torch.no_grad():
            images, labels = next(validation(fabric).batches(60))
            logits = network(images)
        point = history[epoch]
        assert (point.point, point.epoch) == (epoch + 1, epoch + 1)
        # Sums in another order (the memory format differs) and 16 steps: not the last digits.
        assert point.train_loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert point.train_accuracy == pytest.approx(right / 128, abs=1 / 128)
        assert point.val_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
        hits = (logits.argmax(1) == labels).double().mean().item()
        assert point.val_accuracy == pytest.approx(hits, abs=1 / 60)
    state = load_weights(point_file(tmp_path, 4))[0]
    assert all(torch.equal(value.cpu(), state[key]) for key, value in trained.state_dict().items())


def test_more_points_change_what_is_recorded_and_not_what_is_learnt(tmp_path, fabric):
    whole, _ = train(fabric, tmp_path / "1", tiny(dropout=0.3), plan())
    halves, told = train(fabric, tmp_path / "2", tiny(dropout=0.3), plan(points_per_epoch=2))
    assert [point.epoch for point in halves] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert [row.values["epoch"] for row in told.rows] == [0.5, 1, 1.5, 2, 2.5, 3]
    for epoch, point in enumerate(whole):
        first, second = halves[2 * epoch : 2 * epoch + 2]
        # Four steps an epoch: each half is the mean of two.
        assert point.train_loss == pytest.approx((first.train_loss + second.train_loss) / 2)
        assert (point.val_loss, point.lr) == (second.val_loss, second.lr)
    assert digests(tmp_path / "1", 3) == digests(tmp_path / "2", 6)[1::2]


def test_the_reporter_is_told_the_curve_the_speed_and_the_cqi(tmp_path, fabric):
    history, told = train(fabric, tmp_path, tiny(), plan())
    losses = [point.train_loss for point in history]
    # S_2 - S_1 = .15 (L_2 - L_1); S_3 - S_2 = .85 (L_2 - L_1) + .15 (L_3 - L_2)
    steps = [0.15 * (losses[1] - losses[0])]
    steps.append(0.85 * (losses[1] - losses[0]) + 0.15 * (losses[2] - losses[1]))
    assert "cqi" not in told.rows[0].values  # nothing that is not finite
    assert told.rows[1].values["cqi"] == pytest.approx(abs(steps[0]))
    assert told.rows[2].values["cqi"] == pytest.approx(np.abs(steps).mean())
    for row, point in zip(told.rows, history, strict=True):
        assert row.values["train/loss"] == point.train_loss
        assert row.values["val/accuracy"] == point.val_accuracy
        assert row.values["images_per_second"] > 0


def test_the_learning_rate_is_that_of_cosine_annealing():
    for epochs in (1, 2, 7, 150):
        weight = nn.Parameter(torch.zeros(1))
        stepper = torch.optim.SGD([weight], lr=0.3)
        annealing = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, T_max=epochs)
        for epoch in range(epochs):
            rate = annealing.get_last_lr()[0]
            assert plan(epochs=epochs, lr=0.3).learning_rate(epoch) == pytest.approx(rate)
            assert FmcePlan(epochs, 1, 0.3, 0).learning_rate(epoch) == pytest.approx(rate)
            stepper.step()
            annealing.step()


def test_a_longer_cosine_is_cut():
    cut = [plan(epochs=3, horizon=4, lr=0.3).learning_rate(epoch) for epoch in range(3)]
    assert cut == [plan(epochs=4, lr=0.3).learning_rate(epoch) for epoch in range(3)]


def test_or_constant():
    rates = {plan(schedule="constant", lr=0.3).learning_rate(epoch) for epoch in range(3)}
    assert rates == {0.3}


class Exploding(nn.Module):
    """Gives infinite logits from its ``bound``-th training step on, also after a resumption."""

    def __init__(self, bound):
        super().__init__()
        self.network, self.bound = tiny(), bound
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.steps += 1
        return self.network(x) * (math.inf if self.steps >= self.bound else 1)


@pytest.mark.parametrize(
    ("step", "points_per_epoch", "epoch", "kept"),
    [(10, 1, 3, 2), (7, 2, 2, 3), (8, 1, 2, 1)],
)
def test_a_loss_that_is_not_finite_names_the_epoch_and_costs_nothing(
    tmp_path, fabric, step, points_per_epoch, epoch, kept
):
    settings = plan(points_per_epoch=points_per_epoch)
    kept_words = f"the first {kept} points are kept"
    with pytest.raises(TrainingError, match=f"loss at epoch {epoch} is not finite .*{kept_words}"):
        train(fabric, tmp_path, Exploding(step), settings)
    assert len(list(tmp_path.glob("point-*.safetensors"))) == kept
    # What was kept is good: mended, the training goes on behind it.
    expected, _ = train(fabric, tmp_path / "straight", Exploding(10**9), settings)
    found, told = train(fabric, tmp_path, Exploding(10**9), settings)
    assert found == expected
    assert told.steps[:kept] == list(range(1, kept + 1))


def test_a_loss_that_is_never_finite_leaves_nothing(tmp_path, fabric):
    with pytest.raises(TrainingError, match=r"epoch 1 is not finite .*nothing was recorded.*lr"):
        train(fabric, tmp_path, Exploding(1), plan())
    assert list(tmp_path.iterdir()) == []


def test_a_batch_of_one_is_refused_where_nothing_can_be_normalised(tmp_path, fabric):
    network = tiny()
    network.backbone[0].stride = (8, 8)  # maps of 1 x 1
    data = batches(fabric, batch_size=1), validation(fabric)
    with pytest.raises(TrainingError, match=r"with 1 images at once .*make train\.batch_size"):
        train_classifier(fabric, network, *data, plan(), tmp_path, Listener())


def test_more_points_than_steps_are_refused(tmp_path, fabric):
    with pytest.raises(TrainingError, match="points_per_epoch is 5 but an epoch has 4 steps"):
        train(fabric, tmp_path, tiny(), plan(points_per_epoch=5))
    history, _ = train(fabric, tmp_path, tiny(), plan(points_per_epoch=4, epochs=1))
    assert len(history) == 4


def test_evaluation_means_over_images_not_batches(fabric):
    network = fabric.setup(tiny())
    data = validation(fabric)
    losses, hits = [], []
    with torch.no_grad():
        for image, label in zip(*digits(400, 460), strict=True):
            inputs = to_input(image[None].to(fabric.device), size=8, mean=MEAN, std=STD)
            logits = network.eval()(inputs).cpu().double()[0]
            losses.append((torch.logsumexp(logits, 0) - logits[label]).item())
            hits.append(logits.argmax().item() == label.item())
    loss, accuracy = evaluate(fabric, network, data)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert accuracy == np.mean(hits)


numbers = st.floats(allow_nan=False, allow_infinity=False)
rows = st.lists(st.builds(Point, st.integers(1, 10**6), *[numbers] * 6), min_size=1, max_size=5)


@given(history=rows)
def test_a_loss_curve_reads_back_to_the_last_bit(tmp_path_factory, history):
    path = tmp_path_factory.getbasetemp() / "losses.csv"
    write_losses(path, history)
    assert read_losses(path) == history


@pytest.mark.parametrize(
    "text", [None, "point,epoch\n1,1\n", "a,b\n1,2\n", "point\nx\n", "x" * 200_000]
)
def test_what_is_no_loss_curve_is_refused(tmp_path, text):
    path = tmp_path / "losses.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TrainingError, match=r"is not a loss curve .*'dvc repro'"):
        read_losses(path)


# FMCE-Net.

PHASES, IMAGES, SHAPE = 4, 48, (32, 2, 2)


def write_store(folder, signal_strength, seed=0):
    """Noise, with a mean of ``signal_strength`` in one channel that tells the phase."""
    noise = np.random.default_rng(seed).standard_normal((PHASES, IMAGES, *SHAPE))
    for phase in range(PHASES):
        noise[phase, :, phase] += signal_strength
    maps, shards = noise.astype(np.float16), []
    for phase in range(1, PHASES + 1):
        for part, start in enumerate((0, 30)):
            stop = (30, IMAGES)[part]
            place = {"phase": phase, "part": part, "start": start, "count": stop - start}
            index = np.arange(start, stop)
            with ShardWriter(folder, **place, shape=SHAPE) as writer:
                writer.append(maps[phase - 1, start:stop], index, index % 10)
            shards.append(writer.close())
    Manifest("float16", None, SHAPE, PHASES, IMAGES, tuple(shards), 10).save(folder)
    return ShardStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with write_store(tmp_path_factory.mktemp("separable"), 3.0) as opened:
        yield opened


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    with write_store(tmp_path_factory.mktemp("noise"), 0.0) as opened:
        yield opened


def split():
    return split_by_image(IMAGES, PHASES, 0.25, 0.25, seed=1)


def fmce_net():
    torch.manual_seed(4)
    return FmceNet(SHAPE, PHASES)


def fit(fabric, store, folder, settings, listener=None):
    network, rows = fmce_net(), split()
    listener, history = listener or Listener(), None
    with suppress(KilledError):
        parts = rows.train, rows.validation
        history = train_fmce(fabric, network, store, *parts, settings, folder, listener)
    return network, history, listener


def same_weights(state, other):
    return state.keys() == other.keys() and all(
        torch.equal(state[key].cpu(), other[key].cpu()) for key in state
    )


LEARNING = FmcePlan(epochs=6, batch_size=16, lr=0.01, seed=2)


def test_fmce_net_learns_phases_that_can_be_told_apart(tmp_path, fabric, store):
    network, history, told = fit(fabric, store, tmp_path, LEARNING)
    matrix, loss = judge(fabric, network, store, split().test, 16)
    assert matrix.sum() == PHASES * 12
    assert np.trace(matrix) / matrix.sum() > 0.9
    assert loss < math.log(PHASES) / 2
    assert history[-1].train_loss < history[0].train_loss / 2
    assert told.tasks == [("fmce", 6)]
    assert told.steps == [1, 2, 3, 4, 5, 6]


def test_killed_after_any_epoch_fmce_net_ends_the_same(tmp_path, fabric, noise):
    expected, history, straight = fit(fabric, noise, tmp_path / "straight", LEARNING)
    for epoch in range(1, 7):
        folder = tmp_path / str(epoch)
        _, _, before = fit(fabric, noise, folder, LEARNING, Listener(epoch))
        found, again, after = fit(fabric, noise, folder, LEARNING)
        assert again == history
        assert same_weights(found.state_dict(), expected.state_dict())
        assert after.steps == straight.steps
        assert after.rows[:epoch] == before.rows


def test_fmce_net_in_half_precision_goes_on_with_the_scale_that_it_had(tmp_path, noise):
    expected, history, _ = fit(half_precision(), noise, tmp_path / "straight", LEARNING)
    fit(half_precision(), noise, tmp_path / "killed", LEARNING, Listener(2))
    found, again, _ = fit(half_precision(), noise, tmp_path / "killed", LEARNING)
    assert again == history
    assert same_weights(found.state_dict(), expected.state_dict())


def test_the_epoch_that_is_best_on_validation_is_left_in_the_network(tmp_path, fabric, noise):
    """On noise the last epoch is not the best."""
    rows = split()
    network, states = fmce_net(), []

    class Watcher(Listener):
        def row(self, row):
            super().row(row)
            states.append({key: value.clone() for key, value in network.state_dict().items()})

    watcher = Watcher()
    history = train_fmce(
        fabric, network, noise, rows.train, rows.validation, LEARNING, tmp_path, watcher
    )
    accuracies = [row.values["val/accuracy"] for row in watcher.rows]
    losses = [row.values["val/loss"] for row in watcher.rows]
    best = max(range(6), key=lambda i: (accuracies[i], -losses[i]))
    assert best != 5
    assert best_epoch(history).epoch == best + 1
    assert same_weights(network.state_dict(), states[best])
    assert not same_weights(network.state_dict(), states[-1])
    matrix, loss = judge(fabric, network, noise, rows.validation, 16)
    assert np.trace(matrix) / matrix.sum() == accuracies[best]
    assert loss == losses[best]


def test_of_equally_accurate_epochs_the_one_with_less_loss_then_the_first_is_best():
    def epoch(number, accuracy, loss):
        return Epoch(number, 0.0, 0.0, loss, accuracy, 0.0)

    history = [epoch(1, 0.5, 0.1), epoch(2, 0.9, 0.8), epoch(3, 0.9, 0.7), epoch(4, 0.9, 0.7)]
    assert best_epoch(history).epoch == 3


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_judging_is_the_plain_loop(fabric, noise, batch_size):
    network = fmce_net().to(fabric.device)
    rows = np.random.default_rng(0).permutation(split().train)[:50]
    expected, losses = np.zeros((PHASES, PHASES), int), []
    for phase, position in rows:
        maps = torch.from_numpy(noise.batch(phase, position)).to(fabric.device)
        with torch.no_grad():
            logits = network(maps)[0].cpu().double()
        expected[phase - 1, logits.argmax()] += 1
        losses.append((torch.logsumexp(logits, 0) - logits[phase - 1]).item())
    matrix, loss = judge(fabric, network, noise, rows, batch_size)
    np.testing.assert_array_equal(matrix, expected)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_loss_of_fmce_net_that_is_not_finite_names_the_epoch(tmp_path, fabric, store):
    network, rows = fmce_net(), split()
    network.head.bias.data[0] = math.inf
    parts = rows.train, rows.validation
    with pytest.raises(TrainingError, match=r"FMCE-Net at epoch 1 is not finite \(0 epochs are"):
        train_fmce(fabric, network, store, *parts, LEARNING, tmp_path, Listener())
    assert list(tmp_path.iterdir()) == []


# Feature maps.


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.h5"
    settings = {"image_size": 8, "per_class": 7, "validation": 0.1, "test": 0.2, "seed": 0}
    prepare("digits", path, root=path.parent, **settings)
    with Images.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    for phase in (1, 2, 3):
        torch.manual_seed(phase)
        network = build("shufflenet_v2_x0_5", 10, stem="small", in_size=16)
        save_weights(folder / f"phase-{phase}.safetensors", network.state_dict(), {})
    return sorted(folder.iterdir())


EXTRACTION = Extraction((1024, 2, 2), "float16", None, images_per_shard=25, batch_size=8, size=16)


def pull(fabric, checkpoints, images, folder, until=None):
    listener, shards = Listener(until), None
    with suppress(KilledError):
        data = fabric, shuffle_net(), checkpoints, images, EXTRACTION
        shards = extract(*data, folder, listener)
    return shards, listener


def files_of(folder):
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


def test_shards_hold_the_maps_of_a_plain_loop(tmp_path, fabric, checkpoints, images):
    shards, told = pull(fabric, checkpoints, images, tmp_path)
    n = images.counts["train"]
    parts = -(-n // 25)
    assert n > 50  # so that a phase has several parts, the last one smaller
    assert [(shard.phase, shard.part) for shard in shards] == [
        (phase, part) for phase in (1, 2, 3) for part in range(parts)
    ]
    assert told.tasks == [("features", 3 * parts)]
    assert told.steps == list(range(1, 3 * parts + 1))
    Manifest("float16", None, (1024, 2, 2), 3, n, tuple(shards), 10).save(tmp_path)
    pixels, labels = images.load("train")
    network = shuffle_net().to(fabric.device, memory_format=torch.channels_last).eval()
    with ShardStore.open(tmp_path) as store, torch.no_grad():
        assert store.label.tolist() == labels.tolist()
        assert store.index.tolist() == list(range(n))
        for phase, checkpoint in enumerate(checkpoints, start=1):
            network.load_state_dict(load_weights(checkpoint)[0])
            for start in range(0, n, 25):
                for first in range(start, min(start + 25, n), 8):
                    chosen = pixels[first : min(first + 8, start + 25)].to(fabric.device)
                    inputs = to_input(chosen, size=16, mean=images.mean, std=images.std)
                    maps = network.backbone(inputs).cpu().to(torch.float16).numpy()
                    stored = store.batch(phase, np.arange(first, first + len(chosen)))
                    np.testing.assert_array_equal(stored, maps)


def test_a_resumed_extraction_keeps_whole_shards_and_ends_with_the_same_bytes(
    tmp_path, fabric, checkpoints, images
):
    straight, told = pull(fabric, checkpoints, images, tmp_path / "straight")
    folder = tmp_path / "killed"
    _, before = pull(fabric, checkpoints, images, folder, until=5)
    assert before.steps == [1, 2, 3, 4, 5]
    kept = {path.name: path.stat() for path in folder.iterdir()}
    assert len(kept) == 5
    shards, after = pull(fabric, checkpoints, images, folder)
    assert shards == straight
    assert files_of(folder) == files_of(tmp_path / "straight")
    assert after.steps == told.steps
    for name, status in kept.items():
        assert (folder / name).stat().st_mtime_ns == status.st_mtime_ns


def test_a_damaged_shard_of_the_killed_run_is_not_taken_for_whole(
    tmp_path, fabric, checkpoints, images
):
    pull(fabric, checkpoints, images, tmp_path, until=1)
    (damaged,) = tmp_path.iterdir()
    os.truncate(damaged, 10_000)
    with pytest.raises(ShardError, match=rf"{damaged.name} cannot be read .*make the store again"):
        pull(fabric, checkpoints, images, tmp_path)


# Several processes.


def task_all_loops(folder):
    """Every loop once; each process writes down what it was left with."""
    fabric = launch()
    rank = fabric.global_rank
    settings = plan(optimizer="sgd", epochs=2)
    data = batches(fabric, batch_size=30), validation(fabric)
    network, listener = tiny(norm=False), Listener()
    history = train_classifier(fabric, network, *data, settings, folder / "train", listener)
    with Images.open(folder / "images.h5") as images:
        checkpoints = sorted((folder / "phases").iterdir())
        shards, _ = pull(fabric, checkpoints, images, folder / "features")
    with ShardStore.open(folder / "store") as store:
        fmce, epochs, _ = fit(fabric, store, folder / "fmce", LEARNING)
        matrix, loss = judge(fabric, fmce, store, split().test[:-1], 16)  # an odd number of rows
    refusals = []
    own = folder / ("elsewhere" if rank else "train")
    try:
        train_classifier(fabric, tiny(norm=False), *data, settings, own, Listener())
    except TrainingError as error:
        refusals.append(str(error))
    found = {
        "world": fabric.world_size,
        "refusals": refusals,
        "history": [asdict(point) for point in history],
        "steps": listener.steps,
        "weights": weights_digest(network),
        "shards": [shard.sha256 for shard in shards],
        "fmce": [asdict(epoch) for epoch in epochs],
        "fmce_weights": weights_digest(fmce),
        "matrix": matrix.tolist(),
        "loss": loss,
    }
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


def weights_digest(network):
    joined = hashlib.sha256()
    for value in network.state_dict().values():
        joined.update(value.cpu().contiguous().numpy().tobytes())
    return joined.hexdigest()


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, images, checkpoints):
    """What all loops come to in one process and in each of two."""
    found = []
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        (folder / "images.h5").symlink_to(images.path)
        (folder / "phases").symlink_to(checkpoints[0].parent)
        write_store(folder / "store", 3.0).close()
        fabric_run = Path(sys.executable).with_name("fabric")
        options = f"--accelerator cpu --strategy ddp --devices {processes}".split()
        port = ["--main-port", str(free_port())]
        ends_well(start("all_loops", folder, command=(fabric_run, "run", *options, *port)))
        found.append([json.loads(p.read_text()) for p in sorted(folder.glob("found-*.json"))])
    (one,), two = found
    assert (one["world"], [each["world"] for each in two]) == (1, [2, 2])
    return one, two


def test_two_processes_train_as_one(one_and_two):
    one, two = one_and_two
    assert two[0]["history"] == two[1]["history"]
    assert two[0]["weights"] == two[1]["weights"]
    assert two[0]["steps"] == two[1]["steps"] == [1, 2]
    # The gradient is the mean of two halves instead of one whole: float32 rounds sums of other
    # orders by some 1e-7 each, and ten steps at this learning rate do not blow that up.
    for single, double in zip(one["history"], two[0]["history"], strict=True):
        assert double["train_loss"] == pytest.approx(single["train_loss"], rel=1e-5)
        assert double["val_loss"] == pytest.approx(single["val_loss"], rel=1e-5)
        assert (double["epoch"], double["lr"]) == (single["epoch"], single["lr"])


def test_processes_that_do_not_find_the_same_state_are_refused(one_and_two):
    one, two = one_and_two
    assert one["refusals"] == []
    for found in two:
        (words,) = found["refusals"]
        assert "holds 0 steps for one process and 2 for another" in words


def test_two_processes_write_the_same_shards_as_one(one_and_two):
    one, two = one_and_two
    assert len(one["shards"]) > 6
    assert two[0]["shards"] == two[1]["shards"] == one["shards"]


def test_two_processes_agree_on_fmce_net_and_judge_every_row_once(one_and_two):
    one, two = one_and_two
    assert two[0]["fmce"] == two[1]["fmce"]
    assert two[0]["fmce_weights"] == two[1]["fmce_weights"]
    assert (two[0]["matrix"], two[0]["loss"]) == (two[1]["matrix"], two[1]["loss"])
    for found in (one, two[0]):
        assert np.sum(found["matrix"], axis=1).tolist() == [12, 12, 12, 11]


def test_two_processes_train_fmce_net_as_one_would_with_the_batches_of_both(one_and_two, store):
    _, two = one_and_two
    rows = split().train
    network = fmce_net()
    stepper = torch.optim.Adam(network.parameters(), lr=LEARNING.lr)
    for epoch, found in enumerate(two[0]["fmce"]):
        stepper.param_groups[0]["lr"] = LEARNING.learning_rate(epoch)
        shares = [RandomBatches(store, rows[rank::2], 8, LEARNING.seed, epoch) for rank in (0, 1)]
        losses, right, count = 0.0, 0, 0
        for pair in zip(*shares, strict=True):
            maps, phase = (torch.cat([batch[i] for batch in pair]) for i in (0, 1))
            logits = network(maps)
            loss = F.cross_entropy(logits, phase - 1)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            losses += loss.item() * len(phase)
            right += (logits.argmax(1) == phase - 1).sum().item()
            count += len(phase)
        # Adam divides by the size of the gradient, so where that is next to nothing rounding
        # decides; 60 steps of it show in the fourth digit at most.
        assert found["train_loss"] == pytest.approx(losses / count, rel=1e-3)
        assert found["train_accuracy"] == pytest.approx(right / count, abs=1.5 / count)


if __name__ == "__main__":
    globals()[f"task_{sys.argv[1]}"](Path(sys.argv[2]))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_maps_are_written_in_order_whether_beside_the_next_or_not(
    tmp_path: Path, device: str
) -> None:
    maps = torch.rand(6, 2, 1, 1)
    writer = ShardWriter(tmp_path, phase=1, part=0, start=0, count=6, shape=(2, 1, 1))
    with writer, _appending(writer, torch.device(device)) as append:
        for start in (0, 2, 4):
            rows = np.arange(start, start + 2)
            append(maps[start : start + 2], rows, rows)
    Manifest("float16", None, (2, 1, 1), 1, 6, (writer.close(),)).save(tmp_path)
    with ShardStore.open(tmp_path) as store:
        assert np.array_equal(store.batch(1, np.arange(6)), maps.half().numpy())
    with (
        pytest.raises(ShardError, match="was promised 2 maps"),
        ShardWriter(tmp_path, phase=2, part=0, start=0, count=2, shape=(2, 1, 1)) as writer,
        _appending(writer, torch.device(device)) as append,
    ):
        append(maps[:4], np.arange(4), np.arange(4))
    assert [path.name for path in tmp_path.glob("*phase-02*")] == []
