"""What stage ``pathways`` trains and judges."""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fmce_ops.data import Augment, Images, TrainBatches
from fmce_ops.models import Classifier
from fmce_ops.pathways import (
    Costs,
    Weights,
    attach,
    held,
    magnitude_code,
    measure_costs,
    most_open,
)
from fmce_ops.stages.params import Params
from fmce_ops.stages.stage import Stage
from fmce_ops.training.adversarial import ATTACKS, Attack, Detection, Pixels, study_detection
from fmce_ops.training.classifier import Validation
from fmce_ops.training.devices import load
from fmce_ops.training.pathways import PathEpoch, PathPlan, judge_paths, train_paths

_PLAN = {"epochs", "optimizer", "lr", "gate_lr", "weight_decay", "schedule", "seed"}


@dataclass(frozen=True)
class Judged:
    """A network on validation and test: accuracy, mean multiply-adds, what it is."""

    network: Classifier
    val_accuracy: float
    test_accuracy: float
    multiply_adds: float


@dataclass(frozen=True)
class Outcome:
    """What one target ratio came to.

    Attributes
    ----------
    paths : the network with its gates.
    shared : the filters that most images open, fixed for all.
    pruned : the filters of largest magnitude at the multiply-adds of ``shared``, trained as long.
    codes : (N, gates) of the validation images.
    kept : (gates,) of ``pruned``.
    """

    ratio: float
    history: list[PathEpoch]
    paths: Judged
    shared: Judged
    pruned: Judged
    codes: Tensor
    kept: Tensor

    @property
    def common(self) -> Tensor:
        """(gates,) of ``shared``."""
        return most_open(self.codes)


@dataclass(frozen=True)
class Study:
    """What the parts of the stage share."""

    fabric: Fabric
    stage: Stage
    params: Params
    images: Images
    classifier: Classifier

    @cached_property
    def gated(self) -> Classifier:
        """The incoming network with open gates."""
        torch.manual_seed(self.params.pathways.seed)
        network = attach(self.classifier, self.params.pathways.modules)
        assert isinstance(network, Classifier)
        return network

    @cached_property
    def costs(self) -> Costs:
        """Multiply-adds of its paths."""
        return measure_costs(self.gated, self.pixels.input(self.images.read("val", 0, 1)[0]))

    @property
    def pixels(self) -> Pixels:
        """How images become inputs."""
        return Pixels(self.params.data.image_size, self.images.mean, self.images.std)

    def split(self, name: str, count: int | None = None) -> Validation:
        """A split to judge on, or its first ``count`` images."""
        form = self.pixels
        near = load(self.fabric, self.images, name, count)
        return Validation(*near, form.size, form.mean, form.std)

    def outcome(self, ratio: float) -> Outcome:
        """Train the gates for a ratio, and the control beside them; judge both."""
        settings = self.params.pathways
        weights = Weights(settings.information, settings.alignment, settings.sparsity, ratio)
        network, history = self._train(copy.deepcopy(self.gated), f"ratio {ratio:g}", weights)
        codes = judge_paths(network.to(self.fabric.device), self.split("val"))[2]
        common = most_open(codes)
        budget = int(self.costs.multiply_adds(common[None], controllers=False))
        kept = magnitude_code(self.gated, self.costs, budget)
        control = held(self.gated, kept)
        nothing = Weights(0, 0, 0, 1)
        pruned, _ = self._train(control, f"magnitude at ratio {ratio:g}", nothing)
        return Outcome(
            ratio,
            history,
            self.judged(network, controllers=True),
            self.judged(held(network, common), controllers=False),
            self.judged(pruned, controllers=False),
            codes,
            kept,
        )

    def _train(
        self, network: nn.Module, name: str, weights: Weights
    ) -> tuple[Classifier, list[PathEpoch]]:
        settings = self.params.pathways
        plan = PathPlan(**settings.model_dump(include=_PLAN), weights=weights)
        folder = self.stage.folder / name.replace(" ", "-")
        with self.stage.beneath(name, {"fmce.arm": name}) as reporter:
            history = train_paths(
                self.fabric,
                network,
                len(self.images.classes),
                self._batches(),
                self.split("val"),
                self.costs,
                plan,
                folder,
                reporter,
            )
        assert isinstance(network, Classifier)
        return network, history

    def _batches(self) -> TrainBatches:
        settings, form = self.params.pathways, self.pixels
        return TrainBatches(
            *load(self.fabric, self.images, "train"),
            batch_size=settings.batch_size,
            size=form.size,
            mean=form.mean,
            std=form.std,
            augment=Augment(**settings.augment.model_dump()),
            seed=settings.seed,
            rank=self.fabric.global_rank,
            world=self.fabric.world_size,
        )

    def judged(self, network: nn.Module, *, controllers: bool) -> Judged:
        """Judge a network with gates; ``controllers``: whether each image has its own path."""
        assert isinstance(network, Classifier)
        network.to(self.fabric.device)
        _, val, _ = judge_paths(network, self.split("val"))
        _, test, codes = judge_paths(network, self.split("test"))
        per_image = self.costs.multiply_adds(codes, controllers=controllers)
        return Judged(network.cpu(), val, test, float(per_image.double().mean()))

    def detection(self, network: Classifier) -> Detection:
        """Attack a gated network, and tell attacked images by their paths."""
        settings = self.params.pathways
        learn, test = (self.split(name, settings.attacked) for name in ("train", "test"))
        return study_detection(
            network.to(self.fabric.device),
            (learn.images, learn.labels),
            (test.images, test.labels),
            self.pixels,
            Attack(settings.known_attack, settings.known_strength),
            ATTACKS,
            settings.seed,
        )
