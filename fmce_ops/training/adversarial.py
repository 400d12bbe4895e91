"""Attacks on a classifier, and detectors of attacked images: by path, confidence and features."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmce_ops.data import derive_seed, to_input
from fmce_ops.models import Classifier
from fmce_ops.pathways import recorded

Scores = NDArray[np.float64]  # (N,) larger: rather attacked
_STEPS = 10  # of projected gradient descent
_PENALTY = 0.1  # inverse of it, of the path detector: there are more gates than images
_STRIDE = 2.5  # times the strength is the way of all steps together


@dataclass(frozen=True)
class Attack:
    """A white-box attack whose change of a pixel is at most ``strength`` of 255."""

    kind: Literal["fgsm", "pgd"]
    strength: float

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.kind} {self.strength:g}/255"


STRENGTHS = (2.0, 4.0, 8.0, 16.0)
ATTACKS = (
    *(Attack("fgsm", strength) for strength in STRENGTHS),
    *(Attack("pgd", strength) for strength in STRENGTHS),
)


@dataclass(frozen=True)
class Pixels:
    """How pixels 0..255 become inputs of a network."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]

    def input(self, pixels: Tensor) -> Tensor:
        """(N, c, s, s) of any type -> (N, 3, size, size)."""
        return to_input(pixels, size=self.size, mean=self.mean, std=self.std)


def attacked(
    network: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    form: Pixels,
    seed: int,
    batch_size: int = 256,
) -> Tensor:
    """Images (N, c, s, s) float32, 0..255, that raise the network's loss.

    Parameters
    ----------
    pixels, labels : uint8 (N, c, s, s) and (N,) the true classes, on the network's device.
    """
    from captum.robust import FGSM, PGD

    network.eval()
    loss = nn.CrossEntropyLoss(reduction="none")

    def forward(images: Tensor) -> Tensor:
        return network(form.input(images))

    made = []
    bounds = {"lower_bound": 0.0, "upper_bound": 255.0}
    parts = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    for number, (images, truth) in enumerate(parts):
        given = images.float().requires_grad_()
        if attack.kind == "fgsm":
            made.append(FGSM(forward, loss, **bounds).perturb(given, attack.strength, truth))
            continue
        torch.manual_seed(derive_seed(seed, number))  # where the attack starts
        step = _STRIDE * attack.strength / _STEPS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it asks for the gradients of its own images
            pgd = PGD(forward, loss, **bounds)
            made.append(pgd.perturb(given, attack.strength, step, _STEPS, truth, random_start=True))
    return torch.cat(made).detach()


@dataclass(frozen=True)
class PathDetector:
    """Logistic regression on path codes: weight (gates,) and bias."""

    weight: NDArray[np.float64]
    bias: float

    @classmethod
    def fit(cls, clean: Tensor, attacked: Tensor) -> "PathDetector":
        """Learn from codes (N, gates) of clean and (M, gates) of attacked images."""
        from sklearn.linear_model import LogisticRegression

        codes = torch.cat([clean, attacked]).numpy().astype(np.float64)
        truth = np.repeat([0, 1], [len(clean), len(attacked)])
        model = LogisticRegression(C=_PENALTY, max_iter=2000).fit(codes, truth)
        return cls(model.coef_[0], float(model.intercept_[0]))

    def scores(self, codes: Tensor) -> Scores:
        """(N,) log odds of an attack."""
        return codes.numpy().astype(np.float64) @ self.weight + self.bias


def confidence_scores(logits: Tensor) -> Scores:
    """How unsure the network is: minus its largest probability, (N,)."""
    return -logits.double().softmax(1).amax(1).numpy()


