"""Training of gates, what paths tell, and detectors of attacked images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fmce_ops.data import Augment, TrainBatches
from fmce_ops.errors import TrainingError
from fmce_ops.models import Classifier, build
from fmce_ops.pathways import (
    Weights,
    attach,
    gated_layers,
    magnitude_code,
    measure_costs,
    needed_filters,
    path_codes,
    profiles,
    similarity,
    split_code,
)
from fmce_ops.pathways.costs import Costs
from fmce_ops.stages.pathways import choose
from fmce_ops.training.adversarial import (
    Attack,
    Curve,
    FeatureDetector,
    PathDetector,
    Pixels,
    attacked,
    study_detection,
)
from fmce_ops.training.classifier import Validation
from fmce_ops.training.devices import launch
from fmce_ops.training.pathways import (
    PathEpoch,
    PathPlan,
    confirm_needed,
    judge_paths,
    train_paths,
)
from fmce_ops.training.reporter import Reporters
from scipy.stats import mannwhitneyu
from torch import nn

from tests.project import digits

SIZE = 16
WEIGHTS = Weights(information=0.01, alignment=0.1, sparsity=0.02, ratio=0.3)
PLAN = PathPlan(3, "adam", 2e-3, 2e-2, 1e-4, "cosine", WEIGHTS, 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    with digits(tmp_path_factory.mktemp("images"), 40, SIZE) as opened:
        yield opened


@pytest.fixture(scope="module")
def form(images) -> Pixels:
    return Pixels(SIZE, images.mean, images.std)


def small(num_classes: int) -> nn.Module:
    """Three convolutions that learn digits in seconds."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, num_classes))


def gated() -> Classifier:
    torch.manual_seed(0)
    return attach(
        build("tests.test_path_training:small", 10, stem="standard", cut="11", in_size=SIZE)
    )


def split(images, name: str) -> Validation:
    return Validation(*images.load(name), SIZE, images.mean, images.std)


def train(
    images, folder: Path, plan: PathPlan = PLAN, *, network=None, reporter=None
) -> tuple[Classifier, list[PathEpoch]]:
    network = network or gated()
    batches = TrainBatches(
        *images.load("train"),
        batch_size=32,
        size=SIZE,
        mean=images.mean,
        std=images.std,
        augment=Augment(),
        seed=0,
    )
    costs = measure_costs(network, torch.zeros(1, 3, SIZE, SIZE))
    validation = split(images, "val")
    history = train_paths(
        launch(), network, 10, batches, validation, costs, plan, folder, reporter or Reporters()
    )
    return network, history


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    return train(images, tmp_path_factory.mktemp("gates"), PathPlan(**{**vars(PLAN), "epochs": 12}))


def test_gates_close_towards_the_ratio_and_the_network_still_learns(trained, images) -> None:
    network, history = trained
    _, accuracy, codes = judge_paths(network, split(images, "test"))
    assert history[-1].val_accuracy > 0.7
    assert accuracy > 0.7
    assert history[-1].multiply_adds < history[0].multiply_adds
    assert codes.float().mean() < 0.9
    assert history[-1].parts["sparsity"] < history[0].parts["sparsity"]
    shares = split_code(network, judge_paths(network, split(images, "val"))[2])
    for name, part in shares.items():
        assert history[-1].open[name] == pytest.approx(float(part.float().mean()))


def test_a_training_that_was_cut_short_ends_with_the_same_bytes(images, tmp_path) -> None:
    whole, history = train(images, tmp_path / "whole")

    class KilledError(Exception):
        pass

    class Killer:
        def begin(self, task: str, total: int) -> None: ...

        def row(self, row) -> None:
            if row.step == 2:
                raise KilledError

    with pytest.raises(KilledError):
        train(images, tmp_path / "cut", reporter=Killer())
    resumed, again = train(images, tmp_path / "cut")
    assert [e.val_loss for e in again] == [e.val_loss for e in history]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_loss_that_is_not_finite_stops_the_training(images, tmp_path) -> None:
    plan = PathPlan(**{**vars(PLAN), "lr": 1e30, "optimizer": "sgd"})
    with pytest.raises(TrainingError, match=r"not finite.*lower pathways\.lr"):
        train(images, tmp_path, plan)


def test_layers_that_close_are_named_as_it_happens(images, tmp_path, caplog) -> None:
    network, closing = gated(), "backbone.4"
    layers = gated_layers(network)
    assert closing in layers
    with torch.no_grad():
        layers[closing].controller.score.bias.fill_(-9)
    plan = PathPlan(**{**vars(PLAN), "epochs": 1, "gate_lr": 1e-9})
    _, (epoch,) = train(images, tmp_path, plan, network=network)
    assert epoch.open[closing] == 0
    assert f"all gates of {closing} are closed at epoch 1" in caplog.text
    assert epoch.row().values[f"open/{closing}"] == 0


def test_profiles_and_similarity_are_those_counted_pair_by_pair() -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.rand(12, 7, generator=draw) < torch.tensor([0, 0.2, 0.4, 0.5, 0.6, 0.8, 1])
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 1])
    found = profiles(codes, labels, 3)
    alike = similarity(codes, labels, 3)
    varying = [g for g in range(7) if 0 < codes[:, g].sum() < 12]
    for a in range(3):
        assert torch.allclose(found[a], codes[labels == a].float().mean(0))
        for b in range(3):
            pairs = [
                (codes[i, varying] == codes[j, varying]).float().mean()
                for i in range(12)
                for j in range(12)
                if i != j and labels[i] == a and labels[j] == b
            ]
            assert float(alike[a, b]) == pytest.approx(float(torch.stack(pairs).mean()))


def test_paths_that_are_all_the_same_tell_nothing_of_similarity() -> None:
    codes = torch.tensor([[True, False]]).expand(4, 2)
    assert similarity(codes, torch.tensor([0, 0, 1, 1]), 3).isnan().all()


def test_needed_filters_are_those_that_a_class_opens_more_than_others() -> None:
    found = torch.tensor([[1.0, 0.9, 0.1, 0.5], [1.0, 0.1, 0.2, 0.5], [1.0, 0.3, 0.9, 0.4]])
    assert needed_filters(found, 0, 4).tolist() == [1, 3]
    assert needed_filters(found, 2, 1).tolist() == [2]


def test_switching_off_what_a_class_needs_hurts_that_class(trained, images) -> None:
    network, _ = trained
    test = split(images, "test")
    pixels, labels = images.load("train")
    form = Pixels(SIZE, images.mean, images.std)
    found = profiles(path_codes(network, form.input(pixels)), labels, 10)
    needs = confirm_needed(network, found, test, 0)
    need = needs[3]
    _, accuracy, _ = judge_paths(network, test)
    own, rest = need.own[0], need.others[0]
    assert abs((own + 9 * rest) / 10 - accuracy) < 0.05  # classes are of nearly equal size
    assert confirm_needed(network, found, test, 0) == needs


def test_magnitude_keeps_the_largest_filters_within_the_budget() -> None:
    network = gated()
    costs: Costs = measure_costs(network, torch.zeros(1, 3, SIZE, SIZE))
    code = magnitude_code(network, costs, costs.dense / 2)
    spent = int(costs.multiply_adds(code[None], controllers=False))
    assert 0.4 * costs.dense < spent <= costs.dense / 2
    for name, part in split_code(network, code).items():
        norms = gated_layers(network)[name].conv.weight.flatten(1).abs().sum(1)
        assert norms[part].min() >= norms[~part].max()
    assert magnitude_code(network, costs, 0).sum() == len(gated_layers(network))


def test_attacks_stay_within_their_strength_and_do_their_work(trained, images, form) -> None:
    network, _ = trained
    pixels, labels = images.load("test")
    clean = (network(form.input(pixels)).argmax(1) == labels).float().mean()
    for kind in ("fgsm", "pgd"):
        changed = attacked(network, pixels, labels, Attack(kind, 16), form, 0)
        assert (changed - pixels).abs().max() <= 16.001
        assert changed.min() >= 0
        assert changed.max() <= 255
        after = (network(form.input(changed)).argmax(1) == labels).float().mean()
        assert after < clean
        again = attacked(network, pixels, labels, Attack(kind, 16), form, 0)
        assert torch.equal(changed, again)


def test_detectors_are_judged_by_the_area_under_the_curve(trained, images, form) -> None:
    network, _ = trained
    known, other = Attack("pgd", 32.0), Attack("fgsm", 32.0)
    study = study_detection(
        network, images.load("train"), images.load("test"), form, known, [known, other], 0
    )
    assert study.accuracy["none"] > study.accuracy["pgd 32/255"]
    assert set(study.curves) == {"pgd 32/255", "fgsm 32/255"}
    assert study.curves["pgd 32/255"]["path"].auc > 0.6


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    clean, changed = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.9, 0.4, 0.7])
    expected = mannwhitneyu(changed, clean).statistic / (len(clean) * len(changed))
    assert Curve.of(clean, changed).auc == pytest.approx(expected)


def test_a_path_detector_learns_a_gate_that_attacks_open() -> None:
    draw = torch.Generator().manual_seed(0)
    clean = torch.rand(100, 5, generator=draw) < 0.5
    changed = torch.rand(100, 5, generator=draw) < 0.5
    clean[:, 2], changed[:, 2] = False, True
    detector = PathDetector.fit(clean, changed)
    assert int(np.abs(detector.weight).argmax()) == 2
    assert detector.scores(changed).min() > detector.scores(clean).max()


def test_feature_distance_is_that_of_the_nearest_class() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    labels = torch.arange(400) % 2
    features = centres[labels] + torch.randn(400, 2, generator=draw)
    detector = FeatureDetector.fit(features, labels)
    near, far = detector.scores(torch.tensor([[0.1, 0.1], [5.0, 5.0]]))
    assert near < 1
    assert far == pytest.approx(50, rel=0.3)


def test_the_cheapest_network_that_loses_little_is_chosen() -> None:
    assert choose(0.9, [0.91, 0.896, 0.7], [3, 2, 1], 0.005) == 1
    assert choose(0.9, [0.8, 0.85, 0.7], [3, 2, 1], 0.005) == 1