@dataclass(frozen=True)
class FeatureDetector:
    """Mahalanobis distance of features to the nearest class mean, one covariance for all."""

    means: NDArray[np.float64]
    precision: NDArray[np.float64]

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor) -> "FeatureDetector":
        """Learn from features (N, C) of clean images and their classes."""
        from sklearn.covariance import LedoitWolf

        values = features.double().numpy()
        occurring, place = np.unique(labels.numpy(), return_inverse=True)
        means = np.stack([values[place == k].mean(0) for k in range(len(occurring))])
        centred = values - means[place]
        return cls(means, LedoitWolf(assume_centered=True).fit(centred).precision_)

    def scores(self, features: Tensor) -> Scores:
        """(N,) squared distance to the nearest class."""
        values = features.double().numpy()
        gaps = (values - mean for mean in self.means)
        return np.min([((gap @ self.precision) * gap).sum(1) for gap in gaps], axis=0)


@dataclass(frozen=True)
class Curve:
    """A detector on clean and attacked images: area under the ROC curve, and the curve itself."""

    auc: float
    false_alarms: NDArray[np.float64]
    found: NDArray[np.float64]

    @classmethod
    def of(cls, clean: Scores, attacked: Scores) -> "Curve":
        from sklearn.metrics import roc_auc_score, roc_curve

        truth = np.repeat([0, 1], [len(clean), len(attacked)])
        scores = np.concatenate([clean, attacked])
        alarms, found, _ = roc_curve(truth, scores)
        return cls(float(roc_auc_score(truth, scores)), alarms, found)


@dataclass(frozen=True)
class Seen:
    """What a gated classifier made of N images.

    Attributes
    ----------
    codes, logits, features : (N, gates) bool, (N, K), (N, C) spatial means of the feature map.
    """

    codes: Tensor
    logits: Tensor
    features: Tensor


@torch.inference_mode()
def look(network: Classifier, pixels: Tensor, form: Pixels, batch_size: int = 256) -> Seen:
    """Run a gated classifier on images (N, c, s, s), 0..255."""
    network.eval()
    parts = []
    with recorded(network) as layers:
        for images in pixels.split(batch_size):
            maps = network.features(form.input(images))
            logits = network.head(maps)
            codes = torch.cat([layer.gates > 0 for layer in layers.values()], dim=1)
            parts.append((codes.cpu(), logits.cpu(), maps.mean((2, 3)).cpu()))
    return Seen(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Detection:
    """How well attacks are told from clean images.

    Attributes
    ----------
    detector : the one on path codes.
    curves : attack -> detector (``path``, ``confidence``, ``features``) -> curve.
    accuracy : attack -> share of right answers of the network under it; ``none`` without.
    """

    detector: PathDetector
    curves: dict[str, dict[str, Curve]]
    accuracy: dict[str, float]


def study_detection(
    network: Classifier,
    learn: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    form: Pixels,
    known: Attack,
    attacks: Sequence[Attack],
    seed: int,
) -> Detection:
    """Learn detectors from some images and one attack, and judge them on others and all attacks.

    Parameters
    ----------
    network : a classifier with gates.
    learn, test : images uint8 (N, c, s, s) and labels (N,), on the network's device.
    """
    clean = look(network, learn[0], form)
    changed = look(network, attacked(network, *learn, known, form, seed), form)
    by_path = PathDetector.fit(clean.codes, changed.codes)
    by_features = FeatureDetector.fit(clean.features, learn[1].cpu())

    def scores(seen: Seen) -> dict[str, Scores]:
        return {
            "path": by_path.scores(seen.codes),
            "confidence": confidence_scores(seen.logits),
            "features": by_features.scores(seen.features),
        }

    truth = test[1].cpu()
    untouched = look(network, test[0], form)
    before = scores(untouched)
    curves, accuracy = {}, {"none": _accuracy(untouched, truth)}
    for attack in attacks:
        seen = look(network, attacked(network, *test, attack, form, seed), form)
        after = scores(seen)
        curves[attack.name] = {name: Curve.of(before[name], after[name]) for name in before}
        accuracy[attack.name] = _accuracy(seen, truth)
    return Detection(by_path, curves, accuracy)


def _accuracy(seen: Seen, labels: Tensor) -> float:
    return float((seen.logits.argmax(1) == labels).float().mean())
